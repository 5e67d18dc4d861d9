"""The test of a deployment, its history and the state of a window."""

__all__: list[str] = []
