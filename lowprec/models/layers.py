"""The FC layers inside any `nn.Module`: found, and computed at low precision without rewriting the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lowprec.core.byte_lru import ByteLru
from lowprec.core.errors import ModelError, WeightError
from lowprec.models.table_modules import short_names
from lowprec.ops.linear import LowLinear, low_linear
from lowprec.plan import Form, Precision, Unit

__all__ = ["LayerAt", "LayerCall", "LayerModules", "any_shape", "in_fp32", "replaced_forwards"]

# Of layers made for low precisions, counted as fp32: one has up to 24 forms while the best of them is looked for.
MAX_LOW_BYTES = 256 << 20

# The precision and form of each layer that is not fp32, in the order of layers.
LayerAt = tuple[tuple[str, Precision, Form | None], ...]


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer in the reference: input float32[..., in], output float32[..., out], in whichever shape.

    Of a layer under autocast, these are bf16 numbers.

    position: of the module among those that share the layer's weight.
    """

    layer: str
    position: int
    input: Tensor
    output: Tensor


class LayerModules:
    """Every `nn.Linear` of a model. Modules that share a weight are one layer.

    The output projection of `nn.MultiheadAttention` is left out: attention reads its weight and never calls it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find them; raises nothing: what cannot be low-precision says so when it is to be."""
        paths: dict[int, list[tuple[str, nn.Linear]]] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
                paths.setdefault(id(module.weight), []).append((path, module))
        names = short_names([found[0][0] for found in paths.values()])
        self._modules = {
            f"layer:{name}": [module for _, module in found] for name, found in zip(names, paths.values(), strict=True)
        }
        self._paths = {name: found[0][0] for name, found in zip(self._modules, paths.values(), strict=True)}
        self._low = ByteLru(MAX_LOW_BYTES, keep=1)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The layers, in module order."""
        return tuple(Unit(name, *map(int, found[0].weight.shape)) for name, found in self._modules.items())

    @property
    def weights(self) -> dict[str, Tensor]:
        """The fp32 weight [out, in] of every layer, by unit name; no copy."""
        return {name: found[0].weight.detach() for name, found in self._modules.items()}

    @property
    def paths(self) -> dict[str, str]:
        """The module path of every layer, by unit name; of those that share a weight the first."""
        return dict(self._paths)

    def why_fp32(self, layer: str) -> str | None:
        """Why a layer cannot be below fp32, for people; None where it can."""
        for module in self._modules[layer]:
            if type(module).forward is not nn.Linear.forward:
                return f"is a {type(module).__name__} with a forward of its own"
            if module.weight.dtype != torch.float32:
                return f"has a weight of {module.weight.dtype}"
        return None

    def modules(self, layer: str) -> Sequence[nn.Linear]:
        """The modules of a layer."""
        return self._modules[layer]

    def low(self, layer: str, position: int, precision: Precision, form: Form | None) -> LowLinear:
        """A module of a layer at a precision; those used last are kept.

        Raises `ModelError` for one that is no plain fp32 layer.
        """
        module = self._modules[layer][position]

        def made() -> LowLinear:
            if type(module).forward is not nn.Linear.forward or module.weight.dtype != torch.float32:
                raise ModelError(
                    f'model: "{layer}" is a {type(module).__name__} of {module.weight.dtype} with a forward of its own '
                    "or another type of weight; fix it to fp32 in space.units"
                )
            try:
                return low_linear(module.weight, module.bias, precision, form)
            except WeightError as error:
                raise WeightError(f'"{layer}": {error}; fix it to fp32 or bf16 in space.units') from None

        return self._low.get((layer, position, precision, form), made, lambda _: 4 * module.weight.numel())

    @contextmanager
    def at(self, chosen: LayerAt) -> Iterator[None]:
        """The model computes the chosen layers at their precisions while the context lasts."""
        forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        for layer, precision, form in chosen:
            for position, module in enumerate(self._modules[layer]):
                forwards[module] = any_shape(self.low(layer, position, precision, form))
        with replaced_forwards(forwards):
            yield

    @contextmanager
    def watched(self, layers: Sequence[str], *, for_gradients: bool = False) -> Iterator[list[LayerCall]]:
        """The calls of some layers while the context lasts, in order, kept as they were whatever the model does next.

        for_gradients: the logits can be differentiated by their outputs.
        """
        calls: list[LayerCall] = []

        def watch(layer: str, position: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def watched(input: Tensor) -> Tensor:
                returned = forward(input)
                output = returned.float()
                if for_gradients and not output.requires_grad:
                    output = output.detach().requires_grad_()
                calls.append(LayerCall(layer, position, input.detach().float().clone(), output))
                return output.clone() if returned.dtype == output.dtype else output.to(returned.dtype)

            return watched

        wrapped: dict[nn.Module, Callable[..., Tensor]] = {
            module: watch(layer, position, module.forward)
            for layer in layers
            for position, module in enumerate(self._modules[layer])
        }
        with replaced_forwards(wrapped):
            yield calls


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Modules whose `forward` is another one while the context lasts; an instance attribute, so no class changes."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, old in before.items():
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


def any_shape(low: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A forward that takes inputs of any number of dimensions, of one that takes float32[B, in].

    Under autocast it returns what a layer of the model would there: the same numbers in autocast's type.
    """

    def forward(input: Tensor) -> Tensor:
        flat = in_fp32(low, input.reshape(-1, input.shape[-1]))
        if torch.is_autocast_enabled("cpu"):
            flat = flat.to(torch.get_autocast_dtype("cpu"))
        return flat.reshape(*input.shape[:-1], flat.shape[-1])

    return forward


def in_fp32(low: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a layer that takes float32[B, in] returns for inputs [B, in] of any float type, whether autocast is on."""
    if not torch.is_autocast_enabled("cpu"):
        return low(x.float().contiguous())
    with torch.autocast("cpu", enabled=False):
        return low(x.float().contiguous())
