"""`manifest.json`: the contents of an exported folder and their checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowprec._version import __version__
from lowprec.config import Config, load_config
from lowprec.core.errors import ConfigError, ExportError
from lowprec.plan import PlanFile, Precision, is_layer, read_plan

__all__ = [
    "CONFIG",
    "DENSE",
    "MANIFEST",
    "PLAN",
    "TORCHREC",
    "ExportedFile",
    "ExportedLayer",
    "ExportedTable",
    "Manifest",
    "read_config_and_plan",
    "read_manifest",
    "sha256_of",
]

MANIFEST, CONFIG, PLAN, DENSE = "manifest.json", "config.json", "plan.json", "dense.safetensors"
TORCHREC = "torchrec.json"
_SCHEMA_VERSION = 1
_LAYOUTS = {
    "rowwise": "uint8[num_rows, row_bytes]: fp16 scale, fp16 bias, codes with the low-order bits first",
    "plain": "float[num_rows, dim]",
}
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ExportedTable:
    """Where the rows of a table are: `tensor` in `file`; `modules` are the paths of the bags that look them up."""

    unit: str
    precision: str
    row_range: str | None
    num_rows: int
    dim: int
    row_bytes: int
    file: str
    tensor: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class ExportedLayer:
    """A layer below fp32: its tensors are `PATH.NAME` in the dense file, for each of the paths `modules`."""

    unit: str
    precision: str
    form: Mapping[str, Any]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class ExportedFile:
    """A file of the folder."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """All of it. `files` are the others of the folder, by their path in it. parity, programs: see `export_plan`."""

    name: str
    checkpoint_sha256: str
    tables: tuple[ExportedTable, ...]
    layers: tuple[ExportedLayer, ...]
    files: Mapping[str, ExportedFile]
    parity: Mapping[str, Any]
    programs: Mapping[str, str]
    lowprec_version: str = __version__

    @property
    def table_bytes(self) -> int:
        """Of all stored rows."""
        return sum(table.num_rows * table.row_bytes for table in self.tables)

    def write(self, folder: Path) -> None:
        """Write it; raises `OSError`."""
        document = {"schema_version": _SCHEMA_VERSION, "layouts": _LAYOUTS, "row_alignment": 1, **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")

    def check_files(self, folder: Path, names: Collection[str] | None = None) -> None:
        """Raise `ExportError` naming the first file, of all or of these, that is not what was written."""
        for name, expected in self.files.items():
            if names is not None and name not in names:
                continue
            path = folder / name
            try:
                size = path.stat().st_size
                found = sha256_of(path) if size == expected.bytes else None
            except OSError as error:
                raise ExportError(f"export {folder}: {name} cannot be read: {error.strerror or error}") from None
            if found != expected.sha256:
                what = (
                    f"it has {size:,} of {expected.bytes:,} bytes"
                    if found is None
                    else f"its SHA-256 is {found[:12]} and not {expected.sha256[:12]}"
                )
                raise ExportError(
                    f"export {folder}: {name} is not what the manifest says ({what}); copy the folder again"
                )

    def check_plan(self, folder: Path, file: PlanFile) -> None:
        """Raise `ExportError` where the plan of the folder is another one than the manifest describes."""
        described = {table.unit: table.precision for table in self.tables}
        described |= {layer.unit: layer.precision for layer in self.layers}
        low = {unit: str(p) for unit, p in file.plan.items() if not is_layer(unit) or p is not Precision.FP32}
        forms = {unit: form.to_dict() for unit, form in file.layer_forms.items()}
        wrong = [unit for unit in described.keys() | low.keys() if described.get(unit) != low.get(unit)]
        wrong += [layer.unit for layer in self.layers if dict(layer.form) != forms.get(layer.unit, {})]
        if wrong:
            raise ExportError(
                f'export {folder}: {MANIFEST} and {PLAN} say different things of "{min(wrong)}"; copy the folder again'
            )

    def _check_names(self, folder: Path) -> None:
        needed = {DENSE, CONFIG, PLAN, TORCHREC, *(table.file for table in self.tables), *self.programs.values()}
        outside = [name for name in self.files if Path(name).is_absolute() or ".." in Path(name).parts]
        if missing := sorted(needed - self.files.keys()):
            raise ExportError(f"export {folder}: {MANIFEST} has no SHA-256 of {missing[0]}; copy the folder again")
        if outside:
            raise ExportError(f"export {folder}: {MANIFEST} names {outside[0]}, which is not in it; export again")


def read_manifest(folder: Path) -> Manifest:
    """What a folder says of itself; raises `ExportError` where it is no whole export."""
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ExportError(
            f"export {folder}: has no {MANIFEST}, so it is no export; make one with lowprec export"
        ) from None
    except OSError as error:
        raise ExportError(f"export {folder}: {MANIFEST} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ExportError(f"export {folder}: {MANIFEST} is not JSON: {error}; copy the folder again") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != _SCHEMA_VERSION:
        raise ExportError(
            f"export {folder}: {MANIFEST} has schema_version {version!r}, this lowprec reads {_SCHEMA_VERSION}; "
            "export again"
        )
    try:
        manifest = Manifest(
            name=document["name"],
            checkpoint_sha256=document["checkpoint_sha256"],
            tables=tuple(ExportedTable(**{**t, "modules": tuple(t["modules"])}) for t in document["tables"]),
            layers=tuple(
                ExportedLayer(**{**layer, "modules": tuple(layer["modules"])}) for layer in document["layers"]
            ),
            files={name: ExportedFile(**file) for name, file in document["files"].items()},
            parity=document["parity"],
            programs=document["programs"],
            lowprec_version=document["lowprec_version"],
        )
    except KeyError as error:
        raise ExportError(f"export {folder}: {MANIFEST} misses {error}; copy the folder again") from None
    except (TypeError, AttributeError) as error:
        raise ExportError(f"export {folder}: {MANIFEST} is not what lowprec writes ({error}); copy it again") from None
    manifest._check_names(folder)
    return manifest


def read_config_and_plan(folder: Path, manifest: Manifest) -> tuple[Config, PlanFile]:
    """The config and the plan that were exported; raises `ExportError` where one of them is another file."""
    manifest.check_files(folder, (CONFIG, PLAN))
    try:
        config = load_config(folder / CONFIG)
    except ConfigError as error:
        raise ExportError(f"export {folder}: {error}") from None
    return config, read_plan(folder / PLAN, units=None, checkpoint_sha256=None)


def sha256_of(path: Path) -> str:
    """Of a file, read a stretch at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
