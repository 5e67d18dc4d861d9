"""Inputs of a model: a batch of traffic as tensors, in the form that the model takes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lowprec.traffic.batch import Batch

__all__ = ["ModelInputs", "SparseInput", "arguments_of", "ids_of", "inputs_of", "takes_keyed_jagged"]

SparseInput = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]

_takes_keyed_jagged: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class ModelInputs:
    """What a model is called with.

    dense: float32[B, num_dense]; sparse: feature -> (indices int64[num_ids], offsets int64[B + 1]), and per-sample
    weights float32[num_ids] as a third where the feature has them.
    """

    dense: Tensor
    sparse: Mapping[str, SparseInput]

    def repeated(self, times: int) -> ModelInputs:
        """The same examples again and again, as one batch."""
        sparse: dict[str, SparseInput] = {}
        number = torch.arange(times)[:, None]
        for name, (ids, offsets, *weights) in self.sparse.items():
            begins = offsets[:-1] + number * len(ids)
            bags = torch.cat([begins.view(-1), offsets[-1:] + (times - 1) * len(ids)])
            again = ids.repeat(times)
            sparse[name] = (again, bags, weights[0].repeat(times)) if weights else (again, bags)
        return ModelInputs(self.dense.repeat(times, 1), sparse)


def inputs_of(batch: Batch) -> ModelInputs:
    """A batch of traffic as tensors, without a copy."""
    sparse: dict[str, SparseInput] = {}
    for name, bags in batch.sparse.items():
        ids, offsets = torch.from_numpy(bags.values), torch.from_numpy(bags.offsets)
        sparse[name] = (ids, offsets) if bags.weights is None else (ids, offsets, torch.from_numpy(bags.weights))
    return ModelInputs(torch.from_numpy(batch.dense), sparse)


def arguments_of(model: nn.Module, inputs: ModelInputs) -> tuple[Any, ...]:
    """The arguments of a model's forward: dense values, and ids by feature.

    Ids are a dict of features, or, for a model with a TorchRec `EmbeddingBagCollection`, a `KeyedJaggedTensor` of all
    features in their order; where some have weights of ids, the others get ones.
    """
    if takes_keyed_jagged(model):
        return inputs.dense, _keyed_jagged(inputs.sparse)
    return inputs.dense, dict(inputs.sparse)


def takes_keyed_jagged(model: nn.Module) -> bool:
    """Whether a model has an `EmbeddingBagCollection` inside."""
    found = _takes_keyed_jagged.get(model)
    if found is None:
        # Who has such a model has imported TorchRec; nobody else needs it.
        modules = sys.modules.get("torchrec.modules.embedding_modules")
        kinds = (modules.EmbeddingBagCollection,) if modules else ()
        found = _takes_keyed_jagged[model] = any(isinstance(module, kinds) for module in model.modules())
    return found


def ids_of(arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    """The very tensors of ids in the arguments of a model, by feature."""
    _, sparse = arguments
    if isinstance(sparse, Mapping):
        return {name: bags[0] for name, bags in sparse.items()}
    return {name: bags.values() for name, bags in sparse.to_dict().items()}


def _keyed_jagged(sparse: Mapping[str, SparseInput]) -> Any:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    weights = None
    if any(len(bags) == 3 for bags in sparse.values()):
        weights = torch.cat([bags[2] if len(bags) == 3 else torch.ones(len(bags[0])) for bags in sparse.values()])
    return KeyedJaggedTensor(
        keys=list(sparse),
        values=torch.cat([bags[0] for bags in sparse.values()]),
        lengths=torch.cat([bags[1].diff() for bags in sparse.values()]),
        weights=weights,
    )
