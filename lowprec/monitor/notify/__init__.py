"""How people hear of a window: command, textfile, webhook."""

__all__: list[str] = []
