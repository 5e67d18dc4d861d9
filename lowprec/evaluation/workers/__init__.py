"""One worker, wherever it runs, and what it keeps."""

__all__: list[str] = []
