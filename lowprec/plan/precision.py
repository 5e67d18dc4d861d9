"""The formats of rows and weights, and how rows choose their range."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lowprec.core.errors import PlanError

__all__ = [
    "LAYER_PRECISIONS",
    "TABLE_PRECISIONS",
    "Precision",
    "RowRange",
    "precision_counts",
    "precision_texts",
    "precisions_of",
]


class Precision(enum.StrEnum):
    """Format of a table's rows, or of a layer's weights and arithmetic, from the most to the least exact.

    `TABLE_PRECISIONS` and `LAYER_PRECISIONS` are those of each.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8_DYNAMIC = "int8_dynamic"
    """A layer's weights int8, its inputs int8 by the range of each batch."""
    INT8_STATIC = "int8_static"
    """A layer's weights int8, its inputs int8 by a range that was calibrated."""
    EMULATED = "emulated"
    """A layer in the arithmetic of an accelerator, as `space.arithmetic` describes it."""
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"

    @property
    def bits(self) -> int:
        """Bits of one stored value; of an emulated one its arithmetic decides."""
        return int(self.value.partition("_")[0].lstrip("bfpint"))

    @property
    def is_rowwise(self) -> bool:
        """Whether a table's row carries its own fp16 scale and bias."""
        return self in (Precision.INT8, Precision.INT4, Precision.INT2)

    @classmethod
    def parse(cls, text: str, *, where: str, among: Sequence[Precision] | None = None) -> Precision:
        """The precision called `text`, one of a table or of those in `among`; raises `PlanError` naming `where`."""
        allowed = TABLE_PRECISIONS if among is None else among
        if text not in allowed:
            raise PlanError(f'{where}: precision must be one of {", ".join(allowed)}; got "{text}"')
        return cls(text)


TABLE_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT4, Precision.INT2)
LAYER_PRECISIONS = (
    Precision.FP32,
    Precision.FP16,
    Precision.BF16,
    Precision.INT8_DYNAMIC,
    Precision.INT8_STATIC,
    Precision.EMULATED,
)


class RowRange(enum.StrEnum):
    """How a row-wise precision chooses the scale and bias of a row; the bytes are the same."""

    MINMAX = "minmax"
    """From the smallest to the largest value, as FBGEMM's `FloatToFusedNBitRowwiseQuantizedSBHalf` has it.

    At int8, FBGEMM's `quantize_embs`, which TorchRec uses, stores other rows: codes for a scale and bias in fp32
    (`FloatToFused8BitRowwiseQuantized`), which are rounded to fp16 afterwards.
    """
    MSE = "mse"
    """A squared error near the least, never above that of `minmax`."""

    @classmethod
    def parse(cls, text: str, *, where: str) -> RowRange:
        """The range called `text`; raises `PlanError` naming `where`."""
        try:
            return cls(text)
        except ValueError:
            raise PlanError(f'{where}: range must be one of {", ".join(cls)}; got "{text}"') from None


def precisions_of(pattern: str) -> tuple[Precision, ...]:
    """The precisions that units can have whose name matches a pattern: those of its kind, or all."""
    kinds = {"table": TABLE_PRECISIONS, "layer": LAYER_PRECISIONS}
    return kinds.get(pattern.partition(":")[0], tuple(Precision))


def precision_counts(precisions: Iterable[str]) -> str:
    """How many units have each precision, the most frequent first: `int4:13 int8:8`."""
    counts = Counter(precisions)
    return " ".join(f"{precision}:{count}" for precision, count in sorted(counts.items(), key=lambda c: (-c[1], c[0])))


def precision_texts(plans: Sequence[Mapping[str, str]]) -> list[str]:
    """How many units of each plan have each precision; where plans count alike, the units in which they differ too.

    The first of those that count alike stands as it is; the others name up to three units that differ from it.
    """
    first: dict[str, Mapping[str, str]] = {}
    texts = []
    for plan in plans:
        counts = precision_counts(plan.values())
        other = first.setdefault(counts, plan)
        differing = [f"{unit} {precision}" for unit, precision in plan.items() if other[unit] != precision]
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        texts.append(f"{counts} ({', '.join(differing[:3])}{more})" if differing else counts)
    return texts
