"""Priorities of threads, which belong to each by itself."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from store.priority import Nicely


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def in_a_thread(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def test_a_block_has_the_lowest_priority() -> None:
    before = priority()

    def work() -> None:
        with Nicely():
            assert priority() == 19
        assert priority() == before

    in_a_thread(work)


def test_until_somebody_waits_for_it() -> None:
    before = priority()

    def work() -> None:
        pace = Nicely()
        with pace:
            in_a_thread(pace.hurry)
            assert priority() == before
        early = Nicely()
        early.hurry()
        with early:
            assert priority() == before

    in_a_thread(work)
