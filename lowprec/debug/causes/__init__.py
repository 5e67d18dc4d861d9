"""Causes of an error: rows, channels, differences from the certified unit, mismatched layer forms."""

__all__: list[str] = []
