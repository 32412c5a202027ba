"""Containers: root filesystems, OCI runtime specs, monitors. Imports store, never fs."""
