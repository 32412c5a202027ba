"""What an image is built for, and which of several builds fits.

The rules are containerd's (platforms package): architectures have one spelling, arm64
means v8 and arm means v7 unless told otherwise, a CPU runs older variants of its
architecture, an amd64 machine runs 386 and an arm64 machine runs 32-bit arm.
"""

import platform
import re

import msgspec

from store.errors import InvalidPlatform

_PART = re.compile(r"[A-Za-z0-9_.-]{1,64}")

# uname and other spellings -> architecture, variant; Go's names are the ones in images.
_ARCHITECTURES = {
    "i386": ("386", ""),
    "i686": ("386", ""),
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5l": ("arm", "v5"),
    "loongarch64": ("loong64", ""),
}

_ARM_32 = ("v8", "v7", "v6", "v5")


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """Operating system, architecture and variant, as they stand in image documents."""

    os: str = ""
    architecture: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.os}/{self.architecture}" + (f"/{self.variant}" if self.variant else "")

    def normal(self) -> "Platform":
        """The same with one spelling and no variant where it is the usual one (arm: v7)."""
        architecture = self.architecture.lower()
        variant = self.variant.lower()
        architecture, implied = _ARCHITECTURES.get(architecture, (architecture, ""))
        variant = variant or implied
        if variant and not variant.startswith("v"):
            variant = f"v{variant}"
        if (architecture, variant) in (("arm64", "v8"), ("amd64", "v1")):
            variant = ""
        if architecture == "arm" and not variant:
            variant = "v7"
        return Platform(self.os.lower(), architecture, variant)


def parse_platform(text: str) -> Platform:
    """``os/architecture[/variant]``, in normal form.

    Raises:
        InvalidPlatform: it is not that.
    """
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(map(_PART.fullmatch, parts)):
        raise InvalidPlatform(
            f"{text!r:.200} is not a platform; write os/architecture[/variant], "
            "for example linux/arm64"
        )
    return Platform(*parts).normal()


def host_platform() -> Platform:
    """The platform of this machine."""
    return Platform("linux", platform.machine()).normal()


def runnable(wanted: Platform) -> tuple[Platform, ...]:
    """The platforms whose images a machine of ``wanted`` can run, best first, in normal form."""
    own = wanted.normal()
    found = [Platform(own.os, own.architecture, variant) for variant in _variants(own)]
    if own.architecture == "amd64":
        found.append(Platform(own.os, "386"))
    if own.architecture == "arm64":
        found += [Platform(own.os, "arm", variant) for variant in _ARM_32]
    return tuple(found)


def _variants(own: Platform) -> tuple[str, ...]:
    if own.architecture == "arm" and own.variant in _ARM_32:
        return _ARM_32[_ARM_32.index(own.variant) :]
    level = re.fullmatch(r"v([2-9])(?:\.[0-9]+)?", own.variant)
    if own.architecture == "amd64" and level:
        return (*(f"v{number}" for number in range(int(level[1]), 1, -1)), "")
    if own.architecture == "arm64" and own.variant:
        return (own.variant, "")
    return (own.variant,)
