"""Measured lookup times of a machine, and what they say about the latency of a plan."""

__all__: list[str] = []
