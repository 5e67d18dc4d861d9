"""Training of a model on logged traffic."""

__all__: list[str] = []
