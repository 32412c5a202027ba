"""The daemon's log, where it is a file."""

import subprocess
import sys
from pathlib import Path

from tests.support.mounting import mounted

_WRITER = """
import logging, sys
from pathlib import Path
from tools import logs

root = Path(sys.argv[1])
logs.SYSLOG_SOCKET = "/nowhere"
assert logs.of_daemon(root, "info") == str(root / "ctrfs.log")
log = logging.getLogger("test")
log.info("first")
with open(root / "fill", "wb", buffering=0) as file:
    try:
        while file.write(bytes(100)):
            pass
    except OSError:
        pass
for number in range(200):
    log.info("no room %d", number)
(root / "fill").unlink()
log.info("there is room")
(root / "ctrfs.log").rename(root / "old")
log.info("anew")
"""


def test_what_a_full_disk_costs_is_said(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, "tmpfs", "size=64k"):
        program = [sys.executable, "-c", _WRITER, str(tmp_path)]
        done = subprocess.run(program, capture_output=True, text=True, check=True)
        old, new = ((tmp_path / name).read_text() for name in ("old", "ctrfs.log"))
    assert done.stderr == ""
    first, *kept, torn, notice, last = (line.partition(" test: ")[2] for line in old.splitlines())
    assert [first, last] == ["first", "there is room"]
    assert kept == [f"no room {number}" for number in range(len(kept))]
    assert f"no room {len(kept)}".startswith(torn)
    assert old.splitlines()[-2].endswith(f"file could not be written: {200 - len(kept)}")
    assert not notice
    assert len(new.splitlines()) == 1
