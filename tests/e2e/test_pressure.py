"""Short of memory, the kernel forgets what it knew of the tree at any moment."""

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.mount import Mount


def test_states_change_while_the_kernel_drops_inodes(mount: Mount, busybox: str) -> None:
    over = threading.Event()

    def again_and_again(step: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            while not over.wait(0.001):
                step()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def drop() -> None:
        Path("/proc/sys/vm/drop_caches").write_text("2")  # inodes and names, no pages

    def look() -> None:
        subprocess.run(["ls", "-lR", mount.path / "containers"], capture_output=True)

    threads = [again_and_again(drop), again_and_again(look)]
    try:
        end = time.monotonic() + 4
        number = 0
        while time.monotonic() < end:
            assert mount.run_container(f"c{number}", busybox, "sh", "-c", "exit 3") == (3, "")
            mount.remove(f"c{number}")
            number += 1
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert number > 3
    assert mount.read("containers/README")
