"""Base class of all sections of the config."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

__all__ = ["Section", "no_boolean"]


class Section(BaseModel):
    """Keys that are all known, and numbers that are numbers; a config does not change once it is read.

    NaN, infinities and booleans are refused for every numeric key. pydantic would convert a boolean to 0 or 1, and YAML
    reads `yes`, `no`, `on` and `off` as booleans.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        return no_boolean(value) if kinds & {int, float} and bool not in kinds else value


def no_boolean(value: Any) -> Any:
    """The value of a numeric key, or a list of such, as it is; raises `ValueError` where it is a boolean."""
    if any(isinstance(item, bool) for item in (value if isinstance(value, (list, tuple)) else (value,))):
        raise ValueError("input should be a number, not a boolean (in YAML also yes, no, on, off)")
    return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    inner = get_args(annotation)
    if not inner:
        return {annotation, type(annotation)}  # an item of a `Literal` is a value
    return {annotation}.union(*(_kinds(part) for part in inner))
