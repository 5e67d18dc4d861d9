"""Storage and arithmetic of an FC layer at a precision."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lowprec.core.errors import PlanError

__all__ = ["Arithmetic", "ClipRange", "FloatFormat", "LayerForm", "WeightScale"]


class WeightScale(enum.StrEnum):
    """What shares one scale of int8 weights."""

    CHANNEL = "channel"
    """Every output channel has its own."""
    TENSOR = "tensor"
    """The layer has one."""


class ClipRange(enum.StrEnum):
    """Which values int8 codes reach to; what lies outside is clipped."""

    MINMAX = "minmax"
    """All of them."""
    MSE = "mse"
    """Those within the range of least squared error."""
    PERCENTILE = "percentile"
    """All but a few in a thousand: see `lowprec.ops.clip.PERCENTILE`."""


class FloatFormat(enum.StrEnum):
    """A floating-point format that emulated numbers are rounded to."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclass(frozen=True)
class LayerForm:
    """How the int8 form of a layer is made and computed.

    outliers: the share of weights, the largest ones, that a sparse fp32 part keeps beside the int8 one. input_bits: 8,
    or 7 for CPUs whose int8 instructions overflow at 8. input_scale, input_zero_point: of calibrated inputs; None where
    each batch decides (int8_dynamic).
    """

    weights: WeightScale = WeightScale.CHANNEL
    range: ClipRange = ClipRange.MINMAX
    outliers: float = 0.0
    input_bits: int = 8
    input_scale: float | None = None
    input_zero_point: int | None = None

    def __post_init__(self) -> None:
        if wrong := next(self._wrong(), None):
            raise PlanError(f"layer form: {wrong}")

    def _wrong(self) -> Iterator[str]:
        """What no layer can be made of, as a plan file may have it."""
        scale, zero_point = self.input_scale, self.input_zero_point
        if not (_is_number(self.outliers) and 0 <= self.outliers < 1):
            yield f"outliers must be a share from 0 to 1; got {self.outliers!r}"
        if self.input_bits not in (7, 8):
            yield f"input_bits must be 7 or 8; got {self.input_bits!r}"
        if (scale is None) != (zero_point is None):
            yield "input_scale and input_zero_point come together"
        if scale is not None and not (_is_number(scale) and 0 < scale < math.inf):
            yield f"input_scale must be a finite number above 0; got {scale!r}"
        if zero_point is not None and not (type(zero_point) is int and 0 <= zero_point < 1 << self.input_bits):
            yield f"input_zero_point must be a code of {self.input_bits} bits; got {zero_point!r}"

    @property
    def is_static(self) -> bool:
        """Whether inputs were calibrated."""
        return self.input_scale is not None

    def to_dict(self) -> dict[str, Any]:
        """The keys of a unit of `plan.json`; those of inputs only where they were calibrated."""
        found: dict[str, Any] = {
            "weights": str(self.weights),
            "range": str(self.range),
            "outliers": self.outliers,
            "input_bits": self.input_bits,
        }
        if self.is_static:
            found |= {"input_scale": self.input_scale, "input_zero_point": self.input_zero_point}
        return found

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any], *, where: str) -> LayerForm:
        """The inverse of `to_dict`; raises `PlanError` naming `where`."""
        if unknown := flat.keys() - {field.name for field in fields(cls)}:
            raise PlanError(f"{where}: an int8 layer has no {', '.join(sorted(unknown))}; take it out")
        try:
            return cls(**{**flat, "weights": WeightScale(flat["weights"]), "range": ClipRange(flat["range"])})
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from None
        except KeyError as error:
            raise PlanError(f"{where}: misses {error} of an int8 layer") from None
        except (TypeError, ValueError) as error:
            raise PlanError(f"{where}: is not the form of an int8 layer: {error}") from None

    def __str__(self) -> str:
        parts = [str(self.weights), str(self.range)]
        if self.outliers:
            parts.append(f"outliers {self.outliers:g}")
        return " ".join(parts)


@dataclass(frozen=True)
class Arithmetic:
    """The numbers of an accelerator that is emulated: what is rounded to which format, and when.

    Inputs and weights are rounded first. Products are fp32; `block` of them, in the order of input channels, are added
    in fp32, and each such sum is added to the accumulator, which is rounded to `accumulate` every time. The bias is
    added in fp32, and the result rounded to `output`. `block: 1` rounds after every addition.
    """

    inputs: FloatFormat = FloatFormat.FP16
    weights: FloatFormat = FloatFormat.FP16
    accumulate: FloatFormat = FloatFormat.FP16
    output: FloatFormat = FloatFormat.FP16
    block: int = 16

    def __post_init__(self) -> None:
        if self.block < 1:
            raise PlanError(f"arithmetic: block must be positive; got {self.block}")

    def to_dict(self) -> dict[str, Any]:
        """The key `arithmetic` of a unit of `plan.json`."""
        return {k: v if isinstance(v, int) else str(v) for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any], *, where: str) -> Arithmetic:
        """The inverse of `to_dict`; raises `PlanError` naming `where`."""
        try:
            formats = {k: FloatFormat(v) for k, v in flat.items() if k != "block"}
            return cls(**formats, block=int(flat["block"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{where}: does not describe an arithmetic: {error}") from None

    def __str__(self) -> str:
        return f"{self.inputs} x {self.weights}, sums of {self.block} in {self.accumulate}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
