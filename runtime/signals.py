"""Names and numbers of signals, as kill(1) and image configurations write them."""

import re
import signal

from runtime.errors import InvalidSetting

# The kernel's range (signal(7)). The C library keeps 32 and 33 for itself, so its SIGRTMIN
# is 34; `SIGRTMIN+3`, which systemd images stop on, is 37 with glibc and musl alike.
_HIGHEST = 64
_RTMIN = 34
_NAMES = {
    item.name.removeprefix("SIG"): int(item)
    for item in signal.Signals
    if item.name not in ("SIGRTMIN", "SIGRTMAX")
} | {"CLD": signal.SIGCHLD.value, "POLL": signal.SIGIO.value, "IOT": signal.SIGABRT.value}


def parse_signal(text: str) -> int:
    """The number of a signal given as `TERM`, `SIGTERM`, `15`, `RTMIN+3` or `RTMAX-1`.

    Raises:
        InvalidSetting: there is no such signal.
    """
    word = text.strip().upper().removeprefix("SIG")
    number = _NAMES.get(word)
    if number is None and re.fullmatch(r"[0-9]{1,2}", word):
        number = int(word)
    if match := re.fullmatch(r"RTMIN(\+[0-9]{1,2})?", word):
        number = _RTMIN + int(match[1] or 0)
    if match := re.fullmatch(r"RTMAX(-[0-9]{1,2})?", word):
        number = _HIGHEST + int(match[1] or 0)
    if number is None or not 1 <= number <= _HIGHEST:
        raise InvalidSetting(
            f"{text.strip()[:40]!r} is no signal; write a name such as TERM or a number up to"
            f" {_HIGHEST}"
        )
    return number


def signal_name(number: int) -> str:
    """The name without SIG, for example TERM; RTMIN+N for those that have none."""
    if number >= _RTMIN:
        return f"RTMIN+{number - _RTMIN}" if number > _RTMIN else "RTMIN"
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return str(number)
