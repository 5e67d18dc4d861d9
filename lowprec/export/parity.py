"""Compares a loaded export with the certified evaluation, bit for bit, on traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.core.errors import ExportError
from lowprec.evaluation.workers.worker import evaluator_of
from lowprec.models.inputs import ModelInputs, arguments_of, inputs_of
from lowprec.models.outputs import Outputs, as_logits
from lowprec.ops.served_bag import ServedBag
from lowprec.plan import Plan
from lowprec.session import Session
from lowprec.traffic import BadRow

__all__ = ["Certified", "Parity", "certified_outputs", "check_parity", "check_program"]


@dataclass(frozen=True)
class Certified:
    """What the evaluation finds of a plan on one batch: logits float32[B], pooled float32[B, dim] of every call."""

    inputs: ModelInputs
    tables: tuple[str, ...]
    pooled: tuple[Tensor, ...]
    logits: Tensor
    bad_rows: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class Parity:
    """What was compared, and found equal to the bit."""

    window: str
    num_examples: int
    num_lookups: int

    def to_dict(self) -> dict[str, Any]:
        """For documents."""
        return {"equal": "to the bit", **vars(self)}


def certified_outputs(session: Session, plan: Plan, window: str, num_batches: int) -> list[Certified]:
    """Batches at equal distances in a window, as the evaluation answers them."""
    traffic = session.window(window)
    evaluator = evaluator_of(session.spec, session.adapter)
    count = min(num_batches, traffic.num_batches)
    found = []
    with evaluator.using(session.forms), _threads(session.spec.threads):
        for k in range(count):
            batch = traffic.batch(k * traffic.num_batches // count)
            if not batch.num_rows:
                continue
            inputs = inputs_of(batch)
            logits = torch.from_numpy(evaluator.logits(batch, [plan]).plans[0])
            calls = session.adapter.reference(inputs).calls
            pooled = evaluator.tables.pooled(calls, [{plan[call.table]} for call in calls])
            outputs = tuple(of[plan[call.table]] for of, call in zip(pooled, calls, strict=True))
            tables = tuple(call.table for call in calls)
            found.append(Certified(inputs, tables, outputs, logits, batch.bad_rows))
    evaluator.outputs.check()
    if not found:
        raise ExportError(
            f"export: windows.{window} has no usable row, so that nothing can be compared; choose another"
        )
    return found


def check_parity(session: Session, module: nn.Module, expected: Sequence[Certified], window: str) -> Parity:
    """Raise `ExportError` where a loaded module differs in a pooled embedding or a logit from what was certified."""
    with _threads(session.spec.threads):
        for batch in expected:
            with _pooled_by(module) as pooled:
                logits = _logits(module, batch.inputs, session.adapter.outputs)
            if len(pooled) != len(batch.pooled):
                raise ExportError(
                    f"export: the model calls its tables {len(batch.pooled)} times, and {len(pooled)} times when "
                    "served; it may look at the type of its modules or at their weights"
                )
            for table, found, wanted in zip(batch.tables, pooled, batch.pooled, strict=True):
                if not torch.equal(found, wanted):
                    raise ExportError(f'export: "{table}" {_difference(found, wanted)}; nothing was exported')
            if not torch.equal(logits, batch.logits):
                raise ExportError(f"export: the logits {_difference(logits, batch.logits)}; nothing was exported")
    examples = sum(len(batch.logits) for batch in expected)
    return Parity(
        session.window_text(window), examples, sum(len(batch.pooled) * len(batch.logits) for batch in expected)
    )


def check_program(name: str, session: Session, program: Callable[..., Tensor], expected: Sequence[Certified]) -> None:
    """Raise `ExportError` where a program differs in a logit from what was certified."""
    with _threads(session.spec.threads):
        for batch in expected:
            try:
                logits = _logits(program, batch.inputs, session.adapter.outputs)
            except RuntimeError as error:
                raise ExportError(f"export: {name}: does not run: {' '.join(str(error).split())[:300]}") from None
            if not torch.equal(logits, batch.logits):
                raise ExportError(
                    f"export: {name}: the logits {_difference(logits, batch.logits)}; the model may decide in Python "
                    f"what it does with a batch, which {name} keeps as it was for the first one"
                )


def _logits(module: Callable[..., Tensor], inputs: ModelInputs, outputs: Outputs) -> Tensor:
    """Logits of what is served, converted as the evaluation does: it returns what the model returns."""
    arguments = arguments_of(module, inputs) if isinstance(module, nn.Module) else (inputs.dense, dict(inputs.sparse))
    with torch.inference_mode():
        return as_logits(module(*arguments), len(inputs.dense), outputs, model="as served")


@contextmanager
def _pooled_by(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the tables of a module return while the context lasts."""
    pooled: list[Tensor] = []
    bags = [m for m in module.modules() if isinstance(m, ServedBag | nn.EmbeddingBag)]
    hooks = [bag.register_forward_hook(lambda _, __, output: pooled.append(output.clone())) for bag in bags]
    try:
        yield pooled
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _difference(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"are {list(found.shape)} when served and {list(wanted.shape)} when evaluated"
    wrong = found != wanted
    where = wrong.nonzero()[0].tolist()
    values = f"{found[tuple(where)]:.9g} and not {wanted[tuple(where)]:.9g}"
    return f"differ in {int(wrong.sum())} of {wrong.numel()} values when served, first at {where}: {values}"
