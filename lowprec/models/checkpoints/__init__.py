"""Checkpoints, read by tensor and by row range."""

__all__: list[str] = []
