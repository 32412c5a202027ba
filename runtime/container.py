"""One container: its settings, its state, and the commands that change it.

What is read without waiting is in memory. A command that changes something holds the
container's lock while it does; the record is in the database before it returns. The
commands on its state go on when the caller stops waiting (Ctrl-C): a start is complete
or undone in any case, and a stop that has sent its signal sends KILL, too, in time.

States: created → running ⇄ paused → stopped → running …
A command in the wrong state fails with ContainerBusy and changes nothing. Settings can
be written until the first start.
"""

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from runtime import spec
from runtime.background import Background
from runtime.cgroups import layout
from runtime.errors import (
    ContainerBusy,
    ContainerNotFound,
    InvalidSetting,
    RuntimeFailure,
    StartFailed,
)
from runtime.log import LogReader
from runtime.opened import Recording
from runtime.records import Pinned, Record, Run, State
from runtime.settings import (
    Effective,
    Settings,
    decode_settings,
    effective,
    effective_text,
    encode_settings,
    own_text,
    with_text,
)
from runtime.signals import parse_signal, signal_name
from runtime.stdin import Stdin
from runtime.steps import Ending, Services, Steps
from store.cas import Digest
from store.errors import CtrfsError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# Steps that may hang, all on one dead network file system that many containers bind. Twice
# trio's default for all threads, so that some are left for containers with other sources;
# each costs 8 MiB of addresses and little memory. What they cannot take is what saving and
# killing need, which use the default one.
_SLOW_STEPS = trio.CapacityLimiter(80)

# How the end of a run went may be unreadable for a while, as files on a failing disk are.
_COLLECT_RETRY_SECONDS = 1.0


async def _slowly(step: Callable[..., _T], *arguments: object) -> _T:
    """Run a step that may hang, in a thread that nothing urgent waits for."""
    return await trio.to_thread.run_sync(step, *arguments, limiter=_SLOW_STEPS)


class Container:
    """One container. Made by Containers alone.

    Attributes:
        log: what its process wrote.
    """

    def __init__(self, services: Services, background: Background, record: Record) -> None:
        self._services = services
        self._background = background
        self._record = record
        self._steps = Steps(services, record.uid)
        self._lock = trio.Lock()
        self._ended = trio.Event()
        self._removed = False
        # A run has ended, and what it left has not been cleared away.
        self._untidy = False
        self._stdin = Stdin(self._steps.attach_path, background)
        self._recording: Recording | None = None
        self.log: LogReader = self._steps.log

    # --- what is known without waiting -----------------------------------------------

    @property
    def id(self) -> str:
        """Its name."""
        return self._record.id

    @property
    def uid(self) -> str:
        """What names it on disk for good."""
        return self._record.uid

    @property
    def state(self) -> str:
        """created, running, paused or stopped."""
        return self._record.state

    @property
    def is_running(self) -> bool:
        """Whether it has processes, paused or not."""
        return self._record.state in ("running", "paused")

    @property
    def pid(self) -> int | None:
        """Its first process, while it runs."""
        run = self._record.run
        return run.init.pid if run and self.is_running else None

    @property
    def exit_code(self) -> int | None:
        """What the last run ended with; None before, and while it runs."""
        return self._record.exit_code

    def ended_with(self) -> int | None:
        """The exit code if it is stopped."""
        return self._record.exit_code if self.state == "stopped" else None

    @property
    def error(self) -> str:
        """Why the last command on it failed, or its run ended oddly; "" after a start."""
        return self._record.error

    @error.setter
    def error(self, sentence: str) -> None:
        self._record.error = sentence

    @property
    def created_ns(self) -> int:
        """When it was made, in nanoseconds since the epoch, like all times here."""
        return self._record.created_ns

    @property
    def started_ns(self) -> int | None:
        """When it last started."""
        return self._record.started_ns

    @property
    def finished_ns(self) -> int | None:
        """When it last ended; None while it runs."""
        return self._record.finished_ns

    @property
    def settings_ns(self) -> int:
        """When a setting was last written."""
        return self._record.settings_ns

    @property
    def state_ns(self) -> int:
        """When its state last changed."""
        return self._record.state_ns

    # --- settings --------------------------------------------------------------------

    def _effective(self) -> Effective:
        pinned = self._record.image
        image = pinned.config if pinned else None
        if pinned is None and self._record.settings.image:
            try:
                image = self._services.store.images.get(self._record.settings.image).config
            except CtrfsError:
                image = None
        return effective(self._record.settings, image, self.id)

    def effective_text(self, name: str) -> str:
        """The value in force of a setting, as its file shows it, without the last newline."""
        return effective_text(self._effective(), name)

    def own_text(self, name: str) -> str:
        """What was written for a setting; empty if it has its default."""
        return own_text(self._record.settings, name)

    async def set(self, name: str, text: str) -> None:
        """Write one setting; blank goes back to the default.

        Raises:
            InvalidSetting: the text cannot be used.
            ContainerBusy: it has been started.
        """
        async with self._lock:
            self._check_settable()
            settings = with_text(self._record.settings, name, text)
            await self._replace_settings(settings)

    def spec_document(self) -> bytes:
        """All settings that were written, as JSON."""
        return encode_settings(self._record.settings)

    async def set_spec_document(self, document: bytes) -> None:
        """Replace all settings.

        Raises:
            InvalidSetting: the document cannot be used.
            ContainerBusy: it has been started.
        """
        settings = decode_settings(document)
        async with self._lock:
            self._check_settable()
            await self._replace_settings(settings)

    def config_document(self) -> bytes:
        """The OCI runtime document as it will run, or ran; empty while there is no image.

        Before a start the user's numbers are those of the document, and its name stands
        in ``process.user.username``, to be resolved inside the image.
        """
        if not self._record.settings.image and not self._record.override:
            return b""
        document = self._document(self._effective())
        root = self._steps.rootfs_path
        return spec.encode(
            spec.complete(document, root, self._steps.cgroup_path, self._record.user)
        )

    def own_config_document(self) -> bytes:
        """The OCI runtime document of one's own; empty without one."""
        return (self._record.override or "").encode()

    async def set_config_document(self, document: bytes) -> None:
        """Run by a document of one's own; empty goes back to the generated one.

        Raises:
            InvalidSetting: the document cannot be used.
            ContainerBusy: it has been started.
        """
        text = document.decode("utf-8", "replace") if document.strip() else None
        if text is not None:
            spec.parse_override(document)
        async with self._lock:
            self._check_settable()
            await self._commit_settings(override=text)

    def _document(self, values: Effective) -> spec.Document:
        if self._record.override is not None:
            return spec.parse_override(self._record.override.encode())
        return spec.generate(values, self._steps.cgroup_path, layout() == "v2")

    def _check_settable(self) -> None:
        self._check_exists()
        if self.state != "created":
            raise ContainerBusy(
                f"{self.id} has been started, so its settings are fixed; copy its `spec` to a"
                " new container and change them there"
            )

    async def _replace_settings(self, settings: Settings) -> None:
        if self._record.image is None or settings.image == self._record.settings.image:
            await self._commit_settings(settings=settings)
            return
        with trio.CancelScope(shield=True):
            await self._discard_files()
            await self._commit_settings(settings=settings, image=None, user=None)

    async def _discard_files(self) -> None:
        """Make another image possible, unless files were put over this one's.

        Raises:
            ContainerBusy: there are files, or somebody is in the root filesystem.
        """
        if not await _slowly(self._steps.discard_unused):
            raise ContainerBusy(
                f"the rootfs of {self.id} holds files already, over those of its image; make a"
                " new container for another image"
            )

    async def _commit_settings(self, **changes: Any) -> None:
        await self._commit(settings_ns=time.time_ns(), **changes)

    async def _commit(self, **changes: Any) -> None:
        """Change the record, on disk first: what could not be saved has not happened."""
        with trio.CancelScope(shield=True):
            await self._write(**changes)
        self._assign(**changes)

    async def _write(self, **changes: Any) -> None:
        changed = msgspec.structs.replace(self._record, **changes)
        await trio.to_thread.run_sync(self._services.records.save, changed)

    def _assign(self, **changes: Any) -> None:
        # The same object: a run may have ended meanwhile and left word of it there.
        for name, value in changes.items():
            setattr(self._record, name, value)

    # --- commands --------------------------------------------------------------------

    async def start(self) -> None:
        """Run it.

        Raises:
            ContainerBusy: it runs.
            CtrfsError: it cannot run; everything is as before.
        """
        await self._background.run(self._start)

    async def _start(self) -> None:
        # Nothing here waits for long, and half a start is nothing to end with.
        with trio.CancelScope(shield=True):
            async with self._lock:
                self._check_exists()
                if self.is_running:
                    raise ContainerBusy(f"{self.id} runs already")
                await self._tidy()
                await self._launch()

    async def _follow_name(self) -> None:
        """Take the image that the name means now, when only looking has chosen another.

        Who looks at the root filesystem before the first start has it mounted, and so has
        chosen the image for it. As long as nothing was put into it, nobody meant that.
        """
        pinned = self._record.image
        if pinned is None or self.state != "created":
            return
        with suppress(CtrfsError):  # the name is gone, or somebody is still looking
            if self._pin().digest != pinned.digest and await _slowly(self._steps.discard_unused):
                await self._commit(image=None)

    async def _launch(self) -> None:
        await self._follow_name()
        record = self._record
        pinned = record.image or self._pin()
        values = effective(record.settings, pinned.config, self.id)
        document = self._document(values)
        if not document["process"]["args"]:
            raise InvalidSetting(
                "neither the image nor `args` names a command; write one to `args`"
            )
        try:
            run, started = await self._create_and_start(pinned, values, document)
            # A run that is not on record would be nobody's after the next start of the daemon.
            await self._commit(
                run=run,
                starting=None,
                state="running",
                state_ns=time.time_ns(),
                started_ns=started,
                finished_ns=None,
                exit_code=None,
                error="",
            )
        except BaseException as error:
            await self._undo()
            if isinstance(error, OSError) and not isinstance(error, CtrfsError):
                raise StartFailed(
                    f"{self.id} cannot be started: {error.strerror}", errno=error.errno
                ) from error
            raise
        self._stdin.reopen()
        if self._ended.is_set():  # else somebody waits already, for this very run
            self._ended = trio.Event()
        self._background.start_soon(self._watch, run)
        if self._recording is not None:
            self._background.start_soon(self._record_opened, self._recording, pinned)
            self._recording = None
        self._emit("start", pid=run.init.pid)

    async def _undo(self) -> None:
        if self._recording is not None:
            self._recording.close()
            self._recording = None
        try:
            await _slowly(self._steps.undo, self._record)
        except (CtrfsError, OSError) as error:
            log.warning("%s: undoing a failed start: %s", self.id, error)

    async def _create_and_start(
        self, pinned: Pinned, values: Effective, document: spec.Document
    ) -> tuple[Run, int]:
        """The run, and when it was let go."""
        creation = await _slowly(self._steps.prepare, self._record, pinned, values, document)
        try:
            init = await creation.init(self._services.config.create_timeout)
        finally:
            creation.close()
        if creation.conmon is None:
            raise StartFailed("the container's monitor (conmon) ended at once")
        self._recording = await _slowly(self._steps.record_opened)
        # It may have ended before the next line is reached.
        started = time.time_ns()
        await self._services.runtime.start(self.uid)
        return Run(creation.conmon, init), started

    async def _record_opened(self, recording: Recording, pinned: Pinned) -> None:
        """Remember what it opens first, for its users and for the next of its image."""
        with trio.move_on_after(self._services.store.config.lazy.record_seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(recording.run)
                await self._ended.wait()
                nursery.cancel_scope.cancel()
        paths = recording.close()
        await trio.to_thread.run_sync(self._steps.keep_opened, pinned, paths)

    def _pin(self) -> Pinned:
        """The image that the name in the settings means now."""
        name = self._record.settings.image
        if not name:
            raise InvalidSetting("no image is set; write the name of one to `image`")
        image = self._services.store.images.get(name)
        return Pinned(image.digest, image.diff_ids, image.config)

    async def stop(self) -> None:
        """Send the stop signal, and KILL if it has not ended after ``stop_timeout`` seconds.

        Returns when it has ended. Several at once are as one.

        Raises:
            ContainerBusy: it does not run.
        """
        await self._background.run(self._stop)

    async def _stop(self) -> None:
        values = self._effective()
        async with self._lock:
            ended = self._ended
            run = self._check_running()
            run.init.send(parse_signal(values.stop_signal))
            await self._thaw()
        with trio.move_on_after(values.stop_timeout):
            await ended.wait()
        if not ended.is_set():
            await trio.to_thread.run_sync(self._steps.kill, run)
            await ended.wait()

    async def kill(self) -> None:
        """End it at once, and return when it has ended.

        Raises:
            ContainerBusy: it does not run.
        """
        await self._background.run(self._kill)

    async def _kill(self) -> None:
        async with self._lock:
            ended = self._ended
            run = self._check_running()
            await trio.to_thread.run_sync(self._steps.kill, run)
        await ended.wait()

    async def restart(self) -> None:
        """Stop it if it runs, then start it."""
        await self._background.run(self._restart)

    async def _restart(self) -> None:
        if self.is_running:
            # One that ends by itself at this moment is as good as stopped.
            with suppress(ContainerBusy):
                await self._stop()
        await self._start()

    async def pause(self) -> None:
        """Freeze its processes.

        Raises:
            ContainerBusy: it does not run, or is paused.
        """
        await self._background.run(self._pause)

    async def _pause(self) -> None:
        async with self._lock:
            run = self._check_running()
            if self.state == "paused":
                raise ContainerBusy(f"{self.id} is paused already")
            await self._freeze(run)
            if self.state == "running":
                await self._set_state("paused")

    async def _freeze(self, run: Run) -> None:
        try:
            await self._services.runtime.pause(self.uid)
        except CtrfsError:
            if run.init.is_running():
                raise
            raise ContainerBusy(f"{self.id} has just ended") from None

    async def resume(self) -> None:
        """Let paused processes go on.

        Raises:
            ContainerBusy: it is not paused.
        """
        await self._background.run(self._resume)

    async def _resume(self) -> None:
        async with self._lock:
            self._check_exists()
            if self.state != "paused":
                raise ContainerBusy(f"{self.id} is not paused, it is {self.state}")
            await self._thaw()

    async def _thaw(self) -> None:
        if self.state == "paused":
            await trio.to_thread.run_sync(self._steps.thaw)
            if self.state == "paused":
                await self._set_state("running")

    async def _set_state(self, state: State) -> None:
        changes = {"state": state, "state_ns": time.time_ns()}
        with trio.CancelScope(shield=True):
            await self._write(**changes)
        if not self.is_running:
            return  # it has ended meanwhile, which tidying saves
        self._assign(**changes)
        self._emit("pause" if state == "paused" else "resume")

    async def signal(self, number: int) -> None:
        """Send a signal to its first process. A paused one gets it when it is resumed.

        Raises:
            ContainerBusy: it does not run.
        """
        if number == signal.SIGKILL:
            await self.kill()
            return
        if not self._check_running().init.send(number):
            raise ContainerBusy(f"{self.id} has just ended")
        log.debug("%s: sent %s", self.id, signal_name(number))

    async def wait(self) -> int:
        """The exit code of the run under way, or of the last one; before any, of the first.

        Raises:
            ContainerNotFound: it was removed without having run.
        """
        if self.exit_code is None:
            await self._ended.wait()
        if self._record.exit_code is None:
            raise ContainerNotFound(f"{self.id} was removed")
        return self._record.exit_code

    def _check_exists(self) -> None:
        if self._removed:
            raise ContainerNotFound(f"{self.id} was removed")

    def _check_running(self) -> Run:
        self._check_exists()
        run = self._record.run
        if run is None or not self.is_running:
            raise ContainerBusy(f"{self.id} does not run, it is {self.state}")
        return run

    # --- the end of a run ------------------------------------------------------------

    async def _watch(self, run: Run) -> None:
        """Wait for the end of a run's conmon, then say how the run ended."""
        descriptor = run.conmon.open()
        if descriptor is not None:
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)
        # Nothing tells of a disk that works again.
        while not await self._collected(run):  # noqa: ASYNC110
            await trio.sleep(_COLLECT_RETRY_SECONDS)
        with trio.CancelScope(shield=True):
            async with self._lock:
                await self._tidy()

    async def _collected(self, run: Run) -> bool:
        try:
            await self._collect(run)
        except (CtrfsError, OSError) as error:
            if self.error != str(error):
                log.error("%s: how its run ended cannot be found out: %s", self.id, error)
            self.error = str(error)
            return False
        return True

    async def _collect(self, run: Run) -> None:
        ending = self._steps.ending()
        if ending is not None:
            self._publish(ending)
            return
        with trio.CancelScope(shield=True):
            async with self._lock:
                self._publish(await self._end_without_monitor(run))

    async def _end_without_monitor(self, run: Run) -> Ending:
        ending = await trio.to_thread.run_sync(self._steps.end_without_monitor, run)
        try:
            # No file says this, and a second time the answer would be another.
            await self._write(**self._ended_by(ending))
        except CtrfsError as error:
            log.error("%s: its end cannot be saved yet: %s", self.id, error)
        return ending

    def _ended_by(self, ending: Ending) -> dict[str, Any]:
        """What the end of a run changes."""
        return {
            "state": "stopped",
            "state_ns": time.time_ns(),
            "exit_code": ending.code,
            # The end is the time of a file, which may be 4 ms behind the clock; and who ends
            # at once has ended before `runc start` has returned.
            "finished_ns": max(ending.finished_ns, self._record.started_ns or 0),
            "error": ending.error,
        }

    def _publish(self, ending: Ending) -> None:
        self._assign(**self._ended_by(ending))
        self._untidy = True
        self._ended.set()
        self._stdin.close()
        self._emit(
            "exit", exit_code=ending.code, **({"error": ending.error} if ending.error else {})
        )

    async def _tidy(self) -> None:
        """Clear away after a run. Needs the lock."""
        if self._untidy:
            await _slowly(self._steps.tidy, self._record)
            self._untidy = False

    async def recover(self) -> None:
        """Go on from where the last daemon was: adopt the run, or say how it ended."""
        try:
            await self._recover()
        except (CtrfsError, OSError) as error:
            # The others are not to suffer; what is left is tried again by each command.
            log.warning("%s: going on after the last daemon: %s", self.id, error)
            self.error = str(error)
        run = self._record.run
        if run is not None and self.is_running:
            self._background.start_soon(self._watch, run)

    async def _recover(self) -> None:
        record = self._record
        if record.starting:
            await _slowly(self._steps.resolve_start, record)
        if self.is_running and record.run is not None:
            if not record.run.conmon.is_running():
                await self._collect(record.run)
            else:
                frozen = await trio.to_thread.run_sync(self._steps.is_frozen)
                record.state = "paused" if frozen else "running"
        elif await _slowly(self._steps.has_leftovers):
            self._untidy = True
        async with self._lock:
            await self._tidy()

    # --- standard input --------------------------------------------------------------

    async def write_stdin(self, data: bytes) -> None:
        """Give its process ``data``. Waits while it does not read.

        Raises:
            ContainerBusy: it does not run.
            InvalidSetting: its setting ``stdin`` is none.
            StdinClosed: end-of-file was sent, or it has just ended.
        """
        self._check_running()
        if self._effective().stdin == "none":
            raise InvalidSetting(
                f"{self.id} has no standard input; set `stdin` to open or once before the start"
            )
        await self._stdin.send(data, self.id)

    async def stdin_writer_gone(self) -> None:
        """A writer has closed `stdin`: end-of-file for the process, if it is set to once."""
        if self._effective().stdin == "once":
            self._stdin.end()

    # --- looking ---------------------------------------------------------------------

    async def processes(self) -> str:
        """Its processes as ps shows them; empty when it does not run."""
        run = self._record.run
        if run is None or not self.is_running:
            return ""
        return await trio.to_thread.run_sync(self._steps.processes, run)

    async def changes(self) -> bytes:
        """What it changed against its image: `A|C|D path` lines."""
        pinned = self._record.image
        if pinned is None:
            return b""
        try:
            return await _slowly(self._steps.changes, pinned)
        except OSError as error:
            raise RuntimeFailure(f"cannot compare: {error.strerror}", errno=error.errno) from error

    async def opened(self) -> bytes:
        """What it opened in the first seconds of its last run, a path a line."""
        return await trio.to_thread.run_sync(self._steps.opened)

    async def rootfs(self) -> Path:
        """Its root filesystem, mounted; before the first start, too.

        Raises:
            CtrfsError: it has no image, or that cannot be mounted.
        """
        async with self._lock:
            self._check_exists()
            await self._tidy()
            pinned = self._record.image
            if pinned is None:
                if not self._record.settings.image:
                    # Whoever lists a new container looks at this; nothing has gone wrong.
                    raise ContainerNotFound(f"{self.id} has no image yet, so it has no files")
                pinned = self._pin()
                await self._commit(image=pinned)
            elif self._steps.is_mounted():
                return self._steps.rootfs_path  # each access through the link to it asks
            return await _slowly(self._steps.mount, pinned)

    def has_layer(self, diff_id: Digest) -> bool:
        """Whether its root filesystem has a layer."""
        return self._record.image is not None and diff_id in self._record.image.diff_ids

    def uses(self, digest: str) -> bool:
        """Whether it needs the image with this manifest digest."""
        if self._record.image is not None:
            return self._record.image.digest == digest
        try:
            name = self._record.settings.image
            return bool(name) and self._services.store.images.get(name or "").digest == digest
        except CtrfsError:
            return False

    @property
    def diff_ids(self) -> tuple[Digest, ...] | None:
        """The layers that its files lie on, bottom first; None as long as no image was chosen."""
        image = self._record.image
        return image.diff_ids if image else None

    async def unmount(self) -> None:
        """Unmount the root filesystem if it does not run and nobody uses it."""
        async with self._lock:
            if not self.is_running:
                await _slowly(self._steps.unmount)

    async def unmount_if_idle(self) -> None:
        """Unmount the root filesystem of a container that does not run and is not looked at."""
        if self.is_running or self._lock.locked():
            return
        async with self._lock:
            if not self.is_running:
                await _slowly(self._steps.unmount_idle)

    async def detach_if_idle(self) -> None:
        """Detach the root filesystem of a container that does not run, also from who looks."""
        async with self._lock:
            if not self.is_running:
                await _slowly(self._steps.detach)

    # --- for Containers --------------------------------------------------------------

    async def rename(self, name: str) -> None:
        """Give it another name, which the caller has reserved."""
        async with self._lock:
            self._check_exists()
            self._check_stopped("renamed")
            before = self._record.id
            await self._commit(id=name)
            self._emit("rename", old_id=before)

    async def remove(self) -> None:
        """Destroy it with all its files. To be run to its end."""
        with trio.CancelScope(shield=True):
            async with self._lock:
                self._check_exists()
                self._check_stopped("removed")
                await _slowly(self._steps.destroy, self._record)
                self._removed = True
                self._ended.set()
                self._emit("remove")

    def _check_stopped(self, what: str) -> None:
        if self.is_running:
            raise ContainerBusy(
                f"{self.id} is {self.state} and cannot be {what}; write `stop` to its state first"
            )

    def _emit(self, kind: str, **fields: object) -> None:
        self._services.store.events.emit(f"container.{kind}", id=self.id, **fields)
