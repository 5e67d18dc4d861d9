"""Builds a model from the name of its factory."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowprec.core.errors import ConfigError, LowprecError, ModelError
from lowprec.traffic.schema import Schema

__all__ = ["build_model", "load_factory", "without_table_init"]

# Methods of tensors that initial values are made with; those of torch.nn.init as well.
_FILLS = frozenset(
    ("uniform_", "normal_", "zero_", "fill_", "copy_", "mul_", "div_", "add_", "sub_", "clamp_", "erfinv_", "random_")
)


def load_factory(name: str) -> Callable[..., Any]:
    """The function called `package.module:function`, imported with the current folder on the path.

    Raises `ConfigError` where the name has another form, `ModelError` where it cannot be imported.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise ConfigError(f'model.factory "{name}": expected package.module:function')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        raise ModelError(
            f'model.factory "{name}": cannot import {module_name} from {os.getcwd()}: {_what(error)}'
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ModelError(f'model.factory "{name}": module {module_name} has no function {function_name}')
    loaded: Callable[..., Any] = function
    return loaded


def build_model(factory: str, args: Mapping[str, Any], schema: Schema) -> nn.Module:
    """The model that a factory makes of `args`, and of `schema` too where it takes a parameter of that name.

    Raises `ConfigError` where the arguments do not fit the function, `ModelError` where it fails or returns no module.
    """
    function = load_factory(factory)
    signature = inspect.signature(function)
    arguments = {**args, "schema": schema} if "schema" in signature.parameters else dict(args)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"model.args: do not fit {factory}{signature}: {error}") from None
    try:
        model = function(**arguments)
    except LowprecError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelError(f'model.factory "{factory}": failed with {_what(error)}') from error
    if not isinstance(model, nn.Module):
        raise ModelError(f'model.factory "{factory}": must return a torch.nn.Module; got {type(model).__name__}')
    return model


@contextmanager
def without_table_init(*, without_rows: bool = False) -> Iterator[None]:
    """Leave new embedding tables uninitialised, so that they commit no memory before their weights are loaded.

    without_rows: on the meta device, so that they do not even take addresses. What a factory then fills them with
    (`init_fn` of TorchRec's tables, `nn.init`) does nothing.
    Replaces the constructor of `nn.EmbeddingBag` in the whole process: not for several threads.
    """
    original = nn.EmbeddingBag.__init__
    filling = _Filling()

    def construct(bag: nn.EmbeddingBag, *args: Any, **kwargs: Any) -> None:
        # On the instance, so that it also hides what subclasses (defined now or later) make of the method.
        vars(bag)["reset_parameters"] = _nothing
        if without_rows:
            kwargs["device"] = "meta"
        try:
            original(bag, *args, **kwargs)
        finally:
            del vars(bag)["reset_parameters"]
        filling.tables.append(bag.weight)

    setattr(nn.EmbeddingBag, "__init__", construct)  # noqa: B010  (mypy refuses the plain assignment)
    try:
        with filling:
            yield
    finally:
        setattr(nn.EmbeddingBag, "__init__", original)  # noqa: B010


class _Filling(TorchFunctionMode):
    """What fills a tensor does nothing to tables: their pages would be written, to be replaced by the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, is_init = getattr(func, "__name__", ""), getattr(func, "__module__", "") == "torch.nn.init"
        if name in _FILLS or is_init:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and self._is_table(target):
                return target
        return func(*args, **kwargs)

    def _is_table(self, tensor: Tensor) -> bool:
        """Whether it is the memory of a table; `weight.data` is another tensor with the same."""
        place = tensor.untyped_storage().data_ptr()
        return place != 0 and any(place == table.untyped_storage().data_ptr() for table in self.tables)


def _nothing() -> None:
    """What `reset_parameters` does meanwhile."""


def _what(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
