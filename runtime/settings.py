"""What a container is set to, and the text form of each setting in its control file.

A setting that was not written is None, and its value then comes from the image or is
the default: ``effective`` says what counts. Texts come from anybody who may write the
file; what cannot be used is refused with InvalidSetting and one sentence.
"""

import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from runtime.errors import InvalidSetting
from runtime.signals import parse_signal, signal_name
from runtime.users import MAX_ID
from runtime.volumes import Volume, format_volumes, parse_volumes
from store.manifest import ContainerConfig, ImageConfig

Stdin = Literal["none", "open", "once"]
Network = Literal["none", "host"]

# execve(2): MAX_ARG_STRLEN, one argument or variable with its NUL. The sum of all has a
# limit, too, but it depends on the stack limit: the kernel checks it.
_MAX_STRING = 131_071
_MAX_PATH = 4095
_HOST_NAME_MAX = 64
_DEFAULT_STOP_SIGNAL = 15
# What docker waits, and systemd for much longer; databases want more and can have it.
_DEFAULT_STOP_TIMEOUT = 10.0
_MAX_STOP_TIMEOUT = 1_000_000.0
_DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What was written; None where nothing was. This is the document `spec`."""

    image: str | None = None
    args: tuple[str, ...] | None = None
    env: tuple[str, ...] | None = None
    workdir: str | None = None
    user: str | None = None
    hostname: str | None = None
    mounts: tuple[Volume, ...] | None = None
    readonly: bool | None = None
    labels: dict[str, str] | None = None
    stop_signal: str | None = None
    stop_timeout: float | None = None
    stdin: Stdin | None = None
    network: Network | None = None


@dataclass(frozen=True, slots=True)
class Effective:
    """What counts for a container: its settings over its image's configuration."""

    image: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    workdir: str
    user: str
    hostname: str
    mounts: tuple[Volume, ...]
    readonly: bool
    labels: dict[str, str]
    stop_signal: str
    stop_timeout: float
    stdin: Stdin
    network: Network


def effective(settings: Settings, image: ImageConfig | None, name: str) -> Effective:
    """The values in force.

    Args:
        settings: what was written for the container.
        image: configuration of its image, None while it has none.
        name: the container's name, which is its default hostname.
    """
    config = image.config if image else ContainerConfig()
    timeout = settings.stop_timeout
    return Effective(
        image=settings.image or "",
        args=settings.args or (config.entrypoint or ()) + (config.cmd or ()),
        env=_merge_env(config.env or (), settings.env or ()),
        workdir=settings.workdir or posixpath.join("/", config.working_dir or ""),
        user=settings.user or config.user or "0",
        hostname=settings.hostname or name[:_HOST_NAME_MAX].rstrip("._-"),
        mounts=settings.mounts or (),
        readonly=bool(settings.readonly),
        labels={**(config.labels or {}), **(settings.labels or {})},
        stop_signal=settings.stop_signal or _image_stop_signal(config.stop_signal),
        stop_timeout=_DEFAULT_STOP_TIMEOUT if timeout is None else timeout,
        stdin=settings.stdin or "none",
        network=settings.network or "none",
    )


def _image_stop_signal(text: str | None) -> str:
    """An image may say anything; what is no signal counts as nothing."""
    try:
        return signal_name(parse_signal(text)) if text else signal_name(_DEFAULT_STOP_SIGNAL)
    except InvalidSetting:
        return signal_name(_DEFAULT_STOP_SIGNAL)


def _merge_env(image: Iterable[str], own: Iterable[str]) -> tuple[str, ...]:
    """Own variables over the image's, in the image's order; `NAME` alone takes one away."""
    merged: dict[str, str] = {}
    for line in (_DEFAULT_PATH, *image, *own):
        name, equals, _ = line.partition("=")
        if equals:
            merged[name] = line
        else:
            merged.pop(name, None)
    return tuple(merged.values())


# --- text forms ----------------------------------------------------------------------


def _split_items(text: str) -> tuple[str, ...]:
    """The items of a list file: separated by NUL if there is one, else one a line."""
    if "\0" in text:
        items = text.split("\0")
        return tuple(items[:-1] if items[-1] in ("", "\n") else items)
    return tuple(text.removesuffix("\n").split("\n"))


def _join_items(items: Iterable[str]) -> str:
    """A text that _split_items() and nothing else gives these items for."""
    items = tuple(items)
    if any("\n" in item for item in items) or (items and not "".join(items).strip()):
        return "".join(item + "\0" for item in items)
    return "\n".join(items)


def _word(text: str, what: str) -> str:
    """A value of one line."""
    value = text.strip()
    if not value.isprintable():
        raise InvalidSetting(f"{what} is one line of printable characters")
    return value


def _parse_image(text: str) -> str:
    value = _word(text, "an image's name")
    if len(value.split()) != 1 or len(value) > _MAX_PATH:
        raise InvalidSetting(f"{value[:40]!r} is not the name of one image")
    return value


def _parse_args(text: str) -> tuple[str, ...]:
    return _check_args(_split_items(text))


def _check_args(args: tuple[str, ...]) -> tuple[str, ...]:
    _check_strings(args, "argument")
    if not args or not args[0]:
        raise InvalidSetting("the first argument, the command, is empty")
    return args


def _check_strings(strings: Iterable[str], what: str) -> None:
    for string in strings:
        if "\0" in string:
            raise InvalidSetting(f"an {what} holds a NUL character")
        if len(string.encode()) > _MAX_STRING:
            raise InvalidSetting(f"an {what} is longer than the kernel's {_MAX_STRING} bytes")


def _parse_env(text: str) -> tuple[str, ...]:
    return _check_env(tuple(item for item in _split_items(text) if item))


def _check_env(env: tuple[str, ...]) -> tuple[str, ...]:
    _check_strings(env, "environment variable")
    for line in env:
        name = line.partition("=")[0]
        if not name or not name.isprintable() or name != name.strip():
            raise InvalidSetting(f"{line[:40]!r} is neither NAME=VALUE nor NAME")
    return env


def _parse_workdir(text: str) -> str:
    value = text.removesuffix("\n")
    if not value.startswith("/") or re.search(r"[\0\n]", value) or len(value.encode()) > _MAX_PATH:
        raise InvalidSetting(f"{value[:80]!r} is not an absolute path")
    return posixpath.normpath(value).replace("//", "/")


def _parse_user(text: str) -> str:
    value = _word(text, "a user")
    if not re.fullmatch(r"[^:\s]{1,256}(:[^:\s]{1,256})?", value):
        raise InvalidSetting(f"{value[:40]!r} is not USER or USER:GROUP, each a name or a number")
    for part in value.split(":"):
        if part.isascii() and part.isdigit() and int(part) > MAX_ID:
            raise InvalidSetting(f"{part[:40]} is larger than any user or group has: {MAX_ID}")
    return value


def _parse_hostname(text: str) -> str:
    value = _word(text, "a hostname")
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", value):
        raise InvalidSetting(
            f"{value[:80]!r} is not a hostname: up to {_HOST_NAME_MAX} letters, digits, dots"
            " and dashes, a letter or digit first and last"
        )
    return value


def _parse_readonly(text: str) -> bool:
    value = text.strip()
    if value not in ("0", "1"):
        raise InvalidSetting(f"{value[:40]!r} is neither 0 nor 1")
    return value == "1"


def _parse_labels(text: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    for line in _split_items(text):
        key, equals, value = line.partition("=")
        if line and (not equals or not key or not key.isprintable() or key != key.strip()):
            raise InvalidSetting(f"{line[:40]!r} is not KEY=VALUE")
        if line:
            labels[key] = value
    return labels


def _format_labels(labels: dict[str, str]) -> str:
    return _join_items(f"{key}={value}" for key, value in labels.items())


def _parse_stop_signal(text: str) -> str:
    return signal_name(parse_signal(text))


def _parse_stop_timeout(text: str) -> float:
    value = text.strip()
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,3})?", value):
        raise InvalidSetting(f"{value[:40]!r} is not a number of seconds")
    return _check_stop_timeout(float(value))


def _check_stop_timeout(value: float) -> float:
    if not 0 <= value <= _MAX_STOP_TIMEOUT:
        raise InvalidSetting(f"stop_timeout is 0 to {_MAX_STOP_TIMEOUT:.0f} seconds")
    return value


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        value = text.strip()
        if value not in words:
            raise InvalidSetting(f"{value[:40]!r} is not one of {', '.join(words)}")
        return value

    return parse


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its file's name and help, and the way from text to value and back.

    ``parse`` raises InvalidSetting; ``format`` gives a text without a last newline that
    ``parse`` takes. ``private`` ones may hold secrets and are for root alone.
    """

    name: str
    help: str
    parse: Callable[[str], Any]
    format: Callable[[Any], str]
    private: bool = False


_ALL = (
    Setting(
        "image",
        "Name of the image: as docker knows it, or a directory below images/. It cannot change"
        " any more once the container's rootfs holds files.",
        _parse_image,
        str,
    ),
    Setting(
        "args",
        "The command and its arguments, one a line; or separated by NUL characters, which"
        " allows newlines in them. Replaces the image's entrypoint and cmd.",
        _parse_args,
        _join_items,
    ),
    Setting(
        "env",
        "Environment, `NAME=VALUE` a line, over the image's; `NAME` alone takes a variable of"
        " the image away. Reading gives the result. NUL characters separate as in `args`.",
        _parse_env,
        _join_items,
        private=True,
    ),
    Setting("workdir", "Directory the command starts in.", _parse_workdir, str),
    Setting(
        "user",
        "`USER` or `USER:GROUP` the command runs as, each a name from the image's own"
        " /etc/passwd and /etc/group, or a number.",
        _parse_user,
        str,
    ),
    Setting("hostname", "Hostname; by default the container's name.", _parse_hostname, str),
    Setting(
        "mounts",
        "Directories and files of this machine for the container, as fstab(5) lines, in the"
        " order of mounting: `SOURCE TARGET bind ro`, `SOURCE TARGET none rbind,rslave`,"
        " `tmpfs TARGET tmpfs size=64m,mode=1777`. A blank in a path is written \\040.",
        parse_volumes,
        format_volumes,
    ),
    Setting(
        "readonly",
        "1: the container cannot write to its root filesystem.",
        _parse_readonly,
        lambda value: "1" if value else "0",
    ),
    Setting(
        "labels",
        "Your own notes, `KEY=VALUE` a line, over the image's.",
        _parse_labels,
        _format_labels,
    ),
    Setting(
        "stop_signal",
        "Signal that `stop` sends: a name such as TERM, or a number.",
        _parse_stop_signal,
        str,
    ),
    Setting(
        "stop_timeout",
        "Seconds that `stop` waits before it sends KILL.",
        _parse_stop_timeout,
        lambda value: f"{value:.3f}".rstrip("0").rstrip("."),
    ),
    Setting(
        "stdin",
        "`none`: standard input is /dev/null. `open`: what is written to `stdin` goes to the"
        " process. `once`: as open, and the process gets end-of-file when the writer closes.",
        _one_of("none", "open", "once"),
        str,
    ),
    Setting(
        "network",
        "`none`: only a loopback interface. `host`: the network of this machine.",
        _one_of("none", "host"),
        str,
    ),
)
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _ALL}


def with_text(settings: Settings, name: str, text: str) -> Settings:
    """``settings`` with one of them set to what ``text`` says; blank means the default.

    Raises:
        InvalidSetting: the text cannot be used.
    """
    setting = SETTINGS.get(name)
    if setting is None:
        raise InvalidSetting(f"there is no setting {name[:40]!r}")
    _check_encodable(text)
    value = setting.parse(text) if text.strip() else None
    if value in ((), {}):  # nothing but comments
        value = None
    _check_document(msgspec.to_builtins(value))  # fstab lines have escapes, too
    return msgspec.structs.replace(settings, **{name: value})


def own_text(settings: Settings, name: str) -> str:
    """What was written for one setting, with its last newline; empty if nothing was."""
    value = getattr(settings, name)
    if value is None:
        return ""
    text = SETTINGS[name].format(value)
    return text if text.endswith("\0") else text + "\n"


def effective_text(values: Effective, name: str) -> str:
    """The value in force of one setting, without a last newline."""
    return SETTINGS[name].format(getattr(values, name))


def decode_settings(document: bytes) -> Settings:
    """The settings in a `spec` document.

    Raises:
        InvalidSetting: it is not JSON, or holds an unknown or unusable setting.
    """
    try:
        read = msgspec.json.decode(document, type=Settings)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidSetting(f"this is no spec document: {error}") from None
    _check_document(msgspec.to_builtins(read))
    return msgspec.structs.replace(
        read,
        **{name: _checked(name, value) for name, value in msgspec.structs.asdict(read).items()},
    )


def _strings(value: Any) -> Iterator[str]:
    """All strings in a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *_strings(item))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _check_document(value: Any) -> None:
    for string in _strings(value):
        _check_encodable(string)
        if "\0" in string:
            raise InvalidSetting("a value holds a NUL character")


def _check_encodable(text: str) -> None:
    """Records and runtimes take UTF-8, which has no halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidSetting(f"the text is not UTF-8: {error.reason}") from None


def _checked(name: str, value: Any) -> Any:
    """A value from a document, held to the rules that texts are held to."""
    if value is None or name == "mounts":
        return value
    if name == "args":
        return _check_args(value)
    if name == "env":
        return _check_env(value)
    if name == "stop_timeout":
        return _check_stop_timeout(value)
    return SETTINGS[name].parse(SETTINGS[name].format(value))


def encode_settings(settings: Settings) -> bytes:
    """The `spec` document: all settings that were written."""
    return msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n"
