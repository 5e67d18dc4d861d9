"""A cache that is bounded by bytes: it drops what was used longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

__all__ = ["ByteLru"]

T = TypeVar("T")


class ByteLru:
    """Values by key, those used last, up to `max_bytes`; what is dropped is made again.

    `cachetools.LRUCache` with `getsizeof` refuses a value that is larger than the cache; here it is made and returned.
    """

    def __init__(self, max_bytes: int, *, keep: int = 0) -> None:
        """Nothing is there yet. keep: how many values stay, whatever their size."""
        self._max_bytes, self._keep = max_bytes, keep
        self._size_bytes = 0
        self._found: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T], size_bytes: Callable[[T], int]) -> T:
        """The value of `key`, made where it is not there; a key stands for one type of value."""
        if key in self._found:
            self._found.move_to_end(key)
            value: T = self._found[key][0]  # type: ignore[assignment]
            return value
        value = make()
        self._found[key] = (value, size_bytes(value))
        self._size_bytes += self._found[key][1]
        while self._size_bytes > self._max_bytes and len(self._found) > self._keep:
            _, (_, dropped) = self._found.popitem(last=False)
            self._size_bytes -= dropped
        return value
