"""The mounted tree: what users see. Imports store and runtime."""
