"""Reports the kernels, libraries, memory, GPU and Ray of this machine. Changes nothing."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lowprec import ops
from lowprec._version import __version__
from lowprec.core.errors import LowprecError
from lowprec.core.progress import Progress, Silent
from lowprec.ops import reference
from lowprec.ops.linear import has_bf16_instructions, safe_input_bits
from lowprec.ops.native import CPU_PATH_VARIABLE
from lowprec.ops.timing import copy_bandwidth, cpu_model, fbgemm_version, num_cores
from lowprec.plan import Precision, RowRange

__all__ = ["Finding", "examine"]

OK, ABSENT, BROKEN = "ok", "absent", "broken"

LIBRARIES = ("torch", "ray", "optuna", "pyarrow", "pandas", "numpy", "deltalake", "duckdb", "safetensors")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    `state`: `ok`; `absent`, what lowprec can do without; or `broken`, what it cannot. `summary` is one line; where the
    state is not ok it says what to do. `facts` are the same and more, for programs.
    """

    name: str
    state: str
    summary: str
    facts: dict[str, Any] = field(default_factory=dict)


def examine(*, address: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """All findings, as the document of `lowprec doctor`: `state` is `broken` where any is, else `ok`.

    address: of a Ray cluster, as in `evaluation.address`; without it `RAY_ADDRESS` counts, and then a cluster that was
    started on this machine. Takes some seconds: memory bandwidth is measured, and Ray is asked.
    """
    looks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("python", _python),
        ("cpu", _cpu),
        ("kernels", _kernels),
        ("fbgemm", _fbgemm),
        ("layers", _layers),
        ("libraries", _libraries),
        ("threads", _threads),
        ("memory", _memory),
        ("gpu", _gpu),
        ("ray", lambda: _ray(address)),
    )
    progress = progress or Silent()
    progress.stage("doctor", len(looks))
    findings = []
    for name, look in looks:
        findings.append(_looked(name, look))
        progress.advance()
    state = BROKEN if any(finding.state == BROKEN for finding in findings) else OK
    return {"state": state, "findings": [asdict(finding) for finding in findings]}


def _looked(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # a broken installation fails in ways of its own, and the rest is still worth knowing
        text = str(error) if isinstance(error, LowprecError) else f"{type(error).__name__}: {error}"
        return Finding(name, BROKEN, " ".join(text.split()))


def _python() -> Finding:
    facts = {"lowprec": __version__, "python": platform.python_version(), "platform": platform.platform()}
    return Finding("python", OK, f"lowprec {__version__}, Python {facts['python']}, {facts['platform']}", facts)


def _cpu() -> Finding:
    facts = {"model": cpu_model(), "num_cores": num_cores()}
    return Finding("cpu", OK, f"{facts['model']}, {facts['num_cores']} cores for this process", facts)


def _kernels() -> Finding:
    path, paths = ops.cpu_path(), ops.cpu_paths()
    for name in paths:
        _check_path(name)
    asked = os.environ.get(CPU_PATH_VARIABLE)
    why = f"asked for by {CPU_PATH_VARIABLE}" if asked else "the best one of this CPU"
    summary = f"{path} ({why}; {', '.join(paths)} agree with the reference)"
    return Finding("kernels", OK, summary, {"cpu_path": path, "cpu_paths": list(paths), "asked": asked})


def _check_path(name: str) -> None:
    """Raise `AssertionError` unless a path stores some rows as the reference does."""
    rows = np.random.default_rng(0).standard_normal((40, 37), dtype=np.float32)
    with ops.using_cpu_path(name):
        for precision in (Precision.INT8, Precision.INT4, Precision.INT2):
            for row_range in RowRange:
                stored = ops.quantize(rows, precision, row_range=row_range)
                expected = reference.quantize_rows(rows, precision.bits, row_range)
                if not np.array_equal(stored, expected):
                    raise AssertionError(
                        f"the {name} kernels store {precision} rows ({row_range}) unlike the reference; build them "
                        "again with another compiler, and report this"
                    )


def _fbgemm() -> Finding:
    rows = np.random.default_rng(0).standard_normal((8, 16), dtype=np.float32)
    ids, offsets = np.array([0, 7, 3]), np.array([0, 2, 3])
    stored = ops.quantize(rows, Precision.INT4)
    served = ops.pooled_lookup(stored, Precision.INT4, 16, ids, offsets, mode="sum").numpy()
    if not np.array_equal(served, ops.pooled_as(rows, Precision.INT4, ids, offsets, mode="sum")):
        raise AssertionError("FBGEMM serves other values than lowprec evaluates: install the pinned version (1.8)")
    version = fbgemm_version()
    return Finding("fbgemm", OK, f"{version}, serves what lowprec evaluates", {"version": version})


def _layers() -> Finding:
    bits, has_bf16 = safe_input_bits(), has_bf16_instructions()
    int8 = f"int8 with inputs of {bits} bits" + ("" if bits == 8 else " (no VNNI: a plan of 8 bits is refused here)")
    bf16 = "by instructions of the CPU" if has_bf16 else "as products in fp32 (the CPU has no instructions)"
    return Finding("layers", OK, f"{int8}, bf16 {bf16}", {"int8_input_bits": bits, "has_bf16_instructions": has_bf16})


def _libraries() -> Finding:
    versions = {name: _version(name) for name in LIBRARIES}
    failures = [f"{name}: {reason}" for name in LIBRARIES for reason in _import_failure(name)]
    if failures:
        return Finding("libraries", BROKEN, f"{'; '.join(failures)}; run `make setup` again", {"versions": versions})
    known = {name: version for name, version in versions.items() if version}
    return Finding(
        "libraries", OK, ", ".join(f"{name} {version}" for name, version in known.items()), {"versions": versions}
    )


def _threads() -> Finding:
    import torch

    variables = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    facts = {"torch": torch.get_num_threads(), "cores": num_cores(), **variables}
    named = ", ".join(f"{name}={value}" for name, value in variables.items() if value)
    summary = f"PyTorch and kernels use {facts['torch']} of {facts['cores']} cores" + (f" ({named})" if named else "")
    return Finding("threads", OK, summary, facts)


def _memory() -> Finding:
    cores = num_cores()
    rates = {str(n): round(copy_bandwidth(num_threads=n) / 1e9, 1) for n in sorted({1, cores})}
    facts = {"total_bytes": _memory_bytes("MemTotal"), "available_bytes": _memory_bytes("MemAvailable")}
    free = ", ".join(f"{size / 2**30:.1f} GiB {name.removesuffix('_bytes')}" for name, size in facts.items() if size)
    copies = ", ".join(f"{rate:g} GB/s on {n} thread{'s' if n != '1' else ''}" for n, rate in rates.items())
    return Finding("memory", OK, f"{free or 'size unknown'}; copies {copies}", {**facts, "copy_gb_per_s": rates})


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        why = "PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no CUDA device"
        if Path("/proc/driver/nvidia").exists():
            why = f"this machine has an NVIDIA driver, but {why}; take the extra lowprec[cuda] to use it"
        return Finding("gpu", ABSENT, f"{why}; lowprec runs on the CPU", {"devices": []})
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    summary = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
    facts = [{"name": device.name, "memory_bytes": device.total_memory} for device in devices]
    return Finding("gpu", OK, f"{summary}, reachable by PyTorch", {"devices": facts})


def _ray(address: str | None) -> Finding:
    from lowprec.evaluation.workers.ray import cluster_resources

    asked = address or os.environ.get("RAY_ADDRESS")
    try:
        resources = cluster_resources(asked or "auto")
    except LowprecError as error:
        if asked:
            return Finding("ray", BROKEN, str(error), {"address": asked, "reachable": False})
        summary = "no cluster on this machine; searches with several workers start Ray for themselves"
        return Finding("ray", ABSENT, summary, {"address": None, "reachable": False})
    summary = f"cluster at {resources['address']}: {resources['num_nodes']} nodes, {resources['num_cpus']:g} CPUs"
    return Finding("ray", OK, summary, {"reachable": True, **resources})


def _import_failure(name: str) -> Iterator[str]:
    try:
        importlib.import_module(name)
    except Exception as error:  # a library that was built for another one raises what it likes
        yield f"{type(error).__name__}: {error}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory_bytes(name: str) -> int | None:
    if sys.platform != "linux":
        return None
    with open("/proc/meminfo") as lines:
        found = next((line.split()[1] for line in lines if line.startswith(f"{name}:")), None)
    return int(found) * 1024 if found else None
