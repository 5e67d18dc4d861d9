"""Bounds and intervals for means over examples."""

__all__: list[str] = []
