"""Telling systemd that the service is ready: sd_notify(3)."""

import os
import socket


def ready() -> None:
    """Send READY=1 to the socket in $NOTIFY_SOCKET; do nothing without it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"READY=1", address)
