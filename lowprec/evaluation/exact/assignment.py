"""Does the first order say which example a table changes? Predicted and measured changes of logits are compared.

The first-order change of example i is taken from row i of a table's pooled embeddings. That is right where a lookup
returns one vector for each example, in the order of examples, and gradients reach it. Models that share a lookup among
examples, reorder rows or cut gradients are evaluated exactly all the same, but a profile of them would be wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lowprec.core.errors import ModelError
from lowprec.models.adapter import ModelAdapter, ModelInputs
from lowprec.models.passes import Gradients, ReferencePass
from lowprec.ops.bags import BagCall

__all__ = ["ASSIGNED_ROWS", "check_assignment", "check_bags"]

# Examples that are compared: few, because each table takes two passes over them.
ASSIGNED_ROWS = 128
# Steps in shares of a table's root mean square. The first one decides nearly always; others are for tables so strong
# that the model bends within a step, and so weak that rounding hides it.
_STEPS = (0.03, 0.3, 0.003, 1.0)
# Bending and rounding, as a share of the change, up to which a step decides.
_MAX_NOISE = 0.25
# The relative error that is wrong, beside what bending and rounding explain. A wrong assignment gives 1 or more.
_MAX_ERROR = 0.3

# The least part of a predicted change that has to show.
_MIN_SHOWN = 0.01
# The correlation of prediction and change of a right assignment, at least; a wrong one has 0.0 with an error of 0.09.
_MIN_ALONG = 0.35

_ADVICE = "fix it to fp32 in space.units"


def check_bags(
    calls: Sequence[BagCall], num_rows: int, tables: Collection[str], *, may_be_several: bool = False
) -> None:
    """Raise `ModelError` where one of some tables is not looked up with one bag for each example.

    may_be_several: the same number of bags for each example will do.
    """
    for call in calls:
        num_bags = len(call.offsets) - 1
        if call.table in tables and (num_bags % num_rows or not (may_be_several or num_bags == num_rows)):
            name = call.table.removeprefix("table:")
            shared = "; one lookup for all examples" if num_bags == 1 else ""
            raise ModelError(
                f'model: table "{name}" was looked up with {num_bags:,} {"bag" if num_bags == 1 else "bags"} for a '
                f"batch of {num_rows:,} examples (output {list(call.output.shape)}{shared}), so it is not known which "
                f"example a row of it belongs to; look up one bag for each example, or {_ADVICE}"
            )


def check_assignment(
    adapter: ModelAdapter,
    inputs: ModelInputs,
    reference: ReferencePass,
    gradients: Gradients,
    tables: Collection[str],
) -> None:
    """Raise `ModelError` for a table whose small changes do not do to each logit what the first order predicts.

    Two passes for each of `tables`, with its pooled embeddings moved by a small random step and back. Half the
    difference is free of bending of even order; the other half of what was measured says how much bending and rounding
    there is, and a table is refused only beyond that, at each step that decides.
    """
    generator = torch.Generator().manual_seed(0)
    z = adapter.as_served(inputs, reference).logits.double()
    outputs = [call.output for call in reference.calls]
    for table in dict.fromkeys(call.table for call in reference.calls):
        if table not in tables:
            continue
        signs = [torch.randint(0, 2, o.shape, generator=generator) * 2.0 - 1 for o in outputs]
        verdicts = []
        for step in _STEPS:
            moves = [
                step * o.square().mean().sqrt() * sign if call.table == table else None
                for call, o, sign in zip(reference.calls, outputs, signs, strict=True)
            ]
            up, down = (
                adapter.run_with_outputs(
                    inputs, reference, [_moved(o, m, way) for o, m in zip(outputs, moves, strict=True)]
                )
                for way in (1, -1)
            )
            verdict = _compare(z, up.double(), down.double(), _predicted(moves, gradients))
            if verdict is not None:
                verdicts.append(verdict)
            if verdict == "":
                break
        if verdicts and all(verdicts):
            raise ModelError(f'model: table "{table.removeprefix("table:")}": {verdicts[0]}, or {_ADVICE}')


def _moved(output: Tensor, move: Tensor | None, way: int) -> Tensor:
    return output if move is None else output + way * move


def _predicted(moves: Sequence[Tensor | None], gradients: Gradients) -> Tensor:
    changes = [(m * g).double().sum(dim=1) for m, g in zip(moves, gradients.tables, strict=True) if m is not None]
    return torch.stack(changes).sum(dim=0)


def _compare(z: Tensor, up: Tensor, down: Tensor, predicted: Tensor) -> str | None:
    """What is wrong with the prediction; "" where it is right, None where the step does not decide."""
    measured, bent = (up - down) / 2, (up + down) / 2 - z
    size = max(float(measured.norm()), float(predicted.norm()))
    if size == 0:
        return ""  # a table that the logits do not depend on
    noise, error = float(bent.norm()) / size, float((measured - predicted).norm()) / size
    # A model that rounds, such as one in bf16, may show nothing of a small step.
    if not noise <= _MAX_NOISE or float(measured.norm()) < _MIN_SHOWN * float(predicted.norm()):
        return None
    if error <= _MAX_ERROR + 2 * noise:
        return ""
    ratio = float(predicted.norm()) / max(float(measured.norm()), 1e-300)
    along = float(measured @ predicted) / max(float(measured.norm() * predicted.norm()), 1e-300)
    if ratio < 0.01:
        return (
            "a change of its pooled embeddings changes the logits, and no gradient reaches it (torch.no_grad or "
            "detach in the model), so what it costs cannot be predicted; look it up with gradients"
        )
    if along > _MIN_ALONG:
        return (
            "its gradient predicts only a part of what a change of its pooled embeddings does to the logits "
            f"(correlation {along:.2f}, {ratio:.2g} times the change), because the model cuts some of it (detach) or "
            "has a gradient of its own, so what the table costs cannot be predicted; use it with gradients"
        )
    return (
        "a change of one example's pooled embedding does not change the logit of that example as its gradient predicts "
        f"(correlation {along:.2f}): the model reorders the rows of its lookup, or shares them among examples, so it "
        "is not known which example a row belongs to; look it up in the order of examples"
    )
