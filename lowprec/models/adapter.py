"""Low precision inside any `nn.Module`: its embedding bags are found and replaced per call, never rewritten.

The first pass over a batch runs the model as it is and records every call of an `nn.EmbeddingBag`: which table, which
ids, what came out. Every later pass over the same batch runs the same model with those outputs replaced. Nothing is
assumed about how the model gets from its inputs to its tables.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.core.errors import LowprecError, ModelError
from lowprec.models.inputs import ModelInputs, arguments_of, inputs_of
from lowprec.models.layers import LayerAt, LayerModules, replaced_forwards
from lowprec.models.outputs import Outputs, as_logits, check_probabilities
from lowprec.models.passes import Gradients, ReferencePass
from lowprec.models.table_modules import (
    check_ids,
    check_not_shared,
    check_plain,
    check_supported,
    named_embeddings,
    normalised,
    short_names,
)
from lowprec.ops.bags import BagCall
from lowprec.plan import Unit

__all__ = ["Gradients", "ModelAdapter", "ModelInputs", "ReferencePass", "inputs_of", "leaf_of"]

# Their kernels for inference give other last bits than those that record gradients.
_WITH_TWO_KERNELS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)


class ModelAdapter:
    """A user's model with its tables found.

    A table is called by the shortest end of its module path that is unique and does not begin with a digit:
    `tables.user_id` is `table:user_id`. Bags that share one weight are one table.

    Raises `ModelError` for a model without `nn.EmbeddingBag`, and for bags that low-precision serving has no form for
    (`max` pooling, `max_norm`).
    """

    def __init__(self, model: nn.Module, outputs: Outputs = "logits") -> None:
        """Find the tables. outputs: what the model returns; passes give logits, whatever it is."""
        self.model = model.eval()
        self.outputs = outputs
        # Whether logits of a pass that records gradients differ from those of one that does not: attention and
        # recurrent modules have a kernel for each. Other models are looked at by `check`.
        self.has_two_modes = any(isinstance(module, _WITH_TWO_KERNELS) for module in model.modules())
        paths: dict[int, list[tuple[str, nn.EmbeddingBag]]] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.EmbeddingBag):
                check_supported(path, module)
                paths.setdefault(id(module.weight), []).append((path, module))
        if not paths:
            found = named_embeddings(model)
            instead = f"; look ids of {', '.join(found)} up in an nn.EmbeddingBag and not in an nn.Embedding"
            raise ModelError(
                f"model {type(model).__name__}: no nn.EmbeddingBag inside; lowprec gives precisions to nn.EmbeddingBag "
                f"tables, called through their module (TorchScript and compiled models hide them)"
                f"{instead if found else ''}"
            )
        check_not_shared(model, {key: found[0][0] for key, found in paths.items()})
        names = short_names([found[0][0] for found in paths.values()])
        self._bags = {name: [bag for _, bag in found] for name, found in zip(names, paths.values(), strict=True)}
        self.layers = LayerModules(model)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The tables, in module order."""
        return tuple(Unit(f"table:{n}", *map(int, b[0].weight.shape)) for n, b in self._bags.items())

    @property
    def bags(self) -> dict[str, tuple[nn.EmbeddingBag, ...]]:
        """The modules of every table, by unit name."""
        return {f"table:{name}": tuple(bags) for name, bags in self._bags.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The fp32 weight [num_rows, dim] of every table, by unit name; no copy."""
        return {f"table:{name}": bags[0].weight.detach() for name, bags in self._bags.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(num_rows, dim) of every table, by unit name."""
        return {unit.name: (unit.num_rows, unit.dim) for unit in self.units}

    @property
    def table_parameters(self) -> tuple[Tensor, ...]:
        """The weights of the tables, as the model has them."""
        return tuple(bags[0].weight for bags in self._bags.values())

    @property
    def weight_names(self) -> dict[str, str]:
        """The name of every table's weight in a state dict, by unit name."""
        paths = {id(module): path for path, module in self.model.named_modules()}
        of_bags = ((name, paths[id(bags[0])]) for name, bags in self._bags.items())
        return {f"table:{name}": f"{path}.weight" if path else "weight" for name, path in of_bags}

    @property
    def has_rows(self) -> bool:
        """Whether the tables' rows are in this process: their weights are not on the meta device."""
        return not any(weight.is_meta for weight in self.weights.values())

    @property
    def other_embeddings(self) -> tuple[str, ...]:
        """Paths of `nn.Embedding` modules: they stay fp32, and people are told."""
        return tuple(path for path, module in self.model.named_modules() if isinstance(module, nn.Embedding))

    def trace_lookups(self, inputs: ModelInputs) -> tuple[BagCall, ...]:
        """The calls of the tables, without looking anything up: each returns zeros, float32[B, dim].

        For a model whose rows are elsewhere: its weights are never read. What it makes of zeros is thrown away.
        """
        calls: list[BagCall] = []

        def ask(name: str, bag: nn.EmbeddingBag, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            check_plain(name, bag)

            def asked(input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
                check_ids(name, bag, input)
                num_bags = len(input) if offsets is None else len(offsets) - bag.include_last_offset
                output = torch.zeros(num_bags, bag.embedding_dim)
                calls.append(normalised(f"table:{name}", bag, input, offsets, per_sample_weights, output))
                return output

            return asked

        with torch.inference_mode(), self.wrapped_forwards(ask):
            self._logits(inputs)
        return tuple(calls)

    def run_with_lookups(self, inputs: ModelInputs, calls: Sequence[BagCall]) -> ReferencePass:
        """The pass in which `calls`, those of `trace_lookups`, return their outputs."""
        with torch.inference_mode():
            logits = self.replayed(inputs, calls, [call.output for call in calls], is_reference=True)
        return ReferencePass(logits, tuple(calls))

    def reference(self, inputs: ModelInputs) -> ReferencePass:
        """Run the model as it is and record the calls of its tables."""
        calls: list[BagCall] = []
        with torch.inference_mode(), self.wrapped_forwards(_recorder(calls, lambda output: output)):
            logits = self._logits(inputs, is_reference=True)
        return ReferencePass(logits, tuple(calls))

    def differentiated(
        self, inputs: ModelInputs, calls: Sequence[BagCall] | None = None, layers: Sequence[str] = ()
    ) -> tuple[ReferencePass, Gradients]:
        """The reference pass with the calls of `layers`, and d logit / d output of every call.

        calls: what `trace_lookups` found, with outputs, for a model whose rows are elsewhere. Rows must not touch each
        other inside the model, which holds for anything that serves one example at a time. A call that the logits do
        not depend on has a gradient of zero. Raises `ModelError` for a model that PyTorch cannot differentiate.
        """
        recorded: list[BagCall] = list(calls or ())
        leaves: list[Tensor] = [leaf_of(call.output) for call in recorded]

        def watched(output: Tensor) -> Tensor:
            leaves.append(leaf_of(output))
            return leaves[-1]

        with torch.enable_grad():
            with self.layers.watched(layers, for_gradients=True) as layer_calls:
                if calls is None:
                    with self.wrapped_forwards(_recorder(recorded, watched)):
                        logits = self._logits(inputs, is_reference=True)
                else:
                    logits = self.replayed(inputs, calls, leaves, is_reference=True)
            outputs = [*leaves, *(call.output for call in layer_calls)]
            try:
                gradients = torch.autograd.grad(logits.sum(), outputs, allow_unused=True)
            except RuntimeError as error:
                raise ModelError(
                    f"model {type(self.model).__name__}: cannot be differentiated with respect to its pooled "
                    f"embeddings, which the profile needs: {' '.join(str(error).split())}"
                ) from error
        filled = tuple(torch.zeros_like(o) if g is None else g for g, o in zip(gradients, outputs, strict=True))
        detached = tuple(replace(call, output=call.output.detach()) for call in layer_calls)
        return (
            ReferencePass(logits.detach(), tuple(recorded), detached, is_differentiated=True),
            Gradients(filled[: len(leaves)], filled[len(leaves) :]),
        )

    def run_with_outputs(
        self, inputs: ModelInputs, reference: ReferencePass, outputs: Sequence[Tensor], layers: LayerAt = ()
    ) -> Tensor:
        """Logits float32[B] of the model when call k of the reference pass returns `outputs[k]` (float32[B, dim]).

        layers: those that are not fp32.
        """
        with torch.inference_mode(), self.layers.at(layers):
            return self.replayed(inputs, reference.calls, outputs)

    def replayed(
        self, inputs: ModelInputs, calls: Sequence[BagCall], outputs: Sequence[Tensor], *, is_reference: bool = False
    ) -> Tensor:
        """Logits of a pass in which `calls` return `outputs`; raises `ModelError` where they come in another order."""
        position = 0

        def replay(name: str, bag: nn.EmbeddingBag, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def replayed(*args: Any, **kwargs: Any) -> Tensor:
                nonlocal position
                if position == len(outputs) or calls[position].table != f"table:{name}":
                    raise ModelError(
                        f'model {type(self.model).__name__}: table "{name}" is called out of order in a second pass '
                        "over the same batch; the calls of tables must not depend on their outputs"
                    )
                position += 1
                return outputs[position - 1].clone()  # the model may change it in place

            return replayed

        with self.wrapped_forwards(replay):
            logits = self._logits(inputs, is_reference=is_reference)
        if position != len(outputs):
            raise ModelError(
                f"model {type(self.model).__name__}: called its tables {len(outputs)} times at first and {position} "
                "times in a second pass over the same batch; the calls of tables must not depend on their outputs"
            )
        return logits

    def as_served(self, inputs: ModelInputs, reference: ReferencePass) -> ReferencePass:
        """The same pass with the logits of one that records no gradients, as plans are evaluated and served."""
        outputs = [call.output for call in reference.calls]
        return replace(reference, logits=self.run_with_outputs(inputs, reference, outputs), is_differentiated=False)

    def _logits(self, inputs: ModelInputs, *, is_reference: bool = False) -> Tensor:
        """Logits of the model. is_reference: outputs that are declared probabilities have to be some."""
        model = type(self.model).__name__
        try:
            returned = self.model(*arguments_of(self.model, inputs))
        except LowprecError:
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise ModelError(f"model {model}: {_what_went_wrong(error)}") from error
        if is_reference and self.outputs == "probabilities":
            check_probabilities(returned, model=model)
        return as_logits(returned, inputs.dense.shape[0], self.outputs, model=model)

    @contextmanager
    def wrapped_forwards(
        self, wrap: Callable[[str, nn.EmbeddingBag, Callable[..., Tensor]], Callable[..., Tensor]]
    ) -> Iterator[None]:
        """Every bag's `forward` wrapped while the context lasts."""
        bags = [(name, bag) for name, found in self._bags.items() for bag in found]
        with replaced_forwards({bag: wrap(name, bag, bag.forward) for name, bag in bags}):
            yield


def _recorder(
    calls: list[BagCall], answer: Callable[[Tensor], Tensor]
) -> Callable[[str, nn.EmbeddingBag, Callable[..., Tensor]], Callable[..., Tensor]]:
    """A wrapper of forwards that appends every call to `calls` and gives the model a copy of `answer` of its output."""

    def record(name: str, bag: nn.EmbeddingBag, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
            check_ids(name, bag, input)
            with torch.no_grad():
                output = forward(input, offsets, per_sample_weights)
            calls.append(normalised(f"table:{name}", bag, input, offsets, per_sample_weights, output))
            return answer(output).clone()  # the model may change it in place

        return recorded

    return record


def leaf_of(output: Tensor) -> Tensor:
    """The output of a call as a tensor of its own that gradients lead to."""
    return output.detach().clone().requires_grad_() if output.is_inference() else output.detach().requires_grad_()


def _what_went_wrong(error: BaseException) -> str:
    """The error and where it was raised; a missing feature is the most frequent one."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    hint = "; is it in traffic.sparse?" if isinstance(error, KeyError) else ""
    return f"its forward raised {type(error).__name__}: {' '.join(str(error).split())}{where}{hint}"
