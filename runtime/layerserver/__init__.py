"""The process that serves the data of incomplete layers, and how the daemon talks to it."""
