"""The map of a sparse file in GNU format 1.0: decimal lines before the content."""

from store.tar_header import BLOCK, SPECIAL_MAX, Segments, check_count, decimal

# What a line may be at most: the longest number that ``decimal`` takes.
_LINE = 20


class SparseMap:
    """Takes a map block by block, each byte once: the count, then offset and length of each.

    Args:
        name: the file's, for messages.
    """

    def __init__(self, name: bytes) -> None:
        self._name = name
        self._numbers: list[int] = []
        self._wanted = 1
        self._torn = b""  # a line that the last block did not end
        self._taken = 0

    def take(self, block: bytes) -> Segments | None:
        """Read a block; the segments once they are complete, the rest of it is padding.

        Raises:
            ValueError: it is no map, or a longer one than can be right.
            LimitExceeded: it has too many segments.
        """
        self._taken += BLOCK
        *lines, self._torn = (self._torn + block).split(b"\n")
        if not self._numbers and lines:
            count = decimal(lines.pop(0))
            check_count(count, self._name)
            self._wanted += 2 * count
            self._numbers.append(count)
        self._numbers += map(decimal, lines[: self._wanted - len(self._numbers)])
        if self._numbers and len(self._numbers) == self._wanted:
            return list(zip(self._numbers[1::2], self._numbers[2::2], strict=True))
        if len(self._torn) > _LINE or self._taken > SPECIAL_MAX:
            raise ValueError
        return None
