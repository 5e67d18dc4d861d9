"""The section `space`: allowed precisions of units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lowprec.core.section import Section
from lowprec.plan import LAYER_PRECISIONS, TABLE_PRECISIONS, Precision, RowRange, Unit, precisions_of
from lowprec.plan.cost import LayerStorage, ModelStorage
from lowprec.plan.layer_form import Arithmetic, ClipRange, FloatFormat, WeightScale

__all__ = ["ArithmeticConfig", "LayersConfig", "SpaceConfig", "UnitRule"]


class UnitRule(Section):
    """What the units whose name matches the pattern may be. A later rule wins over an earlier one."""

    match: str
    precisions: tuple[Precision, ...] | None = None
    fixed: Precision | None = None

    @field_validator("precisions", "fixed", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        return _of_kind(value, precisions_of(str(info.data.get("match", ""))))

    @model_validator(mode="after")
    def _one_of_both(self) -> UnitRule:
        if (self.precisions is None) == (self.fixed is None):
            raise ValueError("give either precisions or fixed")
        if self.precisions is not None and not self.precisions:
            raise ValueError("precisions must not be empty")
        return self


class ArithmeticConfig(Section):
    """The arithmetic of an accelerator; see `lowprec.plan.layer_form.Arithmetic`."""

    inputs: FloatFormat = FloatFormat.FP16
    weights: FloatFormat = FloatFormat.FP16
    accumulate: FloatFormat = FloatFormat.FP16
    output: FloatFormat = FloatFormat.FP16
    block: Annotated[int, Field(gt=0)] = 16

    def to_arithmetic(self) -> Arithmetic:
        """The same for kernels."""
        return Arithmetic(**self.model_dump())


class LayersConfig(Section):
    """What the FC layers may be, and the forms of int8 that are tried for each of them.

    weights: one scale for each output channel or for the tensor; ranges: which values codes reach to; outliers: shares
    of weights kept in fp32; input_bits: 8, or 7 for CPUs whose int8 instructions overflow at 8 (default: what this CPU
    needs). The form that changes predictions least on `calibration_examples` is taken.
    """

    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)]
    weights: Annotated[tuple[WeightScale, ...], Field(min_length=1)] = tuple(WeightScale)
    ranges: Annotated[tuple[ClipRange, ...], Field(min_length=1)] = tuple(ClipRange)
    outliers: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (0.0, 0.001)
    input_bits: Literal[7, 8] | None = None
    calibration_examples: Annotated[int, Field(gt=0)] = 8192
    arithmetic: ArithmeticConfig | None = None

    _kinds = field_validator("precisions", mode="before")(lambda value: _of_kind(value, LAYER_PRECISIONS))

    @model_validator(mode="after")
    def _emulation_is_described(self) -> LayersConfig:
        if (Precision.EMULATED in self.precisions) != (self.arithmetic is not None):
            raise ValueError(
                "precision emulated and arithmetic come together: one says that, the other what, as in "
                "{precisions: [fp32, emulated], arithmetic: {accumulate: fp16, block: 16}}"
            )
        return self


class SpaceConfig(Section):
    """The plans that a search may choose from, and how row-wise precisions choose the range of a row.

    precisions: of tables. layers: of FC layers, a list of precisions or a section; left out, they stay fp32 and are no
    units.
    """

    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = TABLE_PRECISIONS
    layers: LayersConfig | None = None
    row_range: RowRange = RowRange.MSE
    row_alignment: Annotated[int, Field(gt=0)] = 1
    units: tuple[UnitRule, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()

    _kinds = field_validator("precisions", mode="before")(lambda value: _of_kind(value, TABLE_PRECISIONS))

    @property
    def low_table_precisions(self) -> tuple[Precision, ...]:
        """Those below fp32 that any table may have, most exact first."""
        named = {*self.precisions, *(p for rule in self.units for p in (rule.fixed, *(rule.precisions or ())))}
        return tuple(p for p in TABLE_PRECISIONS if p in named and p is not Precision.FP32)

    def storage(self, units: Iterable[Unit]) -> ModelStorage:
        """What decides the bytes of the units of a model."""
        if self.layers is None:
            return ModelStorage(tuple(units), self.row_alignment)
        arithmetic = self.layers.arithmetic
        bits = 32 if arithmetic is not None and arithmetic.weights is FloatFormat.FP32 else 16
        return ModelStorage(tuple(units), self.row_alignment, LayerStorage(max(self.layers.outliers), bits))

    @field_validator("layers", mode="before")
    @classmethod
    def _a_list_is_of_precisions(cls, value: Any) -> Any:
        return {"precisions": value} if isinstance(value, (list, tuple)) else value


def _of_kind(value: Any, among: tuple[Precision, ...]) -> Any:
    """The precision, or the list of them, as it is; raises `ValueError` naming those that units of a kind can have."""
    names = value if isinstance(value, (list, tuple)) else [value]
    wrong = [name for name in names if isinstance(name, str) and name not in among]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} is not among {', '.join(among)}")
    return value
