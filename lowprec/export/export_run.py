"""Exports a certified plan as a folder for serving: runs all of its steps."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lowprec import ops
from lowprec.config import Config
from lowprec.core.errors import ConfigError, ExportError, WeightError
from lowprec.core.progress import Progress, Silent
from lowprec.core.sizes import bytes_text
from lowprec.export.manifest import (
    CONFIG,
    DENSE,
    PLAN,
    TORCHREC,
    ExportedFile,
    ExportedLayer,
    ExportedTable,
    Manifest,
    sha256_of,
)
from lowprec.export.module import load, paths_of
from lowprec.export.parity import certified_outputs, check_parity, check_program
from lowprec.export.programs import FILES, write_program
from lowprec.export.tables import write_table_tensor
from lowprec.export.torchrec import is_reordered, torchrec_document
from lowprec.models.adapter import ModelAdapter
from lowprec.models.checkpoints.tensor_files import open_tensors
from lowprec.models.inputs import takes_keyed_jagged
from lowprec.ops.linear import stored_linear
from lowprec.plan import PlanFile, Precision, write_plan
from lowprec.session import Session, open_session
from lowprec.session.planned import read_planned
from lowprec.storage import AnyPath, Location
from lowprec.storage.whole_folder import abandoned, whole_folder
from lowprec.traffic.quarantine import said_of_bad_rows

__all__ = ["Exported", "export_plan"]

_NUM_BATCHES = 8
# At most, what a folder holds beside weights, and the graph of a program.
_SMALL_FILES_BYTES, _PROGRAM_BYTES = 64 << 10, 1 << 20


@dataclass(frozen=True)
class Exported:
    """What was written, and what it was compared with."""

    folder: Path
    manifest: Manifest
    fp32_bytes: int
    plan_bytes: int
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command."""
        read = sum(4 * table.num_rows * table.dim for table in self.manifest.tables)
        return {
            "folder": str(self.folder),
            "name": self.manifest.name,
            "checkpoint_sha256": self.manifest.checkpoint_sha256,
            "table_bytes": self.manifest.table_bytes,
            "bytes": self.plan_bytes,
            "fp32_bytes": self.fp32_bytes,
            "num_tables": len(self.manifest.tables),
            "num_low_tables": sum(table.precision != Precision.FP32 for table in self.manifest.tables),
            "num_low_layers": len(self.manifest.layers),
            "files": {name: file.bytes for name, file in self.manifest.files.items()},
            "programs": dict(self.manifest.programs),
            "parity": dict(self.manifest.parity),
            "warnings": list(self.notes),
            "seconds": round(self.seconds, 1),
            "fp32_gb_per_s": round(read / 1e9 / max(self.seconds, 1e-9), 3),
        }


def export_plan(
    config: Config,
    plan_path: AnyPath,
    out: AnyPath,
    *,
    window: str = "confirm",
    programs: Collection[str] = (),
    progress: Progress | None = None,
) -> Exported:
    """Write what serves a plan of the config's checkpoint to the folder `out`, whole or not at all.

    The tables are read, quantized and written a few megabytes at a time. What was written is then loaded and compared
    with the evaluation on batches of a window of traffic: pooled embeddings and logits have to be equal to the bit.
    programs: torchscript, torch_export, each with all weights in one file of its own, compared in the same way.

    Raises `PlanError` where the plan does not fit the model or was made for another checkpoint, `ExportError` where the
    folder is there already or cannot be written, where a plan has no served form, or what is loaded differs.
    """
    began = time.monotonic()
    listener = progress or Silent()
    target = Location.of(out).local
    if target is None:
        raise ExportError(f"export {out}: is written to a folder of this machine; give a path, and copy it there")
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ExportError(f"export {out}: {parent} is a file; give a path whose folders can be made")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ExportError(f"export {out}: is there already; remove it, or give another folder")
    if wrong := set(programs) - FILES.keys():
        raise ConfigError(f"programs: must be among {', '.join(FILES)}; got {', '.join(sorted(wrong))}")
    session = open_session(config.in_this_process())
    file = read_planned(session, plan_path)
    session = session.as_planned(file)
    _check_served(file)
    _check_room(session, file, target, programs)
    try:
        with whole_folder(target) as folder:
            manifest = _write_folder(session, file, folder, listener)
            module = load(folder)
            listener.stage("compare with the evaluation", 1 + len(programs))
            expected = certified_outputs(session, file.plan, window, _NUM_BATCHES)
            parity = check_parity(session, module, expected, window)
            listener.advance()
            for kind in programs:
                check_program(kind, session, write_program(kind, module, expected[0].inputs, folder), expected)
                listener.advance()
            written = {kind: FILES[kind] for kind in programs}
            files = {**manifest.files, **{name: _described(folder / name) for name in written.values()}}
            manifest = replace(manifest, parity=parity.to_dict(), programs=written, files=files)
            manifest.write(folder)
            del module
    except FileExistsError:
        raise ExportError(f"export {out}: is there already; remove it, or give another folder") from None
    except OSError as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(_not_written(out, error)) from None
    return Exported(
        folder=target,
        manifest=manifest,
        fp32_bytes=session.storage.fp32_bytes,
        plan_bytes=session.storage.size_bytes(file.plan),
        seconds=time.monotonic() - began,
        notes=(
            *_notes(session, file),
            *_left_behind(target),
            *said_of_bad_rows([row for batch in expected for row in batch.bad_rows]),
        ),
    )


def _check_served(file: PlanFile) -> None:
    emulated = [unit for unit, p in file.plan.items() if p is Precision.EMULATED]
    if emulated:
        raise ExportError(
            f'export: "{emulated[0]}" is emulated, which is a description of an accelerator and nothing that this '
            "machine serves; give it another precision"
        )


def _check_room(session: Session, file: PlanFile, target: Path, programs: Collection[str]) -> None:
    """Refuse what will not fit before hours of writing.

    PyTorch, which writes programs, ends the process on a full disk.
    """
    tables = sum(u.num_rows * ops.row_bytes(u.dim, file.plan[u.name]) for u in session.adapter.units)
    embeddings = {id(parameter) for parameter in session.adapter.table_parameters}
    state = session.adapter.model.state_dict(keep_vars=True).values()
    dense = sum(tensor.nbytes for tensor in state if id(tensor) not in embeddings)
    each = tables + dense + _SMALL_FILES_BYTES
    needed = each + len(programs) * (each + _PROGRAM_BYTES)
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        what = f" and as much for each of {len(programs)} programs" if programs else ""
        raise ExportError(
            f"export {target}: needs about {bytes_text(needed)} ({bytes_text(tables)} tables, {bytes_text(dense)} "
            f"dense part{what}) and the disk has {bytes_text(free)} free; make room, or choose another folder"
        )


def _notes(session: Session, file: PlanFile) -> tuple[str, ...]:
    notes = []
    if file.row_alignment != 1:
        notes.append(
            f"the plan counts rows of {file.row_alignment}-byte multiples; files hold them without padding, which "
            "FBGEMM adds on a GPU"
        )
    verdict = file.evidence.get("verdict")
    if verdict != "certified":
        notes.append(f"the plan is not certified (its evidence says {verdict or 'nothing'})")
    if takes_keyed_jagged(session.adapter.model) and is_reordered(session.adapter):
        notes.append(
            "TorchRec's quantize_embeddings puts tables of one pooling together, which is another order here: a model "
            "that reads its pooled embeddings as one tensor, and not by key, gets them in that order"
        )
    if session.adapter.other_embeddings:
        notes.append(f"nn.Embedding stays fp32: {', '.join(session.adapter.other_embeddings[:3])}")
    return tuple(notes)


def _not_written(out: AnyPath, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"export {out}: the disk is full; make room, or choose another folder"
    return f"export {out}: cannot be written: {error.strerror or error}"


def _left_behind(target: Path) -> tuple[str, ...]:
    """What exports that were killed have left beside the target."""
    return tuple(
        f"{left} is what an export that was killed has left ({bytes_text(size)}); remove it"
        for left, size in abandoned(target)
    )


def _write_folder(session: Session, file: PlanFile, folder: Path, listener: Progress) -> Manifest:
    paths = paths_of(session.adapter.model)
    tables = _write_tables(session, file, folder, paths, listener)
    (folder / CONFIG).write_text(_served_config(session.config).to_json())
    write_plan(file, folder / PLAN)
    (folder / TORCHREC).write_text(json.dumps(torchrec_document(tuple(t for t, _ in tables)), indent=2) + "\n")
    layers = _write_dense(session.adapter, file, folder, paths)
    files = {table.file: described for table, described in tables}
    files |= {name: _described(folder / name) for name in (DENSE, CONFIG, PLAN, TORCHREC)}
    manifest = Manifest(
        session.config.name, session.checkpoint_sha256, tuple(t for t, _ in tables), layers, files, {}, {}
    )
    manifest.write(folder)
    return manifest


def _served_config(config: Config) -> Config:
    """Without what may hold secrets, and with paths that mean the same from anywhere."""
    defaults: Any = type(config).model_fields["monitor"].default
    checkpoint, traffic = (str(Location.of(p).absolute()) for p in (config.model.checkpoint, config.traffic.path))
    absolute = config.with_(model={"checkpoint": checkpoint}, traffic={"path": traffic})
    return absolute.model_copy(update={"monitor": defaults})


def _write_tables(
    session: Session, file: PlanFile, folder: Path, paths: Mapping[nn.Module, tuple[str, ...]], listener: Progress
) -> list[tuple[ExportedTable, ExportedFile]]:
    checkpoint = Location.of(session.spec.checkpoint)
    names = open_tensors(checkpoint, list(session.adapter.weight_names.values())).shapes
    (folder / "tables").mkdir()
    found = []
    for k, (unit, bags) in enumerate(session.adapter.bags.items()):
        modules = tuple(path for bag in bags for path in paths[bag])
        # A weight that several modules share may be stored by the name of any of them.
        tensor = next((f"{path}.weight" for path in modules if f"{path}.weight" in names), f"{modules[0]}.weight")
        precision = file.plan[unit]
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in unit.removeprefix("table:"))
        name = f"tables/{k:04d}-{safe[:100]}.safetensors"
        try:
            stored = write_table_tensor(
                checkpoint,
                tensor,
                folder / name,
                precision,
                name=f"{modules[0]}.weight",
                row_range=file.row_range(unit),
                num_threads=session.spec.threads,
                progress=listener,
            )
        except WeightError as error:
            raise WeightError(f"export: {error}") from None
        table = ExportedTable(
            unit=unit,
            precision=str(precision),
            row_range=str(file.row_range(unit)) if precision.is_rowwise else None,
            num_rows=stored.num_rows,
            dim=stored.dim,
            row_bytes=stored.row_bytes,
            file=name,
            tensor=f"{modules[0]}.weight",
            modules=modules,
        )
        found.append((table, ExportedFile(stored.sha256, (folder / name).stat().st_size)))
    return found


def _write_dense(
    adapter: ModelAdapter, file: PlanFile, folder: Path, paths: Mapping[nn.Module, tuple[str, ...]]
) -> tuple[ExportedLayer, ...]:
    """Everything but the tables: what is fp32 by its name in a state dict, layers below as serving stores them."""
    low = {u.name: file.plan[u.name] for u in adapter.layers.units if u.name in file.plan}
    low = {unit: precision for unit, precision in low.items() if precision is not Precision.FP32}
    gone = {path for bags in adapter.bags.values() for bag in bags for path in paths[bag]}
    tensors: dict[str, Tensor] = {}
    layers = []
    for unit, precision in low.items():
        modules = adapter.layers.modules(unit)
        form = file.layer_forms.get(unit)
        for module in modules:
            stored = stored_linear(module.weight, module.bias, precision, form)
            tensors |= {f"{path}.{name}": tensor for path in paths[module] for name, tensor in stored.items()}
        where = tuple(path for module in modules for path in paths[module])
        layers.append(ExportedLayer(unit, str(precision), form.to_dict() if form else {}, where))
        gone.update(where)
    state = {n: t for n, t in adapter.model.state_dict().items() if n.rpartition(".")[0] not in gone}
    try:
        # Tensors that share memory are written once for each name.
        save_file({n: t.detach().clone().contiguous() for n, t in (tensors | state).items()}, folder / DENSE)
    except SafetensorError as error:
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from None
        raise ExportError(f"export: {DENSE} cannot be written: {error}") from None
    (folder / DENSE).chmod((folder / TORCHREC).stat().st_mode)  # safetensors makes files that only their owner reads
    return tuple(layers)


def _described(path: Path) -> ExportedFile:
    return ExportedFile(sha256_of(path), path.stat().st_size)
