"""Results of a forward pass: logits, calls of tables and layers, gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowprec.models.layers import LayerCall
from lowprec.ops.bags import BagCall

__all__ = ["Gradients", "ReferencePass"]


@dataclass(frozen=True)
class ReferencePass:
    """The fp32 model's logits float32[B], and the calls that led to them in order: of tables, and of watched layers.

    is_differentiated: whether PyTorch recorded gradients meanwhile, for which it may choose other kernels.
    """

    logits: Tensor
    calls: tuple[BagCall, ...]
    layer_calls: tuple[LayerCall, ...] = ()
    is_differentiated: bool = False


@dataclass(frozen=True)
class Gradients:
    """d logit / d output of every call of a reference pass, in the shape of the outputs, row i of logit i alone."""

    tables: tuple[Tensor, ...]
    layers: tuple[Tensor, ...] = ()
