"""The served module as a program that needs no Python class: TorchScript, torch.export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.core.errors import ExportError, first_line
from lowprec.models.inputs import ModelInputs, takes_keyed_jagged

__all__ = ["FILES", "write_program"]

FILES = {"torchscript": "module.ts", "torch_export": "module.pt2"}

# What torch.export meets on its way through FBGEMM's module, and only there: no program holds them.
_COUNTERS = ("fbgemm::AtomicCounter", "fbgemm::TensorQueue")


def write_program(kind: str, module: nn.Module, example: ModelInputs, folder: Path) -> Callable[..., Tensor]:
    """Write a program with all its weights to the folder and load it from there.

    kind: torchscript (traced), or torch_export, which has no form for PyTorch's packed weights of int8 and fp16 layers.
    Raises `ExportError` where the module has no such program.
    """
    if takes_keyed_jagged(module):
        raise ExportError(
            f"export: {kind}: the model takes a KeyedJaggedTensor, which is no tensor and no input of such a program; "
            "leave it out: the folder has what TorchRec loads, and lowprec.load gives the module"
        )
    kinds = {len(bags) for bags in example.sparse.values()}
    if kind == "torchscript" and len(kinds) > 1:
        raise ExportError(
            "export: torchscript: has no type for a dict of features of which some have weights and others have none; "
            "take torch_export (--torch-export), or lowprec.load"
        )
    path = folder / FILES[kind]
    inputs = (example.dense, dict(example.sparse))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of tracers, about FBGEMM's module: whether they matter is checked
            return (_torchscript if kind == "torchscript" else _torch_export)(module, inputs, path)
    except OSError:  # the disk is everybody's
        raise
    except Exception as error:  # tracers raise anything
        if "LinearPackedParams" in str(error):
            raise ExportError(
                "export: torch_export: PyTorch keeps the weights of int8 and fp16 layers in packed objects that "
                "torch.export cannot save; leave these layers at fp32 or bf16, or take torchscript"
            ) from None
        raise ExportError(f"export: {kind}: {type(error).__name__}: {first_line(error)[:300]}") from error


def _torchscript(module: nn.Module, inputs: tuple[Any, ...], path: Path) -> Callable[..., Tensor]:
    jit: Any = torch.jit
    jit.save(jit.trace(module, inputs, check_trace=False, strict=False), str(path))
    loaded: Callable[..., Tensor] = jit.load(str(path))
    return loaded


def _torch_export(module: nn.Module, inputs: tuple[Any, ...], path: Path) -> Callable[..., Tensor]:
    _register_counters()
    _, sparse = inputs
    batch = torch.export.Dim("batch", min=1)
    shapes = ({0: batch}, {name: _shapes(name, bags, batch) for name, bags in sparse.items()})
    with _quiet():
        program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    torch.export.save(program, path)
    loaded: Callable[..., Tensor] = torch.export.load(path).module()
    return loaded


def _shapes(name: str, bags: tuple[Tensor, ...], batch: Any) -> tuple[Mapping[int, Any], ...]:
    """Ids, bag ends, and weights where there are some."""
    ids = torch.export.Dim(f"ids_{''.join(c if c.isalnum() else '_' for c in name)}", min=0)
    return ({0: ids}, {0: batch + 1}, *([{0: ids}] if len(bags) == 3 else []))


@cache
def _register_counters() -> None:
    from torch._library.fake_class_registry import register_fake_class

    class Counter:
        """Stands for one that is never asked."""

        @classmethod
        def __obj_unflatten__(cls, _: object) -> Counter:
            return cls()

    stand_in: Any = Counter
    for name in _COUNTERS:
        register_fake_class(name, stand_in)


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch warns of every method that a counter here does not have."""
    logger = logging.getLogger("torch._library.fake_class_registry")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
