"""What a user writes for where an image is: `docker://REF`, `oci:DIR:TAG`, or a name in a tree."""

import os

from store.reference import LayoutSource, RegistrySource, parse_source


def parse_place(text: str) -> RegistrySource | LayoutSource | None:
    """Where an image is or goes; None for a tree. Directories become absolute.

    Raises:
        InvalidReference: it is no place.
    """
    if text.startswith("oci:"):
        path, colon, tag = text.removeprefix("oci:").partition(":")
        return parse_source(f"oci:{os.path.abspath(path)}{colon}{tag}" if path else text)
    return parse_source(text) if text.startswith("docker://") else None
