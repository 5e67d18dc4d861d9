"""Whether the debugger names the culprit first, and what it takes.

60 faults in turn, each on the trained demo model at a random plan of tables (int8, int4, int2) and layers (bf16, int8
with calibrated or dynamic inputs), in a unit drawn at random. In an exported folder, whose hashes fit what is wrong: a
table whose rows have the scales of others, a range of a tenth of the rows with random codes, a table of another
snapshot (each value off by half the table's standard deviation), an output channel of a layer that is zero, a zero
point that is off by a quarter of its codes. In the checkpoint: an output channel 200 times as large as before (and its
successor as much smaller, so that the fp32 model is the same) in a layer whose channels share one scale, and a row
that traffic asks for with a value of 1e8, whose fp16 scale overflows.

Prints one JSON object as its last line: `top1`, the share of faults whose unit is the first suspect, by kind as well;
`top1_by_share`, where only shares of the gap are looked at, without comparing what is served with what the plan makes;
`blamed_elsewhere`, how many of the `healthy_units` beside the culprits were said to be broken, to differ or not to fit
(a larger channel also makes inputs of the layer after it larger than they were calibrated for); `passes`, the time that
the debugger takes over that of one fp32 pass over its sample, and how far it varies.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_model import demo_config
from safetensors.numpy import load_file, save_file
from sizes import sized

from lowprec.config import Config
from lowprec.debug.debug_run import debug_implementation, sample_of
from lowprec.debug.implementations import open_implementation
from lowprec.debug.report import DebugReport
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.export import export_plan
from lowprec.models.adapter import inputs_of
from lowprec.plan import Plan, PlanFile, Precision, RowRange, write_plan
from lowprec.plan.layer_form import LayerForm, WeightScale
from lowprec.search import SearchJob, open_job
from lowprec.search.space.layer_forms import fitted_forms

sys.path.append(str(Path(__file__).parents[1] / "support"))
import planted_faults as faults

LAYERS = "space.layers=[fp32, bf16, int8_dynamic, int8_static]"
SETTINGS = (LAYERS, "evaluation.num_workers=0")
NUM_FAULTS, NUM_EXAMPLES = sized((60, 32_768), (2, 2_048))
# Each scales an output channel of the first and the matching input of the second.
FOLLOWED_BY = {"bottom.0": "bottom.2", "top.0": "top.2", "top.2": "top.4"}


@dataclass(frozen=True)
class Trial:
    """A config and what to debug, and the unit whose fault it is."""

    config: Config
    where: Path
    culprit: str


class Planter:
    """Plants faults in units drawn at random."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.folder, self.rng = folder, rng
        self.config = demo_config(*SETTINGS)
        self.job = open_job(self.config)
        assert self.config.space.layers is not None
        workers = LocalWorkers(self.job.spec, self.job.adapter)
        window = self.job.window("search")
        self.forms = fitted_forms(workers, window, self.job.space, self.config.space.layers, batches_per_task=4)
        self.hits = self._hits()

    def plan(self, path: Path, job: SearchJob, **fixed: tuple[Precision, LayerForm | None]) -> PlanFile:
        """A random plan, but for some units."""
        tables = [Precision.INT8, Precision.INT4, Precision.INT2]
        layers = [Precision.BF16, Precision.INT8_DYNAMIC, Precision.INT8_STATIC]
        chosen, forms = {}, {}
        for unit in job.units:
            precision = (layers if unit.is_layer else tables)[int(self.rng.integers(3))]
            form = self.forms.get((unit.name, precision))
            if unit.name in fixed:
                precision, form = fixed[unit.name]
            chosen[unit.name] = precision
            if form is not None:
                forms[unit.name] = form
        plan = Plan(chosen)
        ranges = {unit: RowRange.MSE for unit, p in plan.items() if p.is_rowwise}
        size, factory = job.space.size_bytes(plan), self.config.model.factory
        file = PlanFile(plan, factory, job.checkpoint_sha256, size, row_ranges=ranges, layer_forms=forms)
        write_plan(file, path)
        return file

    def served(self, k: int) -> tuple[Path, PlanFile]:
        """A folder with a random plan."""
        path = self.folder / f"plan-{k}.json"
        file = self.plan(path, self.job)
        export_plan(self.config, path, self.folder / f"served-{k}")
        return self.folder / f"served-{k}", file

    def swapped_scales(self, k: int) -> Trial:
        folder, _ = self.served(k)
        table = self._table()
        faults.swapped_scales(folder, table, self.rng)
        return Trial(self.config, folder, table)

    def corrupted_rows(self, k: int) -> Trial:
        folder, _ = self.served(k)
        table = self._table()
        num_rows = self.job.adapter.shapes[table][0]
        count = num_rows // 10
        faults.corrupted_rows(folder, table, self.rng, int(self.rng.integers(num_rows - count)), count)
        return Trial(self.config, folder, table)

    def stale_table(self, k: int) -> Trial:
        folder, file = self.served(k)
        table = self._table()
        weight = self.job.adapter.weights[table].numpy()
        noise = self.rng.standard_normal(weight.shape).astype(np.float32)
        faults.stale_table(folder, table, weight + np.float32(0.5) * weight.std() * noise, file.row_range(table))
        return Trial(self.config, folder, table)

    def dead_channel(self, k: int) -> Trial:
        folder, _ = self.served(k)
        layer = self._layer(lambda _: True)
        faults.dead_channel(folder, layer, int(self.rng.integers(self._num_channels(layer))))
        return Trial(self.config, folder, layer)

    def wrong_zero_point(self, k: int) -> Trial:
        layer = self._layer(lambda _: True)
        path = self.folder / f"plan-{k}.json"
        form = self._int8_form(layer, Precision.INT8_STATIC)
        self.plan(path, self.job, **{layer: (Precision.INT8_STATIC, form)})
        export_plan(self.config, path, self.folder / f"served-{k}")
        faults.wrong_zero_point(self.folder / f"served-{k}", layer, 2**form.input_bits // 4)
        return Trial(self.config, self.folder / f"served-{k}", layer)

    def outlier_channel(self, k: int) -> Trial:
        layer = self._layer(lambda name: name.removeprefix("layer:") in FOLLOWED_BY)
        path = layer.removeprefix("layer:")
        weights = load_file(self.config.model.checkpoint)
        channel, factor = int(self.rng.integers(self._num_channels(layer))), np.float32(200)
        weights[f"{path}.weight"][channel] *= factor
        weights[f"{path}.bias"][channel] *= factor
        weights[f"{FOLLOWED_BY[path]}.weight"][:, channel] /= factor
        form = replace(self._int8_form(layer, Precision.INT8_DYNAMIC), weights=WeightScale.TENSOR, outliers=0.0)
        return self._changed(k, weights, layer, {layer: (Precision.INT8_DYNAMIC, form)})

    def overflowing_row(self, k: int) -> Trial:
        table = self._table()
        weights = load_file(self.config.model.checkpoint)
        asked = np.flatnonzero(self.hits[table] >= 3)
        row = int(asked[self.rng.integers(len(asked))])
        weights[self.job.adapter.weight_names[table]][row, 0] = 1e8
        return self._changed(k, weights, table, {})

    def _int8_form(self, layer: str, precision: Precision) -> LayerForm:
        form = self.forms[layer, precision]
        assert isinstance(form, LayerForm)
        return form

    def _changed(self, k: int, weights: dict[str, Any], culprit: str, fixed: dict[str, Any]) -> Trial:
        path = self.folder / f"model-{k}.safetensors"
        save_file({name: np.ascontiguousarray(w) for name, w in weights.items()}, path)
        config = self.config.with_(model={"checkpoint": str(path)})
        self.plan(self.folder / f"plan-{k}.json", open_job(config), **fixed)
        return Trial(config, self.folder / f"plan-{k}.json", culprit)

    def _table(self) -> str:
        tables = [unit.name for unit in self.job.adapter.units]
        return tables[int(self.rng.integers(len(tables)))]

    def _layer(self, wanted: Callable[[str], bool]) -> str:
        layers = [unit.name for unit in self.job.adapter.layers.units if wanted(unit.name)]
        return layers[int(self.rng.integers(len(layers)))]

    def _num_channels(self, layer: str) -> int:
        return len(self.job.adapter.layers.weights[layer])

    def _hits(self) -> dict[str, np.ndarray]:
        """How often the sample asks for each row."""
        found = {name: np.zeros(rows, np.int64) for name, (rows, _) in self.job.adapter.shapes.items()}
        for read in sample_of(self.job, "confirm", NUM_EXAMPLES):
            for call in self.job.adapter.trace_lookups(inputs_of(read())):
                found[call.table] += np.bincount(call.indices.numpy(), minlength=len(found[call.table]))
        return found


KINDS = (
    Planter.swapped_scales,
    Planter.corrupted_rows,
    Planter.stale_table,
    Planter.dead_channel,
    Planter.wrong_zero_point,
    Planter.outlier_channel,
    Planter.overflowing_row,
)


def debugged(trial: Trial) -> tuple[DebugReport, float]:
    """The report, and the time that it took over that of an fp32 pass over the same batches, twice in turns.

    Batches have been read before.
    """
    job, arm = open_implementation(open_job(trial.config), trial.where)
    batches = sample_of(job, "confirm", NUM_EXAMPLES)
    inputs = [inputs_of(read()) for read in batches]
    torch.set_num_threads(job.spec.threads)
    job.adapter.reference(inputs[0])
    passing = debugging = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for of_batch in inputs:
            job.adapter.reference(of_batch)
        passing += time.perf_counter() - began
        began = time.perf_counter()
        report = debug_implementation(job, arm, batches, "confirm")
        debugging += time.perf_counter() - began
    return report, debugging / passing


def main() -> None:
    passes, is_first, is_first_by_share = [], [], []
    num_others = num_blamed = 0
    with tempfile.TemporaryDirectory() as name:
        planter = Planter(Path(name), np.random.default_rng(0))
        for k in range(NUM_FAULTS):
            kind = KINDS[k % len(KINDS)]
            trial = kind(planter, k)
            report, took = debugged(trial)
            named = [suspect.unit for suspect in report.suspects]
            by_share = max(report.units, key=lambda unit: (unit.is_broken, unit.share)).unit
            others = [unit for unit in report.units if unit.unit != trial.culprit]
            num_others += len(others)
            num_blamed += sum(bool(unit.is_broken or unit.differs or unit.misfits) for unit in others)
            passes.append(took)
            is_first.append((kind.__name__, bool(named) and named[0] == trial.culprit))
            is_first_by_share.append(by_share == trial.culprit)
            position = named.index(trial.culprit) + 1 if trial.culprit in named else None
            print(f"{k} {kind.__name__} {trial.culprit}: suspect {position}, {took:.2f} passes", flush=True)
            for left in Path(name).glob(f"*-{k}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    by_kind = {kind.__name__: [found for of, found in is_first if of == kind.__name__] for kind in KINDS}
    quartiles = statistics.quantiles(passes, n=20)
    print(
        json.dumps(
            {
                "top1": round(sum(found for _, found in is_first) / NUM_FAULTS, 3),
                "passes": round(statistics.median(passes), 2),
                "passes_5_to_95_percent": [round(quartiles[0], 2), round(quartiles[-1], 2)],
                "blamed_elsewhere": num_blamed,
                "healthy_units": num_others,
                "top1_by_share": round(sum(is_first_by_share) / NUM_FAULTS, 3),
                "top1_by_kind": {name: f"{sum(found)}/{len(found)}" for name, found in by_kind.items()},
                "num_examples": NUM_EXAMPLES,
            }
        )
    )


if __name__ == "__main__":
    main()
