"""Hints for tensor names with a prefix of a wrapper (`torch.compile`, DDP, Lightning)."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["wrapper_hint"]

# torch.compile and DistributedDataParallel keep the model in an attribute of this name.
_WRAPPERS = ("_orig_mod", "module")


def wrapper_hint(missing: Collection[str], unexpected: Collection[str]) -> str:
    """A clause that says how to get rid of prefixes, "" where names differ in another way.

    missing: names of the model that the checkpoint lacks; unexpected: names of the checkpoint that the model lacks.
    """
    if not missing or not unexpected:
        return ""
    if prefix := _prefix(missing, unexpected) or _wrappers_of(unexpected):
        return f'every name begins with "{prefix}": save model.{prefix}state_dict()'
    if prefix := _prefix(unexpected, missing) or _wrappers_of(missing):
        return f'every name of the model begins with "{prefix}": let model.factory return the model without its wrapper'
    inner = [w for w in _WRAPPERS if any(w in name.split(".") for name in unexpected)]
    if {_without(inner, name) for name in unexpected} >= set(missing):
        named = " and ".join(f'"{wrapper}."' for wrapper in inner)
        return f"names hold {named} of wrapped modules: rename them without"
    return ""


def _prefix(names: Collection[str], prefixed: Collection[str]) -> str:
    """What has to be put before each of the names to have it among the others."""
    first = min(names)
    for name in sorted(prefixed):
        prefix = name.removesuffix(first)
        if prefix != name and prefix.endswith(".") and all(f"{prefix}{n}" in prefixed for n in names):
            return prefix
    return ""


def _wrappers_of(names: Collection[str]) -> str:
    """The attributes of wrappers that all names begin with, whatever follows."""
    prefix = ""
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if parts[0] not in _WRAPPERS or len(set(parts)) > 1:
            break
        prefix += f"{parts[0]}."
    return prefix


def _without(wrappers: Collection[str], name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)
