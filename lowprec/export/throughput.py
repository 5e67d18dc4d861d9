"""Measures the throughput of an exported folder and of the fp32 model on logged requests."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lowprec.config import Config, load_config
from lowprec.core.errors import ExportError, PlanError
from lowprec.core.progress import Progress, Silent
from lowprec.core.sizes import bytes_text, counted
from lowprec.evaluation.rows import TableUse
from lowprec.export.manifest import CONFIG, Manifest, read_config_and_plan, read_manifest
from lowprec.export.module import in_huge_pages, load, paths_of
from lowprec.models.inputs import arguments_of, inputs_of
from lowprec.ops.timing import num_cores, torch_threads
from lowprec.plan import Plan, PlanFile, Precision
from lowprec.session import Session, open_session

__all__ = ["ServingReport", "ServingSpeed", "measure_serving"]

# Requests that are made again and again, at most; few enough to be ready before the clock runs.
_MAX_REQUESTS = 64
# Of which the last-level cache of a server's core complex holds most.
_SMALL_MODEL_BYTES = 64 << 20


@dataclass(frozen=True)
class ServingSpeed:
    """Of one model at one size of requests. Latencies are of a request, in milliseconds."""

    model: str
    batch_size: int
    num_requests: int
    p50_ms: float
    p99_ms: float
    requests_per_s: float

    @property
    def examples_per_s(self) -> float:
        """Requests times their size."""
        return self.requests_per_s * self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """For documents."""
        return {**vars(self), "examples_per_s": self.examples_per_s}


@dataclass(frozen=True)
class ServingReport:
    """What was measured. units_ns: by model, what tables and layers take for an example in requests of `units_size`.

    predicted_ns: the same by the calibration, None without one.
    """

    folder: str
    window: str
    speeds: tuple[ServingSpeed, ...]
    fp32_bytes: int
    served_bytes: int
    num_threads: int
    is_in_memory: bool
    units_size: int
    units_ns: dict[str, float]
    predicted_ns: dict[str, float] | None

    def warnings(self) -> Iterator[str]:
        """What makes the figures say something else than one would think."""
        if self.num_threads > num_cores():
            yield (
                f"{self.num_threads} threads on {counted(num_cores(), 'core')}: what is given for a core is for a "
                "thread, and threads wait for each other"
            )
        slower = [s.batch_size for s in self.speeds if s.model == "served" and s.requests_per_s < self._fp32(s)]
        if slower and self.fp32_bytes < _SMALL_MODEL_BYTES:
            yield (
                f"the {bytes_text(self.fp32_bytes)} of fp32 units fit into caches, where rows of fp32 are read as fast "
                "and need no conversion: what low precision saves here is memory; time it saves with larger tables"
            )

    def _fp32(self, served: ServingSpeed) -> float:
        (found,) = (s for s in self.speeds if s.model == "fp32" and s.batch_size == served.batch_size)
        return found.requests_per_s

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command."""
        by_size: dict[int, dict[str, ServingSpeed]] = defaultdict(dict)
        for speed in self.speeds:
            by_size[speed.batch_size][speed.model] = speed
        faster = {size: of["served"].requests_per_s / of["fp32"].requests_per_s for size, of in by_size.items()}
        errors = self.predicted_ns and {
            model: self.predicted_ns[model] / self.units_ns[model] - 1 for model in self.predicted_ns
        }
        return {
            "folder": self.folder,
            "window": self.window,
            "num_threads": self.num_threads,
            "is_in_memory": self.is_in_memory,
            "warnings": list(self.warnings()),
            "speeds": [speed.to_dict() for speed in self.speeds],
            "capacity": {
                "fp32_bytes": self.fp32_bytes,
                "served_bytes": self.served_bytes,
                "bytes_saved": self.fp32_bytes - self.served_bytes,
                "requests_per_s_per_core": [
                    {
                        "batch_size": size,
                        "fp32": of["fp32"].requests_per_s / self.num_threads,
                        "served": of["served"].requests_per_s / self.num_threads,
                        "ratio": faster[size],
                    }
                    for size, of in by_size.items()
                ],
            },
            "units": {
                "batch_size": self.units_size,
                "measured_ns_per_example": self.units_ns,
                "predicted_ns_per_example": self.predicted_ns,
                "latency_error": errors,
            },
        }


def measure_serving(
    folder: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 64, 1024),
    seconds: float = 2.0,
    num_threads: int = 1,
    window: str = "confirm",
    in_memory: bool = False,
    overrides: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> ServingReport:
    """Measure an exported folder and the fp32 model of its checkpoint in turns, so that a slow moment is slow for both.

    batch_sizes: examples of a request. seconds: for each size and model. in_memory: tables of both in memory of this
    process, in huge pages, instead of mapped files. overrides: of the folder's config, such as
    `model.checkpoint=PATH` where the checkpoint was moved, or `cost.calibration=FILE` for a prediction beside what is
    measured. Raises `ExportError` where the folder is no export, `PlanError` where the checkpoint is another one.
    """
    folder, listener = Path(folder), progress or Silent()
    manifest = read_manifest(folder)
    _, file = read_config_and_plan(folder, manifest)
    session = _open(folder, manifest, overrides, max(batch_sizes))
    models = {"fp32": session.adapter.model, "served": load(folder, in_memory=in_memory)}
    if in_memory:
        for bags in session.adapter.bags.values():
            weight = nn.Parameter(in_huge_pages(bags[0].weight.detach()), requires_grad=False)
            for bag in bags:
                bag.weight = weight
    speeds: list[ServingSpeed] = []
    with torch_threads(num_threads), torch.inference_mode():
        listener.stage("requests", len(batch_sizes) + 1)
        for size in batch_sizes:
            speeds += _timed(models, _requests(session, models, window, size), size, seconds)
            listener.advance()
        largest = max(batch_sizes)
        paths, each = _unit_paths(session), _each(session, models, window, largest)
        units_ns = {name: _units_ns(model, paths, requests) / largest for name, model, requests in each}
        listener.advance()
    return ServingReport(
        folder=str(folder),
        window=session.window_text(window),
        speeds=tuple(speeds),
        fp32_bytes=session.storage.fp32_bytes,
        served_bytes=session.storage.size_bytes(file.plan),
        num_threads=num_threads,
        is_in_memory=in_memory,
        units_size=largest,
        units_ns=units_ns,
        predicted_ns=_predicted(session, file, window, largest),
    )


def _open(folder: Path, manifest: Manifest, overrides: tuple[str, ...], batch_size: int) -> Session:
    config: Config = load_config(folder / CONFIG, overrides)
    session = open_session(config.in_this_process().with_(traffic={"batch_size": batch_size}))
    if session.checkpoint_sha256 != manifest.checkpoint_sha256:
        raise PlanError(
            f"export {folder}: was made of checkpoint {manifest.checkpoint_sha256[:12]}, {config.model.checkpoint} is "
            f"{session.checkpoint_sha256[:12]}; name the right one with --set model.checkpoint=PATH"
        )
    return session


def _requests(
    session: Session, models: dict[str, nn.Module], window: str, size: int
) -> list[dict[str, tuple[Any, ...]]]:
    """The arguments of each model, for requests of that many examples."""
    traffic = session.window(window)
    found: list[dict[str, tuple[Any, ...]]] = []
    for k in range(traffic.num_batches):
        batch = traffic.batch(k)
        count = batch.num_rows // size
        for part in range(min(count, _MAX_REQUESTS - len(found))):
            first = part * size
            rows = inputs_of(batch.rows(first, first + size))
            found.append({name: arguments_of(model, rows) for name, model in models.items()})
        if len(found) == _MAX_REQUESTS:
            break
    if not found:
        raise ExportError(
            f"bench-serving: windows.{window} has no {size} good rows together; give a smaller --batch-size"
        )
    return found


def _each(
    session: Session, models: dict[str, nn.Module], window: str, size: int
) -> Iterator[tuple[str, nn.Module, list[tuple[Any, ...]]]]:
    requests = _requests(session, models, window, size)
    for name, model in models.items():
        yield name, model, [request[name] for request in requests]


def _timed(
    models: dict[str, nn.Module], requests: Sequence[dict[str, tuple[Any, ...]]], size: int, seconds: float
) -> list[ServingSpeed]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for request in requests:  # pages of mapped files are read, and caches filled
        for name, model in models.items():
            model(*request[name])
    until = time.perf_counter() + seconds * len(models)
    while time.perf_counter() < until:
        for request in requests:
            for name, model in models.items():
                began = time.perf_counter()
                model(*request[name])
                times[name].append(time.perf_counter() - began)
    return [_speed(name, size, np.array(of)) for name, of in times.items()]


def _speed(name: str, size: int, times: np.ndarray[Any, Any]) -> ServingSpeed:
    p50, p99 = (1e3 * float(np.quantile(times, q)) for q in (0.5, 0.99))
    return ServingSpeed(name, size, len(times), p50, p99, 1 / float(times.mean()))


def _unit_paths(session: Session) -> list[str]:
    """Where the units of the space are in a model: tables, and layers where the config lets them have precisions."""
    paths, units = paths_of(session.adapter.model), {unit.name for unit in session.units}
    modules: list[nn.Module] = [bag for bags in session.adapter.bags.values() for bag in bags]
    modules += [
        m for u in session.adapter.layers.units if u.name in units for m in session.adapter.layers.modules(u.name)
    ]
    return [paths[module][0] for module in modules]


def _units_ns(model: nn.Module, paths: Sequence[str], requests: Sequence[tuple[Any, ...]]) -> float:
    """What a request spends in tables and layers: the sum over modules of their median."""
    took: dict[nn.Module, list[float]] = defaultdict(list)
    with _clocks([model.get_submodule(path) for path in paths], took):
        for _ in range(5):
            for request in requests:
                model(*request)
    calls, clock = len(requests) * 5, _clock_seconds()
    return 1e9 * sum(max(float(np.median(of)) - clock, 0.0) * len(of) / calls for of in took.values())


def _clock_seconds() -> float:
    """What a clock sees of a module that does nothing."""
    nothing, x = nn.Identity(), torch.zeros(1)
    took: dict[nn.Module, list[float]] = defaultdict(list)
    with _clocks([nothing], took):
        for _ in range(1000):
            nothing(x)
    return float(np.median(took[nothing]))


@contextmanager
def _clocks(modules: Sequence[nn.Module], took: dict[nn.Module, list[float]]) -> Iterator[None]:
    began: list[float] = []
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())))
        hooks.append(module.register_forward_hook(lambda m, *_: took[m].append(time.perf_counter() - began.pop())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _predicted(session: Session, file: PlanFile, window: str, size: int) -> dict[str, float] | None:
    """By the calibration of the config, for this traffic."""
    if session.config.cost.calibration is None:
        return None
    bags: dict[str, int] = defaultdict(int)
    ids: dict[str, int] = defaultdict(int)
    num_examples = 0
    for k in range(min(session.window(window).num_batches, 4)):
        batch = session.window(window).batch(k)
        num_examples += batch.num_rows
        for call in session.adapter.trace_lookups(inputs_of(batch)) if batch.num_rows else ():
            bags[call.table] += len(call.offsets) - 1
            ids[call.table] += len(call.indices)
    use = {t: TableUse(count / max(num_examples, 1), ids[t] / count if count else 0.0) for t, count in bags.items()}
    plans = {"fp32": Plan.uniform(session.units, Precision.FP32), "served": Plan.of(session.units, file.plan)}
    costs = session.costs(use, file.plan.items())
    found = {name: costs.plan_latency_ns(plan) for name, plan in plans.items()}
    return {name: ns for name, ns in found.items() if ns is not None}
