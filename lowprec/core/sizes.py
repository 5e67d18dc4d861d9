"""Sizes, rates and durations as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

__all__ = ["bytes_text", "bytes_text_above", "counted", "digits_apart", "parse_bytes", "parse_rate", "parse_seconds"]

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def bytes_text(size: float, *, digits: int = 3) -> str:
    """Bytes in the unit that keeps three digits before the point, with so many digits in all."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.{digits}g} {unit}"
        size /= 1000
    return f"{size:,.{digits + 1}g} TB"


def digits_apart(sizes: Iterable[float]) -> int:
    """The digits, 3 or more, with which `bytes_text` writes different sizes differently."""
    distinct = set(sizes)
    enough = (n for n in range(3, 15) if len({bytes_text(size, digits=n) for size in distinct}) == len(distinct))
    return next(enough, 15)


def bytes_text_above(size: float) -> str:
    """A size that is no smaller, as people give it."""
    unit = 10 ** max(0, 3 * ((len(str(int(size))) - 1) // 3))
    digits = 100 if size / unit < 10 else 10 if size / unit < 100 else 1
    return bytes_text(math.ceil(size / unit * digits) / digits * unit)


def counted(number: int, what: str) -> str:
    """A number of things: `1 thread`, `2,048 threads`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def parse_bytes(text: str) -> int:
    """Bytes of "8GB", "64GiB", "500MB" or a number; raises `ValueError` saying what was expected."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?", text.strip())
    if not match or float(match[1]) == 0:
        raise ValueError("expected a size such as 8GB, 64GiB or 500MB")
    return int(float(match[1]) * _FACTORS[match[2] or ""])


def parse_rate(text: str) -> float:
    """Bytes per second of "10Gbit" or "1.2GB/s"; raises `ValueError` saying what was expected."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(bit|B)(?:/s)?", text.strip())
    if not match or float(match[1]) == 0:
        raise ValueError("expected a rate such as 10Gbit or 1.2GB/s")
    return float(match[1]) * _FACTORS[match[2]] / (8 if match[3] == "bit" else 1)


def parse_seconds(text: str, *, zero: bool = False) -> float:
    """Seconds of "90s", "15m", "2h", "7d" or a number, `zero` allows 0; raises `ValueError` with what is wanted."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|d)?", text)
    if not match or (float(match[1]) == 0 and not zero):
        raise ValueError("expected a duration such as 90s, 15m, 2h or 7d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}[match[2]]
