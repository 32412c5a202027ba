"""What the tree shows: the one store, the one runtime, and what the daemon knows of itself."""

from collections.abc import Mapping
from dataclasses import dataclass

from fs.automount import Automounts
from fs.config import Config
from fs.failures import Failures
from fs.nodes import Directory
from runtime.containers import Containers
from runtime.layerserver.client import LayerClient
from runtime.rootfs import Rootfs
from store.pull import Pulls
from store.store import Store


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that nodes ask or tell."""

    store: Store
    pulls: Pulls
    containers: Containers
    rootfs: Rootfs
    layers: LayerClient
    failures: Failures
    automounts: Automounts
    config: Config
    info: Mapping[str, object]


class Top(Directory):
    """The root, as the directories right below it see it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        super().__init__(None)
