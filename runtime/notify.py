"""What a service tells its service manager, and leaves with it: sd_notify(3)."""

import logging
import os
import socket

log = logging.getLogger(__name__)

# For one that does not read what it is told.
_PATIENCE_SECONDS = 1.0
# SD_LISTEN_FDS_START
_FIRST_PASSED = 3


def close_passed() -> None:
    """Close what a service manager kept for us and passes back (sd_listen_fds(3)). What is still
    needed of it is taken from the service manager itself, as from any other holder."""
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    if os.environ.pop("LISTEN_PID", "") == str(os.getpid()):
        os.closerange(_FIRST_PASSED, _FIRST_PASSED + count)
    os.environ.pop("LISTEN_FDNAMES", None)


def is_managed() -> bool:
    """Whether there is a service manager to tell."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def ready() -> None:
    """Tell that the service is ready; do nothing without a service manager."""
    _send("READY=1")


def store(name: str, descriptors: tuple[int, ...]) -> None:
    """Leave descriptors with the service manager, which holds them even when all our processes
    are gone; do nothing without one. systemd knows those that it has, and takes no more than
    the unit's FileDescriptorStoreMax=.
    """
    # FDPOLL=0: it would let go of a descriptor on which the kernel reports an error.
    _send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", descriptors)


def forget(name: str) -> None:
    """Take them back."""
    _send(f"FDSTOREREMOVE=1\nFDNAME={name}")


def _send(text: str, descriptors: tuple[int, ...] = ()) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(_PATIENCE_SECONDS)
        try:
            sender.connect(address)
            socket.send_fds(sender, [text.encode()], descriptors)
        except OSError as error:
            log.warning("the service manager can't be told %r: %s", text, error)
