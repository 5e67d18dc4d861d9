"""Parameters outside tables and FC layers. They stay fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lowprec.core.sizes import bytes_text
from lowprec.models.adapter import ModelAdapter

__all__ = ["Uncovered", "note_on_uncovered", "uncovered_parameters"]

_NUM_NAMED = 5


@dataclass(frozen=True)
class Uncovered:
    """Parameters of one of PyTorch's modules, or one parameter of any other module. kind: for people."""

    name: str
    kind: str
    num_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For documents."""
        return {"name": self.name, "kind": self.kind, "bytes": self.num_bytes}


def uncovered_parameters(adapter: ModelAdapter) -> tuple[Uncovered, ...]:
    """What is neither a table nor part of an FC layer (its weight and bias), the largest first; each once."""
    tables = {id(weight) for weight in adapter.table_parameters}
    layers = [m for unit in adapter.layers.units for m in adapter.layers.modules(unit.name)]
    seen = tables | {id(parameter) for module in layers for parameter in module.parameters()}
    found: dict[tuple[str, str], int] = {}
    for path, module in adapter.model.named_modules():
        is_torch = type(module).__module__.startswith("torch.nn.")
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = f"nn.{type(module).__name__}" if is_torch else "nn.Parameter"
            kind += "" if parameter.dtype == torch.float32 else f" of {str(parameter.dtype).removeprefix('torch.')}"
            key = path if is_torch and path else f"{path}.{name}".lstrip("."), kind
            found[key] = found.get(key, 0) + parameter.numel() * parameter.element_size()
    order = sorted(found.items(), key=lambda item: -item[1])
    return tuple(Uncovered(name, kind, num_bytes) for (name, kind), num_bytes in order)


def note_on_uncovered(uncovered: tuple[Uncovered, ...]) -> list[str]:
    """One sentence about them; nothing where there are none."""
    if not uncovered:
        return []
    named = [f"{u.name} ({u.kind}, {bytes_text(u.num_bytes)})" for u in uncovered[:_NUM_NAMED]]
    more = len(uncovered) - len(named)
    total = bytes_text(sum(u.num_bytes for u in uncovered))
    return [
        f"parameters outside tables and FC layers stay fp32 and are in no bytes of a plan, {total} in all: "
        f"{', '.join(named)}{f' and {more} more' if more else ''}"
    ]
