"""Plan files for the small model, mixed over tables and layers."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from lowprec.config import Config
from lowprec.ops.linear import safe_input_bits
from lowprec.plan import TABLE_PRECISIONS, Form, Plan, PlanFile, Precision, RowRange, write_plan
from lowprec.plan.layer_form import ClipRange, LayerForm, WeightScale
from lowprec.search import open_job

LAYERS = "space.layers=[fp32, fp16, bf16, int8_dynamic, int8_static]"
LOW_LAYERS: dict[str, tuple[Precision, Form | None]] = {
    "layer:bottom.0": (Precision.BF16, None),
    "layer:bottom.2": (Precision.FP16, None),
    "layer:top.0": (Precision.INT8_DYNAMIC, LayerForm(WeightScale.CHANNEL, ClipRange.MSE, 0.05, safe_input_bits())),
    "layer:top.2": (
        Precision.INT8_STATIC,
        LayerForm(WeightScale.TENSOR, ClipRange.MINMAX, input_bits=7, input_scale=0.02, input_zero_point=3),
    ),
}


def write_mixed_plan(
    config: Config, path: Path, layers: Mapping[str, tuple[Precision, Form | None]] | None = None
) -> PlanFile:
    """A plan in which the precisions of tables take turns, as do minmax and mse; layers are fp32 but for some."""
    job = open_job(config)
    precisions, ranges = cycle(TABLE_PRECISIONS), cycle(RowRange)
    chosen = {u.name: Precision.FP32 if u.is_layer else next(precisions) for u in job.units}
    chosen |= {unit: precision for unit, (precision, _) in (layers or {}).items()}
    plan = Plan(chosen)
    file = PlanFile(
        plan=plan,
        model=config.model.factory,
        checkpoint_sha256=job.checkpoint_sha256,
        size_bytes=job.space.size_bytes(plan),
        row_ranges={unit: next(ranges) for unit, precision in plan.items() if precision.is_rowwise},
        layer_forms={unit: form for unit, (_, form) in (layers or {}).items() if form},
        evidence={"verdict": "certified"},
    )
    write_plan(file, path)
    return file
