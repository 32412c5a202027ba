"""Every failure of running containers, as one tree; see store/errors.py for the base."""

import errno

from store.errors import CtrfsError


class RuntimeFailure(CtrfsError):
    """Base of the failures of this package."""


class ContainerNotFound(RuntimeFailure):
    """No container has this name."""

    errno = errno.ENOENT


class ContainerExists(RuntimeFailure):
    """The name is taken."""

    errno = errno.EEXIST


class ContainerBusy(RuntimeFailure):
    """The container is in the wrong state for this, or its files are in use."""

    errno = errno.EBUSY


class InvalidName(RuntimeFailure):
    """The text cannot be the name of a container."""

    errno = errno.EINVAL


class InvalidSetting(RuntimeFailure):
    """A setting, signal or document that cannot be used."""

    errno = errno.EINVAL


class StartFailed(RuntimeFailure):
    """The container could not be started; everything was undone."""


class RuntimeCommandFailed(RuntimeFailure):
    """The OCI runtime refused a command on a running container."""


class StdinClosed(RuntimeFailure):
    """The process takes no standard input, or not any more."""

    errno = errno.EPIPE


class MountFailed(RuntimeFailure):
    """A root filesystem could not be mounted."""


class Unsupported(RuntimeFailure):
    """This machine lacks what the operation needs."""

    errno = errno.EOPNOTSUPP
