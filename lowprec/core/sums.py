"""Addition of dataclasses, field by field."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["add_fields"]

T = TypeVar("T")


def add_fields(a: T, b: T) -> T:
    """The dataclass with the sum of each field."""
    names = [field.name for field in fields(a)]  # type: ignore[arg-type]
    added: dict[str, Any] = {name: getattr(a, name) + getattr(b, name) for name in names}
    return type(a)(**added)
