"""From the description of a source to the source."""

from store.config import StoreConfig
from store.oci_layout import Layout
from store.reference import LayoutSource, RegistrySource
from store.registry import Registry
from store.source import Source


def open_source(described: RegistrySource | LayoutSource, config: StoreConfig) -> Source:
    """The registry or layout that an image comes from; nothing is asked of it yet."""
    if isinstance(described, LayoutSource):
        return Layout(described, config.limits)
    return Registry(described.reference, config)
