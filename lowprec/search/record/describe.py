"""What a search would do, without doing it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from lowprec.config import Config
from lowprec.core.errors import TrafficError
from lowprec.evaluation.exact.assignment import check_bags
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.power import certifiable_kl_pct
from lowprec.latency.measure import LayerGrid
from lowprec.models.adapter import inputs_of
from lowprec.models.uncovered import note_on_uncovered, uncovered_parameters
from lowprec.plan import is_layer
from lowprec.search.confirm.alpha_spending import confidence_of_attempt
from lowprec.search.job import SearchJob, open_job
from lowprec.search.surrogate.proxy import ProxyFront
from lowprec.search.surrogate.surrogate import Surrogate
from lowprec.session.workers import choose_workers_for
from lowprec.traffic.decode import NO_LABEL

__all__ = ["describe_job", "notes_on", "what_to_time"]

# The first batch alone decides that outputs are probabilities only where it is so large.
_MANY_OUTPUTS = 1000


def what_to_time(config: Config, batch_size: int) -> tuple[tuple[int, ...], LayerGrid]:
    """The dims of a config's tables and the shapes of its model's layers, for `lowprec calibrate`."""
    job = open_job(config, is_placed=False)
    dims = sorted({unit.dim for unit in job.units if not unit.is_layer})
    shapes = sorted({(unit.num_rows, unit.dim) for unit in job.adapter.layers.units})
    outliers = max(config.space.layers.outliers) if config.space.layers else 0.0
    return tuple(dims), LayerGrid(shapes, batch_size, outliers)


def describe_job(job: SearchJob) -> dict[str, Any]:
    """Tables, size of the space, bytes, windows and what a reader should know before the search."""
    space = job.space
    features: dict[str, list[str]] = {}
    for feature, table in job.features.items():
        features.setdefault(table, []).append(feature)
    decision_of = {unit: d for d in space.decisions for unit in d.units}
    units = [
        {
            "name": unit.name,
            "num_rows": unit.num_rows,
            "dim": unit.dim,
            "features": features.get(unit.name, []),
            "group": decision_of[unit.name].name if decision_of[unit.name].name != unit.name else None,
            "precisions": [str(p) for p in decision_of[unit.name].choices],
            "bytes": {str(p): space.unit_bytes(unit, p) for p in unit.precisions},
        }
        for unit in space.units
    ]
    # One batch through the model finds what reading the config cannot.
    for name in ("search", "confirm"):
        _check_label_values(job, name)
    loss = _try_first_batch(job)
    choice = choose_workers_for(job, job.search_work())
    windows = []
    for name in ("search", "confirm"):
        window = job.window(name)
        windows.append(
            {
                "name": name,
                "window": job.window_text(name),
                "num_rows": window.num_rows,
                "num_batches": window.num_batches,
            }
        )
    return {
        "name": job.config.name,
        "dry_run": True,
        "units": units,
        # Of thousands of tables no JSON reader could hold the number.
        "num_plans": space.num_plans if space.num_plans < 2**53 else None,
        "log10_num_plans": sum(math.log10(len(d.choices)) for d in space.decisions),
        "fp32_bytes": space.fp32_bytes,
        "cheapest_bytes": space.size_bytes(space.cheapest),
        "row_alignment": space.storage.row_alignment,
        "row_range": str(job.config.space.row_range),
        "dominated": [
            {
                "unit": d.name,
                "precision": str(d.precision),
                "bytes": d.size_bytes,
                "by": str(d.by),
                "by_bytes": d.by_size_bytes,
            }
            for d in space.dominated
        ],
        "windows": windows,
        "power": _power(job, loss),
        "traffic_version": job.reader.version,
        "workers": vars(choice),
        "fp32_parameters": [u.to_dict() for u in uncovered_parameters(job.adapter)],
        "notes": [*notes_on(job), str(choice)],
    }


def _check_label_values(job: SearchJob, name: str) -> None:
    """Raise `TrafficError` where more labels of a window's first batch are neither 0 nor 1 than may be bad."""
    window = job.window(name)
    batch = window.batch(0)
    wrong = [row for row in batch.bad_rows if NO_LABEL in row.reason]
    num_rows = len(batch.labels) + len(batch.bad_rows)
    if len(wrong) > job.config.traffic.max_bad_fraction * num_rows:
        column = job.config.traffic.label
        first = json.loads(wrong[0].values).get(column)
        raise TrafficError(
            f'windows.{name}: column "{column}" (traffic.label): {len(wrong)} of the first {num_rows} labels are '
            f"neither 0 nor 1, the first is {first!r} ({wrong[0].file}, row {wrong[0].row}); name a column of 0 and "
            "1, or write one, for example 1 where a rating is at least 4"
        )


def _power(job: SearchJob, loss: float | None) -> list[dict[str, Any]]:
    """For each budget the largest KL gap that the confirm window is likely to certify; loss: of the first batch."""
    if loss is None:
        return []
    confidence = confidence_of_attempt(job.config.search.confidence, 0)
    num_examples = job.window("confirm").num_rows
    return [
        {
            "budget_pct": budget,
            "kl_pct": certifiable_kl_pct(budget, num_examples=num_examples, loss=loss, confidence=confidence),
        }
        for budget in job.config.search.all_budgets
    ]


def _try_first_batch(job: SearchJob) -> float | None:
    """The reference's mean entropy in the first batch (nats), None where it is not known.

    Raises a `LowprecError` for a model of which no search is possible.
    """
    window = job.window("search")
    batch = window.batch(0)
    if not batch.num_rows:
        return None
    tables = {unit for unit, _ in job.columns if not is_layer(unit)}
    if not job.adapter.has_rows:
        check_bags(job.adapter.trace_lookups(inputs_of(batch)), batch.num_rows, tables)
        # The tables are not on this machine: of the labels alone, which a model can only do better than.
        rate = float(np.nanmean(batch.labels)) if not np.isnan(batch.labels).all() else math.nan
        return -rate * math.log(rate) - (1 - rate) * math.log1p(-rate) if 0 < rate < 1 else None
    evaluator = ExactEvaluator(job.adapter)
    logits = evaluator.logits(batch, []).reference.astype(np.float64)
    if window.num_batches == 1 or batch.num_rows >= _MANY_OUTPUTS:
        evaluator.outputs.check()
    check_bags(job.adapter.reference(inputs_of(batch)).calls, batch.num_rows, tables)
    evaluator.check_assignment(batch, tables)
    positive = np.logaddexp(0, logits)
    loss = float(np.mean(positive - np.exp(logits - positive) * logits))
    return loss if math.isfinite(loss) else None


def notes_on(job: SearchJob) -> list[str]:
    """What a reader should know before a search: what is not searched, what is not checked."""
    notes = note_on_uncovered(uncovered_parameters(job.adapter))
    notes += [f"{layer} {why}: it is not searched and stays fp32" for layer, why in job.fp32_layers.items()]
    if job.reader.version is not None:
        notes.insert(0, f"traffic {job.reader.path}: version {job.reader.version} of the Delta table is read")
    sparse = job.config.traffic.schema_of_columns().sparse
    unseen = [f.name for f in sparse if f.name not in job.features and f.num_embeddings is None]
    if unseen:
        notes.append(
            f"no table is seen to get the ids of {', '.join(unseen)} unchanged: their range is checked in the model "
            "and not while reading (num_embeddings in traffic.sparse checks it there)"
        )
    return notes


def describe_profile(surrogate: Surrogate) -> dict[str, Any]:
    """What the profile found of the reference, and how good its front is."""
    first, front = surrogate.first_order, surrogate.front
    return {
        "num_examples": surrogate.profile.num_rows,
        "num_columns": len(surrogate.profile.columns),
        "second_order_error": surrogate.profile.second.relative_error,
        "front_plans": len(front.points),
        "front_is_exact": front.is_exact,
        # How much cheaper than the cheapest plan of the front at a budget another plan could be, at most.
        "front_distance": max(_distance(surrogate.rule_front, budget) for budget in surrogate.budgets),
        "logit_shift": first.shift,
        "logit_scale": first.scale,
        "first_order_kept": {"shift": first.shift_kept, "scale": first.scale_kept, "rest": first.rest_kept},
    }


def _distance(front: ProxyFront, budget_pct: float) -> float:
    point = front.cheapest_within(budget_pct)
    return (point.cost - point.cost_bound) / point.cost if point and point.cost else 0.0
