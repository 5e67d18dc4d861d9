"""What a search keeps: trials, the state that a resume reads, the outcome."""

__all__: list[str] = []
