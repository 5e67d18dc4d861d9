"""Counts of the inputs of a window, and how they drift."""

__all__: list[str] = []
