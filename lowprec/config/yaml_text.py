"""YAML as the config file uses it: no repeated keys, keys that are text, and every mistake a `yaml.YAMLError`."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["parse_yaml"]


def parse_yaml(text: str) -> Any:
    """The document with keys as text, and dates as YAML reads them; raises `yaml.YAMLError`."""
    try:
        return _with_text_keys(yaml.load(text, _Loader))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or an alias refers to what it is in") from None


class _Loader(yaml.SafeLoader):
    """YAML without repeated keys: the last of two budgets would win without a message."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
                raise yaml.constructor.ConstructorError(None, None, f"a key must be text, not a {kind}", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key "{key.value}" is there twice', key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # PyYAML converts a scalar by its tag, such as the date 2026-02-30, without a check.
            value = f'"{node.value}" ' if isinstance(node, yaml.ScalarNode) else ""
            message = f"{value}is not a {node.tag.rpartition(':')[2]}: {error}"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {_key_text(key): _with_text_keys(inner) for key, inner in value.items()}
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list) else value


def _key_text(key: Any) -> str:
    """A key as it would be in JSON; a date is one of YAML's types, and not of JSON's."""
    if key is None or isinstance(key, bool):
        return "null" if key is None else str(key).lower()
    return str(key)
