"""What a worker keeps between tasks that come back to the same batches, under a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

__all__ = ["Kept"]

T = TypeVar("T")


class Kept:
    """Values by key, those used last, up to `max_bytes`; what is dropped is made again."""

    def __init__(self, max_bytes: int) -> None:
        """Nothing is kept yet."""
        self._max_bytes = max_bytes
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
        while self._size_bytes > self._max_bytes and self._found:
            _, (_, dropped) = self._found.popitem(last=False)
            self._size_bytes -= dropped
        return value
