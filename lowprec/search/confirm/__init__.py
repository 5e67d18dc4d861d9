"""Which plans are confirmed on the confirm window, and which is recommended."""

__all__: list[str] = []
