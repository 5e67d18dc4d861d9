"""Converts the output of a model to logits float32[B]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lowprec.core.errors import ModelError
from lowprec.core.sums import add_fields

__all__ = ["MIN_OUTPUTS", "OutputCount", "Outputs", "as_logits", "check_probabilities", "returning_logits"]

Outputs = Literal["logits", "probabilities", "unchecked_logits"]

# The largest float32 below 1 is 1 - 2^-24, so no probability that a float32 model returns is changed by this bound but
# 0, 1 and those below it. logit(2^-24) = -16.6.
MIN_PROBABILITY = 2.0**-24
# A softmax or a quotient may exceed 1 by rounding.
_SLACK = 1e-6
# With fewer outputs, logits may all lie in [0, 1] by chance.
MIN_OUTPUTS = 32


def as_logits(returned: object, num_rows: int, outputs: Outputs, *, model: str) -> Tensor:
    """The logits float[num_rows] of what a model returned; bf16 and fp16 become fp32. Can be differentiated.

    probabilities: logit(p) = log(p) - log(1 - p) in float64, with p clamped to [2^-24, 1 - 2^-24], so a logit to
    [-16.6, 16.6]. A clamped probability has a gradient of zero.

    Raises `ModelError` for anything but one float for each row.
    """
    if not isinstance(returned, Tensor) or returned.numel() != num_rows or not returned.is_floating_point():
        got = f"{tuple(returned.shape)} {returned.dtype}" if isinstance(returned, Tensor) else type(returned).__name__
        what = "probabilities" if outputs == "probabilities" else "logits"
        raise ModelError(f"model {model}: must return {num_rows} float {what}; returned {got}")
    values = returned.reshape(num_rows)
    values = values if values.dtype == torch.float64 else values.float()
    if outputs != "probabilities":
        return values
    p = values.double().clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return (p.log() - (-p).log1p()).to(values.dtype)


def returning_logits(model: nn.Module, outputs: Outputs) -> nn.Module:
    """A module that returns the logits of a model, for training; the model itself where it returns logits."""
    return _Converted(model) if outputs == "probabilities" else model


class _Converted(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, dense: Tensor, sparse: object) -> Tensor:
        returned = self.model(dense, sparse)
        check_probabilities(returned, model=type(self.model).__name__)
        return as_logits(returned, len(dense), "probabilities", model=type(self.model).__name__)


def check_probabilities(returned: object, *, model: str) -> None:
    """Raise `ModelError` where one of the outputs that are declared probabilities lies outside of [0, 1]."""
    if not isinstance(returned, Tensor):
        return  # what `as_logits` refuses
    wrong = (returned < -_SLACK) | (returned > 1 + _SLACK)
    if wrong.any():
        raise ModelError(
            f"model {model}: returned {float(returned.detach()[wrong].reshape(-1)[0]):.6g}, and model.outputs: "
            "probabilities says that outputs lie in [0, 1]; set model.outputs: logits, or end the model in a sigmoid"
        )


@dataclass(frozen=True)
class OutputCount:
    """How many outputs of the reference were seen, and how many of them lie outside of [0, 1].

    Only of models whose outputs are logits that are checked.
    """

    num_outputs: int = 0
    num_outside: int = 0

    @classmethod
    def of(cls, logits: Tensor, outputs: Outputs) -> OutputCount:
        """Of one batch."""
        if outputs != "logits":
            return cls()
        return cls(len(logits), int(((logits < 0) | (logits > 1)).sum()))

    def __add__(self, other: OutputCount) -> OutputCount:
        return add_fields(self, other)

    def __sub__(self, other: OutputCount) -> OutputCount:
        return OutputCount(self.num_outputs - other.num_outputs, self.num_outside - other.num_outside)

    @property
    def are_probabilities(self) -> bool:
        """Whether all outputs lie in [0, 1], and there are too many of them for chance."""
        return self.num_outputs >= MIN_OUTPUTS and self.num_outside == 0

    def check(self) -> None:
        """Raise `ModelError` where the outputs are probabilities and not logits."""
        if self.are_probabilities:
            raise ModelError(
                f"model: all {self.num_outputs:,} outputs lie in [0, 1], so they are probabilities and not logits; set "
                "model.outputs: probabilities, which converts them, or return the values before the sigmoid "
                "(model.outputs: unchecked_logits accepts logits that all lie in [0, 1])"
            )
