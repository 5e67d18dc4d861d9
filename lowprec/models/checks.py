"""Checks that a model gives the same logits when the outputs of its tables are replayed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowprec.core.errors import ModelError
from lowprec.models.adapter import ModelAdapter, leaf_of
from lowprec.models.inputs import ModelInputs
from lowprec.models.passes import ReferencePass

__all__ = ["check_passes"]


def check_passes(adapter: ModelAdapter, inputs: ModelInputs, reference: ReferencePass) -> None:
    """Raise `ModelError` unless replaced outputs give what a low-precision model would.

    That needs two things: every call of a table returns the plain embedding bag of its weight (what is answered for
    a model without rows does), and the model run again on the same batch with the same outputs gives the same bits.
    Passes that record gradients are compared with their like, because kernels may differ; whether they do is noted in
    the adapter.
    """
    for call in reference.calls if adapter.has_rows else ():
        plain = nn.functional.embedding_bag(
            call.indices,
            adapter.weights[call.table],
            call.offsets,
            mode=call.mode,
            per_sample_weights=call.weights,
            include_last_offset=True,
        )
        if plain.shape != call.output.shape or not torch.allclose(plain, call.output, rtol=1e-4, atol=1e-6):
            raise ModelError(
                f'"{call.table}": its module returns something else than the embedding bag of its weight (a '
                "forward of its own, or a wrapper); do that outside of the table"
            )
    for _ in range(2):  # what changes its input once and for all shows in the first, what goes on changing in both
        if not torch.equal(_again(adapter, inputs, reference), reference.logits):
            raise ModelError(
                f"model {type(adapter.model).__name__}: gives other logits when it runs again on the same batch: it "
                "changes its inputs in place, or draws random numbers; plans could not be compared with it"
            )
    if reference.is_differentiated and not adapter.has_two_modes:
        adapter.has_two_modes = not torch.equal(adapter.as_served(inputs, reference).logits, reference.logits)


def _again(adapter: ModelAdapter, inputs: ModelInputs, reference: ReferencePass) -> Tensor:
    """The logits of the same pass once more, in the same mode."""
    outputs = [call.output for call in reference.calls]
    if not reference.is_differentiated:
        return adapter.run_with_outputs(inputs, reference, outputs)
    with torch.enable_grad():
        return adapter.replayed(inputs, reference.calls, [leaf_of(output) for output in outputs]).detach()
