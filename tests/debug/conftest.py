"""Plans and exported folders of the small model, to be debugged."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans import LAYERS, write_mixed_plan
from safetensors.numpy import load_file, save_file

from lowprec.config import Config
from lowprec.export import export_plan
from lowprec.ops.linear import safe_input_bits
from lowprec.plan import Form, Plan, PlanFile, Precision, RowRange, write_plan
from lowprec.plan.layer_form import ClipRange, LayerForm, WeightScale
from lowprec.search import open_job

# Tables are fp32, fp16, int8, int4, int2, fp32. The codes of the last layer hold its inputs, which end near 4.
FITTED: dict[str, tuple[Precision, Form | None]] = {
    "layer:bottom.0": (Precision.BF16, None),
    "layer:bottom.2": (Precision.FP16, None),
    "layer:top.0": (Precision.INT8_DYNAMIC, LayerForm(WeightScale.CHANNEL, ClipRange.MSE, 0.05, safe_input_bits())),
    "layer:top.2": (Precision.INT8_STATIC, LayerForm(input_bits=7, input_scale=5 / 127, input_zero_point=0)),
}


# All rows of a batch are compared.
BATCHES = "traffic.batch_size=512"


@pytest.fixture
def planned(small_config: Callable[..., Config], tmp_path: Path) -> Callable[..., tuple[Config, PlanFile, Path]]:
    """A mixed plan: the config, what the plan file holds, and where it is."""

    def make(*overrides: str, layers: Mapping[str, Any] | None = FITTED) -> tuple[Config, PlanFile, Path]:
        config = small_config(BATCHES, *([LAYERS] if layers else []), *overrides)
        return config, write_mixed_plan(config, tmp_path / "plan.json", layers), tmp_path / "plan.json"

    return make


@pytest.fixture
def served(planned: Callable[..., tuple[Config, PlanFile, Path]], tmp_path: Path) -> Callable[..., Any]:
    """The same exported: the config, the plan, and the folder."""

    def make(*overrides: str, layers: Mapping[str, Any] | None = FITTED) -> tuple[Config, PlanFile, Path]:
        config, file, path = planned(*overrides, layers=layers)
        return config, file, export_plan(config, path, tmp_path / "served").folder

    return make


@pytest.fixture
def uniform(small_config: Callable[..., Config], tmp_path: Path) -> Callable[..., tuple[Config, PlanFile, Path]]:
    """A plan with one precision for all tables but some."""

    def make(precision: Precision, *overrides: str, **tables: Precision) -> tuple[Config, PlanFile, Path]:
        config = small_config(BATCHES, *overrides)
        job = open_job(config)
        chosen = {f"table:{name}": at for name, at in tables.items()}
        plan = Plan.uniform(job.units, precision).replace(chosen)
        ranges = {unit: RowRange.MSE for unit, at in plan.items() if at.is_rowwise}
        size = job.space.size_bytes(plan)
        file = PlanFile(plan, config.model.factory, job.checkpoint_sha256, size, row_ranges=ranges)
        path = tmp_path / "uniform.json"
        write_plan(file, path)
        return config, file, path

    return make


@pytest.fixture
def changed_checkpoint(small_folder: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], str]:
    """The override of a config whose checkpoint is the small one after a change."""

    def make(change: Callable[[dict[str, Any]], None]) -> str:
        weights = {name: weight.copy() for name, weight in load_file(small_folder / "model.safetensors").items()}
        change(weights)
        path = tmp_path / "changed.safetensors"
        save_file({name: np.ascontiguousarray(weight) for name, weight in weights.items()}, path)
        return f"model.checkpoint={path}"

    return make


@pytest.fixture
def often(small_config: Callable[..., Config]) -> Callable[[str], int]:
    """The row of a feature's table that the confirm window asks for most."""

    def row(feature: str) -> int:
        window = open_job(small_config(BATCHES)).window("confirm")
        ids = np.concatenate([window.batch(k).sparse[feature].values for k in range(window.num_batches)])
        return int(np.bincount(ids).argmax())

    return row
