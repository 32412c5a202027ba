"""What a refused pull takes away again.

The content of an image comes into the store before it is known whether the image is good. When
it is refused, what came with it goes, but for what somebody else has use for by now: an image
that is here, another pull under way, or a container whose files lie on those layers. A pull that
the network or its caller ended leaves what has arrived to the next attempt.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import trio

from store.cas import Digest
from store.errors import BlobNotFound, PullCancelled, RegistryError, StoreError, storage
from store.images import Image
from store.store import Store
from store.transfer import to_end

log = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What a digest can stand for in the store; ``remove`` may raise BlobNotFound."""

    is_here: Callable[[Digest], bool]
    remove: Callable[[Digest], None]


_Pieces = frozenset[tuple[_Kind, Digest]]


class _Wanted(NamedTuple):
    """What one pull under way wants to be in the store."""

    pieces: _Pieces
    stack: tuple[Digest, ...]


class Leftovers:
    """What came with the pulls under way. To be used from one trio run."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._blobs = (
            _Kind(store.cas.has_partial, store.cas.drop_partial),
            _Kind(store.cas.contains, store.cas.delete),
        )
        self._layers = _Kind(lambda diff_id: bool(store.layers.get(diff_id)), store.layers.remove)
        self._under_way: list[_Wanted] = []
        # What was not here when the first of those that want it began.
        self._new: _Pieces = frozenset()
        # Nobody may begin to count on what is being taken away.
        self._lock = trio.Lock()

    @asynccontextmanager
    async def gone_if_refused(
        self, image: Image, documents: Iterable[Digest]
    ) -> AsyncIterator[None]:
        """Bring the content of an image into the store in this block, and record the image.

        What the block finds in the store stays there as long as it runs. When it ends with a
        refusal, what was not there before goes.

        Args:
            image: what will be recorded.
            documents: blobs that come with it and that the record doesn't name.
        """
        blobs = (*documents, *image.blobs())
        wanted = _Wanted(self._pieces(blobs, image.diff_ids), image.diff_ids)
        async with self._lock:
            missing = await to_end(lambda: _missing(wanted.pieces))
            self._under_way.append(wanted)
            self._new |= missing
        try:
            yield
        except StoreError as error:
            if _is_refusal(error):
                with trio.CancelScope(shield=True):
                    await self._take_away(wanted)
            raise
        finally:
            self._under_way.remove(wanted)
            self._new &= frozenset().union(*(other.pieces for other in self._under_way))

    def _pieces(self, blobs: Iterable[Digest], diff_ids: Iterable[Digest]) -> _Pieces:
        pieces = {(kind, blob) for blob in blobs for kind in self._blobs}
        return frozenset(pieces | {(self._layers, diff_id) for diff_id in diff_ids})

    async def _take_away(self, wanted: _Wanted) -> None:
        async with self._lock:
            # Before the images: those that end from now on will be among them.
            others = [other for other in self._under_way if other is not wanted]
            new = self._new & wanted.pieces
            try:
                await to_end(lambda: self._remove(new, wanted.stack, others))
            except StoreError as error:
                log.warning("what came with a refused image stays: %s", error.sentence)

    def _remove(self, new: _Pieces, stack: Sequence[Digest], others: Sequence[_Wanted]) -> None:
        images = list(self._store.images)
        stacks = [other.stack for other in others]
        stacks += [image.diff_ids for image in images]
        stacks += self._store.images.pinned()
        needed = self._pieces(
            (blob for image in images for blob in image.blobs()),
            (diff_id for needed in stacks for diff_id in needed),
        ).union(*(other.pieces for other in others))
        # Blobs first: on a full disk there has to be room to remove a layer in.
        for kind in (*self._blobs, self._layers):
            for digest in (digest for of, digest in new - needed if of is kind):
                with suppress(BlobNotFound), storage(f"removing content from {self._store.root}"):
                    kind.remove(digest)
        self._store.layers.remove_chains(stack, stacks)


def _missing(pieces: _Pieces) -> _Pieces:
    return frozenset(piece for piece in pieces if not piece[0].is_here(piece[1]))


def _is_refusal(error: StoreError) -> bool:
    """Whether the next attempt would end the same way, as far as one can tell."""
    if isinstance(error, RegistryError):
        return not error.transient
    return not isinstance(error, PullCancelled)
