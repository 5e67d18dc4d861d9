"""The command line: parse, one call, print."""

__all__: list[str] = []
