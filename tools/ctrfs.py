"""The command `ctrfs`: start and end the mounted tree; everything else is done in it."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from store.errors import CtrfsError
from tools import instance, mountpoint
from tools.instance import CommandFailed
from tools.interruption import Terminated
from tools.options import DEFAULT_ROOT, Options

# The daemon unmounts and closes its database within a second; with a pull under way its
# last fsync of a gigabyte may have to wait for a slow disk.
STOP_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the process."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except CtrfsError as error:
        print(f"ctrfs: {error.sentence}", file=sys.stderr)
        return 1
    except Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ctrfs", description="A container runtime whose whole interface is a mounted tree."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    mount = commands.add_parser("mount", help="show the tree at a directory")
    mount.set_defaults(command=_mount)
    mount.add_argument("mountpoint", type=Path, metavar="MOUNTPOINT")
    _add_root(mount)
    _add_config(mount)
    mount.add_argument("--foreground", action="store_true", help="stay, and log to standard error")
    mount.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="the least that is logged (%(default)s)",
    )

    umount = commands.add_parser("umount", help="end it; containers run on")
    umount.set_defaults(command=_umount)
    umount.add_argument("mountpoint", type=Path, metavar="MOUNTPOINT")

    convert = commands.add_parser(
        "convert",
        help="make an image that can be used before all of it is here",
        description="SRC and DST are each docker://REF, oci:DIR:TAG, or the name of an image in a"
        " mounted tree. The digest of the new manifest is printed.",
    )
    convert.set_defaults(command=_convert)
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("target", metavar="DST")
    convert.add_argument(
        "--format",
        choices=("estargz", "zstd:chunked"),
        default="estargz",
        help="of the new layers (%(default)s)",
    )
    convert.add_argument(
        "--trace",
        metavar="CONTAINER",
        help="put first what this container of the mounted tree opened at its start; or a file"
        " with paths, one a line, if it has a slash",
    )
    convert.add_argument(
        "--platform", metavar="OS/ARCH", help="which image of several (this machine's)"
    )
    convert.add_argument(
        "--mount", type=Path, metavar="DIR", help="the mounted tree, if there are several"
    )
    _add_config(convert)

    index = commands.add_parser(
        "index",
        help="make an image's ordinary layers usable before all of them is here",
        description="IMAGE is docker://REF, or the name of an image in a mounted tree, which is"
        " indexed where it came from. The indexes are pushed beside the image, and found by whoever"
        " pulls it; the digest of their manifest is printed.",
    )
    index.set_defaults(command=_index)
    index.add_argument("image", metavar="IMAGE")
    index.add_argument(
        "--platform", metavar="OS/ARCH", help="which image of several (this machine's)"
    )
    index.add_argument(
        "--mount", type=Path, metavar="DIR", help="the mounted tree, if there are several"
    )
    _add_config(index)

    doctor = commands.add_parser("doctor", help="what this machine has and lacks")
    doctor.set_defaults(command=_doctor)
    _add_root(doctor)
    _add_config(doctor)

    commands.add_parser("version", help="print the version").set_defaults(command=_version)
    return parser


def _add_root(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--root",
        type=Path,
        default=DEFAULT_ROOT,
        metavar="DIR",
        help="where images and containers are kept (%(default)s)",
    )


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="settings (/etc/ctrfs/config.json)"
    )


def _mount(arguments: argparse.Namespace) -> int:
    # Imported here because the other commands need none of it.
    from tools import serving

    _require_root()
    options = Options.make(arguments.root, arguments.mountpoint, arguments.config)
    serve = serving.foreground if arguments.foreground else serving.background
    serve(options, arguments.log_level)
    return 0


def _umount(arguments: argparse.Namespace) -> int:
    _require_root()
    target = Path(os.path.realpath(arguments.mountpoint))
    daemon = instance.at(target)
    if daemon:
        _stop(daemon)
    elif not mountpoint.ours(target):
        raise CommandFailed(f"no ctrfs is mounted at {target}")
    if mountpoint.ours(target):
        print(
            "its daemon had been killed: containers run on, and what it had mounted of layers stays"
            " until the next `ctrfs mount` of the same --root ends",
            file=sys.stderr,
        )
    while mountpoint.ours(target):
        mountpoint.detach(target)
    return 0


def _stop(daemon: instance.Instance) -> None:
    """Ask the daemon to end and wait until it has."""
    try:
        process = os.pidfd_open(daemon.pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not select.select([process], [], [], STOP_SECONDS)[0]:
            raise CommandFailed(
                f"process {daemon.pid} has not ended within {STOP_SECONDS:.0f} s; nothing is lost"
                f" by `kill -9 {daemon.pid}` and another `ctrfs umount`"
            )
    finally:
        os.close(process)


def _convert(arguments: argparse.Namespace) -> int:
    # Imported here because the other commands need none of it.
    from tools.convert import Request, run

    request = Request(
        source=arguments.source,
        target=arguments.target,
        format=arguments.format,
        trace=arguments.trace,
        platform=arguments.platform,
        mount=arguments.mount,
        config=arguments.config,
    )
    print(run(request))
    return 0


def _index(arguments: argparse.Namespace) -> int:
    # Imported here because the other commands need none of it.
    from tools.index import run

    print(run(arguments.image, arguments.platform, arguments.mount, arguments.config))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    # Imported here because the other commands need none of it.
    from fs.config import load
    from runtime import features

    _require_root()
    unfit = False
    for check in features.checks(load(arguments.config).runtime, arguments.root):
        mark = "ok" if check.ok else "MISSING" if check.required else "without"
        print(f"{mark:8}{check.name}: {check.found}")
        if not check.ok:
            print(f"        {check.advice}")
            unfit = unfit or check.required
    return 1 if unfit else 0


def _version(_: argparse.Namespace) -> int:
    from importlib.metadata import version  # as long in coming as the rest together

    print(f"ctrfs {version('ctrfs')}")
    return 0


def _require_root() -> None:
    if os.geteuid() != 0:
        raise CommandFailed("mounts need root: run this command with sudo")


if __name__ == "__main__":
    sys.exit(main())
