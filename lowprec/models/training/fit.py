"""The inner loop of training: optimizers, evaluations, early stopping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lowprec.config import TrainConfig
from lowprec.core.errors import ModelError, TrafficError
from lowprec.models.inputs import arguments_of, inputs_of
from lowprec.models.outputs import OutputCount, Outputs
from lowprec.models.quality import Quality, quality
from lowprec.models.training.minibatches import labelled, shuffled_minibatches
from lowprec.traffic.batch import Batch

__all__ = ["Fit", "TrainingBatches", "fit", "quality_on"]


class TrainingBatches(Protocol):
    """What a fit reads. `num_rows` counts the labelled rows of one epoch, `mean_weight` is over them."""

    num_rows: int
    mean_weight: float

    def in_order(self) -> Iterator[Batch]:
        """The batches to train on, in time order."""

    def held_out(self) -> Iterator[Batch]:
        """The batches to validate on."""


@dataclass(frozen=True)
class Fit:
    """What a fit found: the quality of the weights that the model now has, and how many rows were trained on."""

    validation: Quality
    rows_done: int
    best_rows: int


def fit(
    model: nn.Module,
    source: TrainingBatches,
    settings: TrainConfig,
    on_rows: Callable[[int], None] | None = None,
) -> Fit:
    """Train until the epochs or the patience end, and leave the weights with the lowest validation NE in the model.

    `on_rows` is told how many rows each step was about.

    Embedding tables with sparse gradients learn with Adagrad, everything else with Adam.
    Raises `TrafficError` when the validation rows have one label only, `ModelError` when the loss stops being finite.
    """
    optimizers = _optimizers(model, settings)
    best: Quality | None = None
    best_state: dict[str, Tensor] = {}
    rows_done = best_rows = num_worse = 0
    interval = max(1, source.num_rows // settings.evaluations_per_epoch)
    for epoch in range(settings.epochs):
        rng = np.random.default_rng([settings.seed, epoch])
        next_evaluation = rows_done + interval
        for batch in shuffled_minibatches(source.in_order(), settings.batch_size, rng):
            if settings.decay == "linear":
                _set_learning_rates(optimizers, 1 - rows_done / (settings.epochs * source.num_rows))
            _step(model, optimizers, batch, settings.batch_size, source.mean_weight)
            rows_done += batch.num_rows
            if rows_done >= next_evaluation:
                next_evaluation += interval
                found = _validated(model, source)
                if best is None or found.ne < best.ne:
                    best, best_rows, num_worse = found, rows_done, 0
                    _copy_state(model, best_state)
                else:
                    num_worse += 1
            if on_rows is not None:
                on_rows(batch.num_rows)
            if num_worse == settings.patience:
                break
        if num_worse == settings.patience:
            break
    if best is None:
        raise TrafficError("train: the train window has no labelled rows")
    model.load_state_dict(best_state)
    return Fit(best, rows_done, best_rows)


def quality_on(model: nn.Module, batches: Iterable[Batch], *, outputs: Outputs | None = None) -> Quality:
    """The quality of a model that returns logits on the labelled rows of some batches; keeps 16 bytes a row in memory.

    outputs: what the config says that the model returns, to be checked: raises `ModelError` where it is something else.
    """
    model.eval()
    logits, labels, weights = [], [], []
    count = OutputCount()
    with torch.inference_mode():
        for batch in batches:
            rows = labelled(batch)
            if not rows.num_rows:
                continue
            inputs = inputs_of(rows)
            found = model(*arguments_of(model, inputs)).reshape(-1).float()
            count += OutputCount.of(found, outputs or "unchecked_logits")
            logits.append(found.numpy())
            labels.append(rows.labels)
            if rows.weights is not None:
                weights.append(rows.weights)
    count.check()
    if not labels:
        return quality(np.empty(0, np.float32), np.empty(0, np.float32))
    return quality(np.concatenate(logits), np.concatenate(labels), np.concatenate(weights) if weights else None)


def _optimizers(model: nn.Module, settings: TrainConfig) -> list[torch.optim.Optimizer]:
    bags = [module for module in model.modules() if isinstance(module, nn.EmbeddingBag) and module.sparse]
    tables = {bag.weight: None for bag in bags}
    others = [parameter for parameter in model.parameters() if parameter not in tables]
    optimizers: list[torch.optim.Optimizer] = []
    if tables:
        optimizers.append(torch.optim.Adagrad(list(tables), lr=settings.embedding_learning_rate))
    if others:
        optimizers.append(torch.optim.Adam(others, lr=settings.learning_rate, weight_decay=settings.weight_decay))
    return optimizers


def _set_learning_rates(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Every learning rate at a share of what the settings say."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])


def _step(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch, full_size: int, mean_weight: float
) -> None:
    model.train()
    inputs = inputs_of(batch)
    logits = model(*arguments_of(model, inputs)).reshape(-1).float()
    weight = None if batch.weights is None else torch.from_numpy(batch.weights / mean_weight).float()
    total = binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.labels), weight=weight, reduction="sum")
    for optimizer in optimizers:
        optimizer.zero_grad()
    # Over the full size: the rows of a chunk's smaller last batch weigh as much as all others.
    (total / full_size).backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()


def _validated(model: nn.Module, source: TrainingBatches) -> Quality:
    found = quality_on(model, source.held_out())
    if not np.isfinite(found.auc):
        raise TrafficError(
            f"train: the {found.num_examples} validation rows have one label only; choose a longer windows.validation"
        )
    if not np.isfinite(found.ne):
        raise ModelError("train: the loss is no longer finite; lower train.learning_rate")
    return found


def _copy_state(model: nn.Module, out: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if name in out:
            out[name].copy_(tensor)
        else:
            out[name] = tensor.clone()
