"""The list behind `errors`."""

import trio

from fs.failures import Failures
from fs.nodes import Caller


async def test_readers_wait_for_a_failure_that_is_coming(autojump_clock: object) -> None:
    failures = Failures()

    async def add() -> None:
        with failures.coming():
            started.set()
            await trio.sleep(1)
            failures.add("images/a", "read", Caller(1, 0, 0), 5, "it is gone")

    started = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(add)
        await started.wait()
        assert failures.text() == ""
        await failures.settled()
        assert failures.text().endswith("EIO /images/a: read by pid 1 uid 0: it is gone")


async def test_one_that_does_not_come_is_waited_for_no_longer(autojump_clock: object) -> None:
    failures = Failures()

    async def give_up() -> None:
        with failures.coming():
            started.set()
            await trio.sleep_forever()

    started = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up)
        await started.wait()
        nursery.start_soon(failures.settled)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    await failures.settled()
    assert failures.text() == ""
