"""What may be chosen for each unit, and what it costs."""

__all__: list[str] = []
