"""Statistics of a race: candidates on a sample of the window."""

__all__: list[str] = []
