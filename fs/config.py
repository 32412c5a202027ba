"""The daemon's settings, of all parts, as one document."""

from pathlib import Path

import msgspec

from runtime.config import RuntimeConfig
from store.config import StoreConfig
from store.errors import CtrfsError


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What /etc/ctrfs/config.json may say; each field has a default."""

    store: StoreConfig = msgspec.field(default_factory=StoreConfig)
    runtime: RuntimeConfig = msgspec.field(default_factory=RuntimeConfig)


class InvalidConfig(CtrfsError):
    """The configuration file cannot be used."""


DEFAULT_PATH = Path("/etc/ctrfs/config.json")


def load(path: Path | None) -> Config:
    """The settings in ``path``, or in the default place if that exists, or the defaults.

    Raises:
        InvalidConfig: the file cannot be read, or says something unknown.
    """
    if path is None:
        if not DEFAULT_PATH.exists():
            return Config()
        path = DEFAULT_PATH
    try:
        return msgspec.json.decode(path.read_bytes(), type=Config)
    except OSError as error:
        raise InvalidConfig(f"cannot read {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise InvalidConfig(f"{path}: {error}") from None
