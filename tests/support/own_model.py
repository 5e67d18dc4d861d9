"""A small job on a model of a user's own: traffic, checkpoint and config in a folder."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lowprec.config import Config, load_config
from lowprec.models.checkpoints.checkpoint import save_checkpoint
from lowprec.plan import Plan, PlanFile, Precision, write_plan
from lowprec.search import open_job

_NUMBER = itertools.count()
_DAY = 86_400

HEADER = """
import torch
from torch import nn


class Base(nn.Module):
    def __init__(self, dim=8, width=3):
        super().__init__()
        self.user = nn.EmbeddingBag(300, dim, mode="sum", include_last_offset=True)
        self.item = nn.EmbeddingBag(500, dim, mode="sum", include_last_offset=True)
        self.hist = nn.EmbeddingBag(500, dim, mode="mean", include_last_offset=True)
        self.top = nn.Sequential(nn.Linear(width * dim + 1, 16), nn.ReLU(), nn.Linear(16, 1))

    def pooled(self, sparse):
        return [self.user(*sparse["user"]), self.item(*sparse["item"]), self.hist(*sparse["history"])]

    def forward(self, dense, sparse):
        return self.top(torch.cat([dense, *self.pooled(sparse)], 1)).squeeze(1)
"""


def own_job(folder: Path, code: str, *, num_rows: int = 1500, **sections: Any) -> Config:
    """The config of a job whose model is `build()` of `code`, which begins with `HEADER`, with random weights.

    Traffic has four days: the second one is the search window, the third one the confirm window.
    """
    sys.path.insert(0, str(folder))
    name = f"own_model_{next(_NUMBER)}"
    (folder / f"{name}.py").write_text(HEADER + code)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 6, num_rows)
    user, item = rng.integers(0, 300, num_rows), rng.integers(0, 500, num_rows)
    columns = {
        "ts": np.sort(rng.integers(0, 4 * _DAY, num_rows)),
        "label": (rng.random(num_rows) < 0.3 + 0.2 * (user % 2) + 0.2 * (item % 2)).astype(np.int64),
        "d0": rng.normal(size=num_rows).astype(np.float32),
        "user": user,
        "item": item,
        "history": [rng.integers(0, 500, k).tolist() for k in lengths],
    }
    pq.write_table(pa.table(columns), folder / "traffic.parquet")
    torch.manual_seed(0)
    save_checkpoint(importlib.import_module(name).build(), str(folder / "model.safetensors"))
    document = {
        "name": "own",
        "traffic": {
            "path": str(folder / "traffic.parquet"),
            "time": "ts",
            "dense": ["d0"],
            "sparse": ["user", "item", "history"],
            "batch_size": 250,
        },
        "windows": {"search": {"start": _DAY, "end": 2 * _DAY}, "confirm": {"start": 2 * _DAY, "end": 3 * _DAY}},
        "model": {"factory": f"{name}:build", "checkpoint": str(folder / "model.safetensors")},
        "search": {"budget": 5, "max_trials": 4, "sensitivity_examples": 256},
        "evaluation": {"num_workers": 0},
        "results": {"root": str(folder / "runs")},
        "monitor": {"window": "1d", "end": 4 * _DAY},
    }
    for section, values in sections.items():
        document[section] = {**document.get(section, {}), **values}  # type: ignore[dict-item]
    path = folder / "own.json"
    path.write_text(json.dumps(document))
    return load_config(path)


def uniform_plan(config: Config, folder: Path, tables: Precision = Precision.INT4, layers: str = "fp32") -> Path:
    """A plan file with one precision for all tables, and one for all layers."""
    job = open_job(config)
    free = {unit for decision in job.space.free for unit in decision.units}
    chosen = {
        u.name: tables if not u.is_layer else Precision(layers) if u.name in free else Precision.FP32 for u in job.units
    }
    plan, path = Plan.of(job.units, chosen), folder / "plan.json"
    file = PlanFile(
        plan,
        config.model.factory,
        job.checkpoint_sha256,
        job.space.size_bytes(plan),
        row_alignment=config.space.row_alignment,
        row_ranges=job.spec.row_ranges,
        evidence={"budget_pct": 5.0},
    )
    write_plan(file, path)
    return path
