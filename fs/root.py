"""The root of the tree and the files that stand right in it."""

import json
from importlib.metadata import version

import msgspec

from fs.containers import ContainersDirectory
from fs.content import Content
from fs.context import Context, Top
from fs.events import EventSource
from fs.images import Images
from fs.nodes import STARTED_NS, BytesFile, Source, StreamFile, TextFile


class RootFile(TextFile):
    """A text about the daemon itself."""

    parent: Top

    @property
    def context(self) -> Context:
        """What the daemon knows."""
        return self.parent.context


class Version(RootFile):
    """The version of the program that serves this tree."""

    name = "version"

    def read(self) -> str:
        """For example 0.1.0."""
        return version("ctrfs")


class Info(RootFile, BytesFile):
    """What was found on this machine when the daemon started, as JSON: kernel, mount
    methods, cgroups, runtimes, and for each thing that is missing what it would give."""

    name = "info.json"

    def raw(self) -> bytes:
        """The features, for people and programs."""
        return json.dumps(self.context.info, indent=2).encode() + b"\n"


class ConfigJson(RootFile, BytesFile):
    """The daemon's settings in force, as JSON. They come from /etc/ctrfs/config.json, or the
    file named by `ctrfs mount --config`, when the daemon starts."""

    name = "config.json"

    def raw(self) -> bytes:
        """All settings, also those at their default."""
        return msgspec.json.format(msgspec.json.encode(self.context.config)) + b"\n"


class Errors(RootFile):
    """The last 1000 operations that failed, one a line, newest last: time, errno, file,
    what was tried or written, process and user, and a sentence on what is wrong and what
    to do. `tail -1 errors` explains the failure that you just saw. For root, because a
    sentence may quote what only root may read."""

    name = "errors"
    private = True

    def read(self) -> str:
        """The failures."""
        return self.context.failures.text()

    async def slow_content(self) -> bytes:
        """The failures, with those whose reader has his error already."""
        await self.context.failures.settled()
        return self.content()

    def mtime_ns(self) -> int:
        """When the last failure happened."""
        return self.context.failures.changed_ns


class Events(StreamFile):
    """Everything that happens from now on, as JSON Lines: `seq`, `time`, `event`, and what
    it concerns. A read blocks until there is something; poll(2) works. A gap in `seq`
    means that the reader was more than 10,000 events behind."""

    name = "events"
    parent: Top

    async def start(self) -> Source:
        """Listen from now on."""
        return EventSource(self.parent.context.store.events)


class Root(Top):
    """ctrfs: a container runtime whose interface is this directory.

    Pull an image by writing its name to images/pull, look into it below images/, make a
    container with mkdir below containers/, write its settings, and write `start` to its
    state. When a command fails, the last line of `errors` says why and what to do. Every
    directory has a README like this one.

        echo docker.io/library/alpine:3.20 > images/pull
        cat images/alpine:3.20/rootfs/etc/os-release
        mkdir containers/hello
        echo alpine:3.20 > containers/hello/image
        printf '%s\\n' echo hi > containers/hello/args
        echo start > containers/hello/state
        cat containers/hello/wait containers/hello/log
        rmdir containers/hello
    """

    name = ""
    files = (Version, Info, ConfigJson, Errors, Events, Images, Content, ContainersDirectory)

    def mtime_ns(self) -> int:
        """The start of the daemon."""
        return STARTED_NS
