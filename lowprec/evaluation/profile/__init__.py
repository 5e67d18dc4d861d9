"""The statistics of one pass that predict the gap of any plan."""

__all__: list[str] = []
