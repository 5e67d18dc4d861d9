"""Table modules: which `nn.EmbeddingBag` is supported, its name, and its lookups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lowprec.core.errors import ModelError
from lowprec.ops.bags import BagCall, flat_bags

__all__ = [
    "check_ids",
    "check_not_shared",
    "check_plain",
    "check_supported",
    "named_embeddings",
    "normalised",
    "short_names",
]


def check_supported(path: str, bag: nn.EmbeddingBag) -> None:
    """Raise `ModelError` for a bag that low-precision serving has no form for."""
    if bag.mode not in ("sum", "mean"):
        raise ModelError(f'model: table "{path}" pools by "{bag.mode}"; low-precision serving has sum and mean')
    if bag.weight.dtype != torch.float32 or bag.weight.device.type not in ("cpu", "meta"):
        raise ModelError(
            f'model: table "{path}" is {bag.weight.dtype} on {bag.weight.device}; the reference must be fp32 on the CPU'
        )
    if bag.max_norm is not None:
        raise ModelError(
            f'model: table "{path}" has max_norm={bag.max_norm}, which rewrites rows while reading; bake it in'
        )


def check_not_shared(model: nn.Module, tables: Mapping[int, str]) -> None:
    """Raise `ModelError` where a table's weight is also something else's. tables: id of a weight -> path of its bag."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in tables and not isinstance(module, nn.EmbeddingBag):
                raise ModelError(
                    f'model: the weight of table "{tables[id(parameter)]}" is also {path}.{name} of a '
                    f"{type(module).__name__}, which would stay fp32; give the table a weight of its own"
                )


def check_plain(name: str, bag: nn.EmbeddingBag) -> None:
    """Raise `ModelError` for a bag with a forward of its own, which only its own module knows."""
    if type(bag).forward is not nn.EmbeddingBag.forward:
        raise ModelError(
            f'model: table "{name}" is a {type(bag).__name__} with a forward of its own, which other workers do not '
            "know; hold all tables at each worker, or do what it does outside of the table"
        )


def check_ids(name: str, bag: nn.EmbeddingBag, ids: Tensor) -> None:
    """Raise `ModelError` for ids that are no rows of the bag."""
    if ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= bag.num_embeddings:
        wrong = low if low < 0 else high
        raise ModelError(
            f'model: table "{name}" has {bag.num_embeddings} rows and was asked for id {wrong}; set num_embeddings or '
            "modulo of its feature in traffic.sparse, or traffic.bounds_check: drop or zero"
        )


def normalised(
    table: str, bag: nn.EmbeddingBag, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, output: Tensor
) -> BagCall:
    """A call as lowprec looks it up: flat ids, B + 1 offsets, no padding."""
    try:
        bags = flat_bags(
            ids, offsets, weights, include_last_offset=bag.include_last_offset, padding_idx=bag.padding_idx
        )
    except ValueError as error:
        raise ModelError(f'model: "{table}" {error}') from None
    return BagCall(table, *bags, "mean" if bag.mode == "mean" else "sum", output)


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest end of each path that is unique and does not begin with a digit."""

    def suffix(path: str, length: int) -> str:
        return ".".join(path.split(".")[-length:])

    names = []
    for path in paths:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = suffix(path, length)
            if sum(suffix(other, length) == name for other in paths) == 1 and not name[:1].isdigit():
                break
        names.append(name or "embedding")
    return names


def named_embeddings(model: nn.Module) -> list[str]:
    """The `nn.Embedding` tables of a model with their shapes."""
    return [
        f"{path or 'embedding'} ({module.num_embeddings:,} x {module.embedding_dim})"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
