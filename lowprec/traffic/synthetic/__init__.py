"""Synthetic traffic with a known truth."""

__all__: list[str] = []
