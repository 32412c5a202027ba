"""Names in archives: made clean for the tree, and made harmless for messages."""

import re

# Kernel limits (limits.h): a component, and what a system call takes with its NUL.
NAME_MAX = 255
PATH_MAX = 4096

# What may be an empty, ``.`` or ``..`` component; one search costs half of two with ``in``.
_UNCLEAN = re.compile(rb"/[./]").search


def shown(name: bytes) -> str:
    """A name from an archive as text for a message: one line, at most 200 characters."""
    text = name.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"'/{text}'" if len(text) <= 200 else f"'/{text[:200]}…'"


def clean_path(name: bytes) -> bytes | None:
    """The name without leading ``/``, empty, ``.`` and ``..`` components.

    None when ``..`` leads above the root.
    """
    if name[:2] == b"./":
        name = name[2:]
    if name[-1:] == b"/":
        name = name.rstrip(b"/")
    if name[:1] not in (b"/", b".", b"") and not _UNCLEAN(name):
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                return None
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)
