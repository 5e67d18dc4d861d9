"""The dense part, run once for each plan on a batch; plans share a pass where batches are small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowprec.core.errors import LowprecError
from lowprec.models.adapter import ModelAdapter, ModelInputs, ReferencePass
from lowprec.models.layers import LayerAt

__all__ = ["STACKED_ROWS", "DensePasses"]

# Batches of a quarter of that, and less, share a pass of so many rows: with fewer a row takes longer, with more it does
# not take less (`make bench NAME=stacked`).
STACKED_ROWS, MIN_PLANS = 1024, 4


class DensePasses:
    """Passes of a model's dense part with pooled outputs replaced.

    Whether plans share a pass changes no bit of their logits: the first time that as many rows of as many plans come,
    each of them has a pass of its own too, and a model whose rows touch each other, or whose matrix products depend on
    how many rows there are, has them for ever.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        """Run the adapter's model."""
        self._adapter = adapter
        # By rows of a batch and number of plans.
        self._can_share: dict[tuple[int, int], bool] = {}

    def logits(
        self,
        inputs: ModelInputs,
        reference: ReferencePass,
        outputs: Sequence[Sequence[Tensor]],
        layers: Sequence[LayerAt] | None = None,
    ) -> NDArray[np.float32]:
        """Logits float32[P, B] when call k of the reference pass gives `outputs[p][k]`, float32[B, dim], to plan p.

        layers: those of each plan that are not fp32; where one has such, no plan shares a pass.
        """
        num_rows = len(reference.logits)
        if layers is not None and any(layers):
            pairs = zip(outputs, layers, strict=True)
            return np.stack([self._adapter.run_with_outputs(inputs, reference, o, at).numpy() for o, at in pairs])
        size = STACKED_ROWS // num_rows if num_rows <= STACKED_ROWS // MIN_PLANS else 1
        found = np.empty((len(outputs), num_rows), dtype=np.float32)
        shared: dict[int, ModelInputs] = {}
        for first in range(0, len(outputs), size):
            group = outputs[first : first + size]
            if len(group) > 1 and len(group) not in shared:
                shared[len(group)] = inputs.repeated(len(group))
            found[first : first + len(group)] = self._group(inputs, shared.get(len(group)), reference, group)
        return found

    def _group(
        self,
        inputs: ModelInputs,
        shared: ModelInputs | None,
        reference: ReferencePass,
        outputs: Sequence[Sequence[Tensor]],
    ) -> NDArray[np.float32]:
        shape = len(reference.logits), len(outputs)
        can_share = shared is not None and self._can_share.get(shape)
        if shared is not None and can_share:
            return self._stacked(shared, reference, outputs)
        alone = np.stack([self._adapter.run_with_outputs(inputs, reference, of_plan).numpy() for of_plan in outputs])
        if shared is not None and can_share is None:
            try:
                self._can_share[shape] = np.array_equal(self._stacked(shared, reference, outputs), alone)
            except LowprecError:
                self._can_share[shape] = False
        return alone

    def _stacked(
        self, shared: ModelInputs, reference: ReferencePass, outputs: Sequence[Sequence[Tensor]]
    ) -> NDArray[np.float32]:
        together = [torch.cat(of_call) for of_call in zip(*outputs, strict=True)]
        logits: NDArray[np.float32] = self._adapter.run_with_outputs(shared, reference, together).numpy()
        return logits.reshape(len(outputs), -1)
