"""Tables and layers together: does the proxy agree with what is exact, and what does the certified plan save?

100 random plans of the demo model over tables (fp32 to int2) and layers (fp32, fp16, bf16, int8 with dynamic and
calibrated inputs), on nearly all of the 450,000 examples that it was not trained on: where inputs are rounded coarsely
(7 bits without VNNI), what a layer's rounding has to do with the labels in a plan is another draw than when it was
measured alone, which only more examples make small. Then two searches on 250,000 of them, for the fewest bytes and for
the least latency by a calibration of this machine (quick grid, the model's own layers). Prints one JSON object as its
last line: `correlation` of the proxy's gap with the exact one, `kl_correlation` of the label-free gaps; bytes and
predicted latency of both certified plans, of fp32 and of int8 everywhere, with the exact gap of each on the confirm
window.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from demo_model import large_demo_config
from sizes import sized

from lowprec.config import Config
from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.workers.worker import LocalWorkers, Workers
from lowprec.latency.calibration_file import write_calibration
from lowprec.latency.measure import calibrate
from lowprec.ops.timing import default_grid
from lowprec.plan import LAYER_PRECISIONS, TABLE_PRECISIONS, Plan, Precision
from lowprec.search import SearchJob, open_job, run_search
from lowprec.search.record.describe import what_to_time
from lowprec.search.space.layer_forms import fitted_forms
from lowprec.storage import Location

NOT_TRAINED_ON = (
    "windows.search={start: 2026-01-06T12:00, end: 2026-01-10T23:00}",
    "windows.confirm={start: 2026-01-10T23:00}",
)
LAYERS = "space.layers=[fp32, fp16, bf16, int8_dynamic, int8_static]"
NUM_PLANS = sized(100, 3)


def fitted(config: Config) -> tuple[SearchJob, Workers]:
    """The job with the forms of its layers, and workers."""
    job = open_job(config)
    workers = LocalWorkers(job.spec, job.adapter)
    assert config.space.layers is not None
    forms = fitted_forms(workers, job.window("search"), job.space, config.space.layers, batches_per_task=4)
    return job.with_forms(forms), workers


def random_plans(job: SearchJob) -> list[Plan]:
    """Every unit at a random precision of its kind."""
    rng = np.random.default_rng(0)
    layers = [p for p in LAYER_PRECISIONS if p is not Precision.EMULATED]

    def drawn(is_layer: bool) -> Precision:
        among = layers if is_layer else TABLE_PRECISIONS
        return among[int(rng.integers(len(among)))]

    return [Plan({unit.name: drawn(unit.is_layer) for unit in job.units}) for _ in range(NUM_PLANS)]


def agreement() -> dict[str, float]:
    """How well the proxy predicts the exact gaps."""
    with tempfile.TemporaryDirectory() as folder:
        # A calibration keeps all choices: by bytes some would be ruled out.
        config = large_demo_config(LAYERS, *NOT_TRAINED_ON)
        job, workers = fitted(with_calibration(config, Path(folder), minimize="bytes"))
        profile = job.measure_profile(workers, "search", job.window("search"), quarantine=Location.of(folder)).profile
        plans = random_plans(job)
        exact = evaluate_plans(
            workers, job.window("search"), plans, forms=job.forms, confidence=0.95, batches_per_task=4
        ).metrics
    gap, kl = profile.gaps_pct(profile.selected(plans))
    assert all(np.isfinite(m.gap_pct) for m in exact)
    return {
        "correlation": float(np.corrcoef(gap, [m.gap_pct for m in exact])[0, 1]),
        "kl_correlation": float(np.corrcoef(kl, [m.kl_pct for m in exact])[0, 1]),
        "num_examples": job.window("search").num_rows,
        "kl_ratio": float(np.mean([m.kl_pct for m in exact]) / np.mean(kl)),
    }


def with_calibration(config: Config, folder: Path, minimize: str) -> Config:
    """The config with the times of its tables and layers on this machine."""
    dims, layers = what_to_time(config, 2048)
    path = folder / "calibration.json"
    if not path.exists():
        write_calibration(calibrate(default_grid(quick=True, dims=dims), layers), path)
    return config.with_(cost={"calibration": str(path), "minimize": minimize})


def savings() -> dict[str, dict[str, float]]:
    """The certified plans, the smallest and the fastest, beside fp32 and int8 everywhere."""
    plans: dict[str, Plan] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = large_demo_config(LAYERS, f"results.root={folder}", "search.budget=0.02")
        for name, minimize in {"smallest": "bytes", "fastest": "latency"}.items():
            config = with_calibration(config, Path(folder), minimize=minimize)
            outcome = run_search(config)
            assert outcome.verdict == "certified"
            plans[name] = outcome.recommendations[0].best.choice.trial.plan
        job, workers = fitted(config)
        plans["fp32"] = Plan.uniform(job.units, Precision.FP32)
        plans["int8"] = Plan({u.name: Precision.INT8_STATIC if u.is_layer else Precision.INT8 for u in job.units})
        found = evaluate_plans(
            workers, job.window("confirm"), list(plans.values()), forms=job.forms, confidence=0.95, batches_per_task=4
        )
        costs = job.search_costs(found.use)
    return {
        name: {
            "bytes": job.space.size_bytes(plan),
            "latency_ns": round(costs.plan_latency_ns(plan) or 0.0, 1),
            "gap_pct": round(metrics.gap_pct, 4),
            "gap_upper_pct": round(metrics.gap_interval_pct.upper, 4),
        }
        for (name, plan), metrics in zip(plans.items(), found.metrics, strict=True)
    }


def main() -> None:
    torch.set_num_threads(1)
    found = {name: round(value, 4) for name, value in agreement().items()}
    print(json.dumps(found), flush=True)
    print(json.dumps({**found, "plans": savings(), "num_plans": NUM_PLANS}))


if __name__ == "__main__":
    main()
