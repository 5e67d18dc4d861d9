"""The search space: allowed precisions, layer forms, plans by hand."""

__all__: list[str] = []
