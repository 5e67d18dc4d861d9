"""Proposals: which plans are evaluated next."""

__all__: list[str] = []
