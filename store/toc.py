"""Stub until merged."""

from store.manifest import Descriptor


def read_toc(layer: Descriptor, read: object, limits: object) -> None:
    return None
