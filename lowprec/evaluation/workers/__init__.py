"""Workers and their caches."""

__all__: list[str] = []
