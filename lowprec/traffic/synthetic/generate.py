"""Synthetic traffic: a folder of Parquet files from a spec, streamed in chunks of one row group."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lowprec.core.errors import TrafficError
from lowprec.storage import Location
from lowprec.traffic.batch import Bags
from lowprec.traffic.synthetic.spec import LabelShift, NewIds, SyntheticSpec
from lowprec.traffic.synthetic.truth import SECONDS_PER_DAY, FeatureTruth, Truth

__all__ = ["SyntheticSpec", "generate", "synthetic_tables"]

ROWS_PER_GROUP = 16_384
ROW_GROUPS_PER_FILE = 4
# Beside the data: which spec made it. Names that begin with "_" are not traffic to the reader.
SPEC_FILE = "_synthetic.json"


def generate(spec: SyntheticSpec, out_path: str | Path) -> int:
    """Write the traffic of a spec as a folder of Parquet files and return its number of rows.

    The folder appears whole or not at all. When it is there already and was made from an equal spec, nothing is done.
    Raises `TrafficError` when something else is there, or when it cannot be written.
    """
    place = Location.of(out_path)
    target = place.local
    if target is None:
        raise TrafficError(f"traffic {place}: is made in a folder of this machine; give a path and copy it there")
    document = spec.model_dump_json(indent=2) + "\n"
    if _made_from(target, document):
        return spec.num_rows
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(spec, partial)
        (partial / SPEC_FILE).write_text(document)
        if target.is_dir():
            target.rmdir()  # empty, as checked above
        partial.rename(target)
    except OSError as error:
        # Another process may have made the same traffic meanwhile; then all is well.
        if not _made_from(target, document):
            raise TrafficError(f"traffic {target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return spec.num_rows


def synthetic_tables(spec: SyntheticSpec) -> Iterator[pa.Table]:
    """The rows of a spec in tables of one row group each. Each depends on the spec and its own number only."""
    truth = Truth(spec)
    day_ends = _time_curve(spec)
    for chunk in range(-(-spec.num_rows // ROWS_PER_GROUP)):
        yield _table(truth, chunk, day_ends)


def _made_from(target: Path, document: str) -> bool:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        if (target / SPEC_FILE).read_text() == document:
            return True
    except OSError:
        pass
    raise TrafficError(
        f"traffic {target}: holds something else than this synthetic traffic; remove it or choose another traffic.path"
    )


def _write(spec: SyntheticSpec, folder: Path) -> None:
    writer: pq.ParquetWriter | None = None
    try:
        for chunk, table in enumerate(synthetic_tables(spec)):
            if chunk % ROW_GROUPS_PER_FILE == 0:
                if writer is not None:
                    writer.close()
                name = f"part-{chunk // ROW_GROUPS_PER_FILE:05d}.parquet"
                writer = pq.ParquetWriter(folder / name, table.schema, write_page_checksum=True)
            assert writer is not None
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
    finally:
        if writer is not None:
            writer.close()


def _table(truth: Truth, chunk: int, day_ends: tuple[NDArray[np.float64], NDArray[np.float64]]) -> pa.Table:
    spec = truth.spec
    first = chunk * ROWS_PER_GROUP
    num_rows = min(ROWS_PER_GROUP, spec.num_rows - first)
    # A stream for each feature, so that a drift planted in one of them changes nothing else but clicks.
    rng, *feature_rngs = np.random.default_rng([spec.seed, 0, chunk]).spawn(1 + spec.num_sparse)
    # One row per equal slice of traffic, anywhere in it: sorted by construction, across chunks as well.
    quantiles = (first + np.arange(num_rows) + rng.random(num_rows)) / spec.num_rows
    times = spec.start + np.interp(quantiles, *day_ends).astype(np.int64)
    dense = rng.standard_normal((num_rows, spec.num_dense), np.float32)
    sparse = {
        name: _bags(truth, feature, times, feature_rng)
        for name, feature, feature_rng in zip(spec.features, truth.features, feature_rngs, strict=True)
    }
    users = rng.integers(0, spec.num_users, num_rows) if spec.num_users else None
    logits = truth.logits(times, dense, sparse, users)
    labels = rng.random(num_rows) < 1 / (1 + np.exp(-logits))
    columns: dict[str, Any] = {"ts": pa.array(times), "label": pa.array(labels.astype(np.int8))}
    columns |= {f"d{i}": pa.array(np.ascontiguousarray(dense[:, i])) for i in range(spec.num_dense)}
    for name, feature in zip(spec.features, truth.features, strict=True):
        bags = sparse[name]
        values = pa.array(bags.values)
        if feature.is_multi_hot:
            values = pa.ListArray.from_arrays(bags.offsets.astype(np.int32), values)
        columns[name] = values
    if users is not None:
        columns["user"] = pa.array(users)
    columns["true_logit"] = pa.array(logits)
    return pa.table(columns)


def _bags(truth: Truth, feature: FeatureTruth, times: NDArray[np.int64], rng: np.random.Generator) -> Bags:
    lengths = np.ones(len(times), np.int64)
    if feature.is_multi_hot:
        # Geometric from 0 with the mean asked for; the longest bags are cut, as real logs do.
        mean = truth.spec.mean_length
        lengths = np.minimum(rng.geometric(1 / (1 + mean), len(times)) - 1, int(20 * mean) + 1)
    offsets = np.zeros(len(times) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    num_ids = int(offsets[-1])
    ranks = np.searchsorted(feature.cumulative, rng.random(num_ids))
    ids = feature.id_of_rank[ranks]
    for at, drift in enumerate(truth.spec.drifts):
        is_new = at in feature.first_rank_by_drift
        if isinstance(drift, LabelShift) or not (is_new or at in feature.id_of_rank_by_drift):
            continue
        # Drawn whether or not the drift has begun, so that the rows before it do not depend on its share.
        chosen = rng.random(num_ids) < drift.share
        other = rng.random(num_ids) if isinstance(drift, NewIds) else None
        chosen &= np.repeat(times >= truth.drift_start(drift.day), lengths)
        if other is not None:
            new_ranks = np.searchsorted(feature.cumulative_by_drift[at], other[chosen])
            ids[chosen] = feature.id_of_rank[feature.first_rank_by_drift[at] + new_ranks]
        else:
            ids[chosen] = feature.id_of_rank_by_drift[at][ranks[chosen]]
    return Bags(ids, offsets)


def _time_curve(spec: SyntheticSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of the traffic, and the second since the start by which each of them has passed."""
    seconds = np.linspace(0, spec.days * SECONDS_PER_DAY, int(spec.days * 96) + 2)
    day = seconds / SECONDS_PER_DAY
    # The integral of 1 - cycle * cos(2 pi day): fewest at midnight, most at noon.
    passed = day - spec.daily_cycle * np.sin(2 * np.pi * day) / (2 * np.pi)
    return passed / passed[-1], seconds
