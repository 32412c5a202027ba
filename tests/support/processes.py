"""What /proc says of processes."""

from pathlib import Path


def parent(pid: int) -> int:
    """The process id of a process' parent, which of a container's first process is its monitor."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
