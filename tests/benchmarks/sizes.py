"""Sizes of benchmarks: with SMOKE=1 in the environment each takes seconds, and its figures mean nothing."""

import os
from typing import TypeVar

T = TypeVar("T")
IS_SMOKE = os.environ.get("SMOKE") == "1"


def sized(full: T, smoke: T) -> T:
    """The size of a benchmark, or the one that only shows that it runs."""
    return smoke if IS_SMOKE else full
