"""Training of a config's model on a window of traffic, so that there is always a real model to search on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowprec._version import __version__
from lowprec.config import Config, WindowConfig
from lowprec.core.errors import TrafficError
from lowprec.core.progress import Progress, Silent
from lowprec.models.checkpoints.checkpoint import checkpoint_sha256, save_checkpoint
from lowprec.models.dlrm import DLRM
from lowprec.models.factory import build_model
from lowprec.models.outputs import returning_logits
from lowprec.models.quality import Quality
from lowprec.models.training.fit import fit, quality_on
from lowprec.models.training.minibatches import labelled
from lowprec.storage import Location
from lowprec.traffic.batch import BadRow, Batch
from lowprec.traffic.quarantine import check_bad_rows, write_quarantine
from lowprec.traffic.reader import TrafficReader, TrafficWindow, open_traffic
from lowprec.traffic.window import parse_window

__all__ = ["TrainReport", "train"]

# The share of the train window's batches, the latest ones, that stands in for a validation window.
_HELD_OUT = 0.1
# What of the config goes into the checkpoint: what the weights depend on, and no path of results.
_SAVED_SECTIONS: Any = {
    "name": True,
    "traffic": True,
    "windows": {"train", "validation"},
    "model": {"factory", "args"},
    "train": True,
}


@dataclass(frozen=True)
class TrainReport:
    """What was trained: the quality of the saved weights, what was read, where they are.

    `num_rows` is what one epoch trains on: rows that are neither bad nor without a label. Bad and unlabelled rows, and
    ids that `bounds_check` dropped or replaced, are counted over the train and the validation window. `epochs` counts
    how many
    were done when the patience ended, `best_epoch` how many lie behind the saved weights.
    """

    checkpoint: str
    checkpoint_sha256: str
    train: Quality
    validation: Quality
    epochs: float
    best_epoch: float
    num_rows: int
    num_unlabelled: int
    num_bad: int
    out_of_range: dict[str, int]
    seconds: float


def train(config: Config, *, progress: Progress | None = None) -> TrainReport:
    """Train the model of `config` on `windows.train` and write `model.checkpoint`.

    The weights with the lowest NE on `windows.validation` are kept; without that window the last tenth of the train
    window is held out. Same config, traffic and library versions give the same bytes.
    Raises `ConfigError` where there is no train window, `TrafficError` where it is too small or has one label only.
    """
    started = time.monotonic()
    listener = progress or Silent()
    source = _open_source(config)
    listener.stage("train", config.train.epochs * source.num_rows)
    with _seeded(config.train.seed):
        model = build_model(config.model.factory, config.model.args, config.traffic.schema_of_columns())
        if isinstance(model, DLRM):
            model.set_dense_statistics(torch.from_numpy(source.dense_mean), torch.from_numpy(source.dense_std))
            model.set_label_rate(source.label_rate)
        of_logits = returning_logits(model, config.model.outputs)
        fitted = fit(of_logits, source, config.train, listener.advance)
        train_quality = quality_on(of_logits, source.in_order(), outputs=config.model.outputs)
    save_checkpoint(
        model,
        config.model.checkpoint,
        {
            "lowprec_version": __version__,
            "config": config.model_dump_json(include=_SAVED_SECTIONS),
            "train_ne": repr(train_quality.ne),
            "validation_ne": repr(fitted.validation.ne),
            "validation_auc": repr(fitted.validation.auc),
            "validation_calibration": repr(fitted.validation.calibration),
        },
    )
    return TrainReport(
        checkpoint=config.model.checkpoint,
        checkpoint_sha256=checkpoint_sha256(config.model.checkpoint),
        train=train_quality,
        validation=fitted.validation,
        epochs=fitted.rows_done / source.num_rows,
        best_epoch=fitted.best_rows / source.num_rows,
        num_rows=source.num_rows,
        num_unlabelled=source.num_unlabelled,
        num_bad=len(source.bad_rows),
        out_of_range=dict(source.out_of_range),
        seconds=time.monotonic() - started,
    )


class _Source:
    """The batches to train on and to validate on, and what a first pass over the former finds."""

    def __init__(self, train: TrafficWindow, num_batches: int, validation: TrafficWindow, first_held_out: int) -> None:
        self._train = train
        self._num_batches = num_batches
        self._validation = validation
        self._first_held_out = first_held_out
        self.num_rows = self.num_unlabelled = self.num_read = 0
        self.bad_rows: list[BadRow] = []
        self.out_of_range: Counter[str] = Counter()
        num_positive = weight = weighted_positive = 0.0
        sums: NDArray[np.float64] | float = 0.0
        squares: NDArray[np.float64] | float = 0.0
        for batch in self.in_order():
            self._account(batch)
            rows = labelled(batch)
            self.num_rows += rows.num_rows
            num_positive += float(rows.labels.sum(dtype=np.float64))
            weights = np.ones(rows.num_rows) if rows.weights is None else rows.weights
            weight += float(weights.sum())
            weighted_positive += float((weights * rows.labels).sum())
            dense = rows.dense.astype(np.float64)
            sums, squares = sums + dense.sum(axis=0), squares + (dense**2).sum(axis=0)
        for batch in self.held_out():
            self._account(batch)
        self.has_both_labels = 0 < num_positive < self.num_rows
        self.mean_weight = weight / max(self.num_rows, 1)
        self.label_rate = min(max(weighted_positive / max(weight, 1e-300), 1e-6), 1 - 1e-6)
        self.dense_mean = np.asarray(sums / max(self.num_rows, 1))
        self.dense_std = np.sqrt(np.maximum(squares / max(self.num_rows, 1) - self.dense_mean**2, 0.0))

    def _account(self, batch: Batch) -> None:
        self.num_read += batch.num_rows + len(batch.bad_rows)
        self.num_unlabelled += int(np.isnan(batch.labels).sum())
        self.bad_rows += batch.bad_rows
        self.out_of_range.update(batch.out_of_range)

    def in_order(self) -> Iterator[Batch]:
        return self._train.batches(0, self._num_batches)

    def held_out(self) -> Iterator[Batch]:
        return self._validation.batches(self._first_held_out)


def _open_source(config: Config) -> _Source:
    windows = config.windows
    traffic = config.traffic
    reader = open_traffic(
        traffic.path, traffic.schema_of_columns(), batch_size=traffic.batch_size, version=traffic.version
    )
    train_window = _window(reader, windows.of("train"), "windows.train")
    if windows.validation is not None:
        validation = _window(reader, windows.validation, "windows.validation")
        source = _Source(train_window, train_window.num_batches, validation, 0)
    else:
        num_held_out = max(1, round(train_window.num_batches * _HELD_OUT))
        num_batches = train_window.num_batches - num_held_out
        if num_batches < 1:
            raise TrafficError(
                f"train: windows.train has {train_window.num_rows} rows, one batch of {config.traffic.batch_size},"
                " which leaves none to validate on; give windows.validation, or lower traffic.batch_size"
            )
        source = _Source(train_window, num_batches, train_window, num_batches)
    _keep_bad_rows(source, config)
    if not source.has_both_labels:
        raise TrafficError(
            f"train: windows.train needs rows of both labels; its {source.num_rows} labelled rows have one; "
            "choose a longer window"
        )
    return source


def _window(reader: TrafficReader, window: WindowConfig, key: str) -> TrafficWindow:
    return reader.window(parse_window(window.start, window.end, unit=reader.time_unit, key=key))


def _keep_bad_rows(source: _Source, config: Config) -> None:
    """Write the bad rows beside the checkpoint; raise where there are more than the config allows."""
    if source.bad_rows:
        checkpoint = Location.of(config.model.checkpoint)
        kept = checkpoint.parent / (checkpoint.name + ".quarantine.parquet")
        write_quarantine(source.bad_rows, kept)
        fraction = config.traffic.max_bad_fraction
        check_bad_rows(len(source.bad_rows), source.num_read, fraction, first=source.bad_rows[0], quarantine_path=kept)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch with a seed of our own and one thread, and back.

    One thread makes the result independent of the machine's cores. On 2 idle cores a second one gained 0 to 20 percent
    (26 tables, 512 rows a step: 9.3 ms against 7.8 and 9.7); with one other busy process it took 4 times as long.
    """
    num_threads = torch.get_num_threads()
    check = torch.sparse.check_sparse_tensor_invariants(enable=False)  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=[]), check:
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
