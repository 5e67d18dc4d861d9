"""Exact evaluation: a forward pass with every plan of a batch of plans."""

__all__: list[str] = []
