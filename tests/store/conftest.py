"""A store, a real registry, and a proxy before it that can misbehave."""

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from store.config import Patience, StoreConfig
from store.events import EventLog
from store.manifest import Descriptor
from store.store import Store
from tests.support.fetching import Place
from tests.support.layouts import OciLayout
from tests.support.proxy import Proxy
from tests.support.registry import Registry
from tests.support.spans import HandMade, OneFrame

# Enough to see that pauses are made; a test run has no time for real ones.
QUICK = Patience(backoff_seconds=0.01, attempts=4, read_seconds=1.0, connect_seconds=2.0)


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    """Settings that know no credentials of this machine and don't wait long."""
    return StoreConfig(patience=QUICK, docker_config=str(tmp_path / "docker"))


@pytest.fixture
def store(tmp_path: Path, config: StoreConfig) -> Iterator[Store]:
    """An empty store."""
    store = Store(tmp_path / "root", config, EventLog())
    yield store
    store.close()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry for all tests; each pushes to a repository of its own."""
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def proxy(registry: Registry) -> Iterator[Proxy]:
    """A proxy before the registry."""
    with Proxy(registry.port) as proxy:
        yield proxy


@pytest.fixture
def layout(tmp_path: Path) -> OciLayout:
    """An empty image layout."""
    return OciLayout(tmp_path / "layout")


@pytest.fixture
def place(
    tmp_path: Path,
    made: HandMade | OneFrame,
    layout: OciLayout,
    registry: Registry,
    proxy: Proxy,
    config: StoreConfig,
    request: pytest.FixtureRequest,
) -> Place:
    """An incomplete layer of an image that is in the registry, behind the proxy."""
    blob = layout.blob(made.blob, made.media_type)
    name = "fetch/" + re.sub("[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    registry.push(layout, layout.manifest([blob], [made.diff_id]), name, "v1")
    descriptor = msgspec.convert(blob, Descriptor)
    return Place(tmp_path / "root", made, descriptor, f"{proxy.host}/{name}:v1", config)
