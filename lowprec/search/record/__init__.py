"""Records of a search: trials, resume state, outcome."""

__all__: list[str] = []
