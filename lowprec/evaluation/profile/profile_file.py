"""A profile on disk: one `.npz` of arrays and a JSON text that says what was profiled."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowprec.core.errors import ConfigError, LowprecError, ResultsError
from lowprec.evaluation.profile.profile import BlockSums, Column, Profile
from lowprec.evaluation.profile.window_profile import MeasuredProfile
from lowprec.evaluation.rows import RowAccount, TableUse
from lowprec.evaluation.stats.second_moment import DenseMoment, SecondMoment, SketchedMoment
from lowprec.plan import Precision, RowRange, form_of
from lowprec.storage import AnyPath, Location

__all__ = ["ProfileOrigin", "read_profile", "write_profile"]

# What to do about a file of `--profile`.
MEASURE_AGAIN = "leave --profile out to measure it again"
FORMAT_VERSION = 3
_SCALARS = ("num_rows", "num_unlabelled", "weight", "label", "prediction", "loss", "entropy")


@dataclass(frozen=True)
class ProfileOrigin:
    """What a profile was measured on; two profiles with equal origins are of the same thing.

    traffic: what else decides the examples and what the model makes of them (columns, files, batch size, model).
    row_range: how row-wise precisions choose the range of a row.
    """

    checkpoint_sha256: str
    window: str
    traffic: str
    row_range: RowRange
    columns: tuple[Column, ...]

    def differences(self, other: ProfileOrigin) -> list[str]:
        """What differs, in words; `self` is what is wanted."""
        found = []
        if self.checkpoint_sha256 != other.checkpoint_sha256:
            there, here = other.checkpoint_sha256[:12], self.checkpoint_sha256[:12]
            found.append(f"the checkpoint (the profile is of {there}, this is {here})")
        if self.window != other.window:
            found.append(f"the window (the profile is of {other.window}, this is {self.window})")
        elif self.traffic != other.traffic:
            found.append("the traffic or the model (files, columns, batch size or model.args are not those profiled)")
        if self.row_range != other.row_range:
            found.append(f"the row range (the profile is of {other.row_range}, this is {self.row_range})")
        if self.columns != other.columns:
            wanted, known = set(self.columns), set(other.columns)
            lists = (("misses", wanted - known), ("has", known - wanted))
            words = [f"{verb} {_named(columns)}" for verb, columns in lists if columns]
            found.append(f"the space (the profile {' and '.join(words) or 'has another order of units'})")
        return found


def write_profile(measured: MeasuredProfile, origin: ProfileOrigin, path: AnyPath) -> None:
    """Write a profile, whole or not at all; raises `ResultsError` where that is not possible."""
    profile = measured.profile
    meta = {
        "format_version": FORMAT_VERSION,
        "checkpoint_sha256": origin.checkpoint_sha256,
        "window": origin.window,
        "traffic": origin.traffic,
        "row_range": str(origin.row_range),
        "columns": [[unit, str(precision)] for unit, precision in origin.columns],
        "rows": measured.rows.to_dict(),
        "forms": [[unit, str(p), form.to_dict()] for (unit, p), form in measured.forms.items()],
        "use": {table: [use.bags_per_example, use.ids_per_bag] for table, use in measured.use.items()},
    }
    arrays = {
        "meta": np.array(json.dumps(meta)),
        "scalars": np.array([[getattr(block, name) for name in _SCALARS] for block in profile.blocks], dtype=float),
        "first": np.stack([block.first for block in profile.blocks]),
        **_moment_arrays("second", [block.second for block in profile.blocks]),
        **_moment_arrays("evidence", [profile.evidence]),
    }
    try:
        with Location.of(path).whole_file() as partial, partial.open("wb") as out:
            np.savez_compressed(out, **arrays)
    except OSError as error:
        reason = error.strerror or error
        raise ResultsError(f"profile {path}: cannot be written: {reason}; make room, or choose another root") from None


def read_profile(path: AnyPath, wanted: ProfileOrigin, *, advice: str = MEASURE_AGAIN) -> MeasuredProfile:
    """Read a profile; raises `ConfigError` where the file is none, or of another checkpoint, window or space.

    advice: what to do then.
    """
    try:
        content = Location.of(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"profile {path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot be read: {error.strerror or error}") from None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            if meta.get("format_version") != FORMAT_VERSION:
                raise ConfigError(
                    f"profile {path}: has format {meta.get('format_version')!r}, this version reads {FORMAT_VERSION}; "
                    f"{advice}"
                )
            origin = _origin(meta)
            if wrong := wanted.differences(origin):
                raise ConfigError(f"profile {path}: is not of this search: {'; '.join(wrong)}; {advice}")
            return _measured(meta, {name: file[name] for name in file.files})
    except LowprecError:
        raise
    except Exception as error:  # a broken archive may fail in any way: zlib.error, TypeError, NotImplementedError ...
        raise ConfigError(
            f"profile {path}: is no profile of lowprec, or a broken one ({type(error).__name__}); {advice}"
        ) from None


def _origin(meta: Mapping[str, Any]) -> ProfileOrigin:
    columns = tuple((str(unit), Precision(precision)) for unit, precision in meta["columns"])
    return ProfileOrigin(
        meta["checkpoint_sha256"], meta["window"], meta["traffic"], RowRange(meta["row_range"]), columns
    )


def _measured(meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> MeasuredProfile:
    seconds = _moments("second", arrays)
    blocks = []
    for scalars, first, second in zip(arrays["scalars"], arrays["first"], seconds, strict=True):
        values = dict(zip(_SCALARS, map(float, scalars), strict=True))
        counts = {name: int(values.pop(name)) for name in ("num_rows", "num_unlabelled")}
        blocks.append(BlockSums(**counts, **values, first=first, second=second))  # type: ignore[arg-type]
    (evidence,) = _moments("evidence", arrays)
    profile = Profile(_origin(meta).columns, tuple(blocks), evidence)
    use = {table: TableUse(*numbers) for table, numbers in meta["use"].items()}
    forms = {
        (unit, Precision(precision)): form_of(Precision(precision), flat, where=f"profile: {unit}")
        for unit, precision, flat in meta.get("forms", ())
    }
    return MeasuredProfile(profile, use, RowAccount.from_dict(meta["rows"]), forms=forms)


def _moment_arrays(name: str, moments: list[SecondMoment]) -> dict[str, Any]:
    if isinstance(moments[0], SketchedMoment):
        sketches = [m for m in moments if isinstance(m, SketchedMoment)]
        arrays = {f"{name}_rows": np.stack([m.rows for m in sketches])}
        if sketches[0].squares is not None:
            arrays[f"{name}_squares"] = np.stack([m.diagonal for m in sketches])
        return arrays
    return {f"{name}_matrix": np.stack([m.dense() for m in moments])}


def _moments(name: str, arrays: Mapping[str, Any]) -> list[SecondMoment]:
    if f"{name}_matrix" in arrays:
        return [DenseMoment(matrix) for matrix in arrays[f"{name}_matrix"]]
    rows = arrays[f"{name}_rows"]
    squares = arrays.get(f"{name}_squares", [None] * len(rows))
    return [SketchedMoment(*pair) for pair in zip(rows, squares, strict=True)]


def _named(columns: set[Column], limit: int = 4) -> str:
    names = [f"{unit} at {precision}" for unit, precision in sorted(columns)]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
