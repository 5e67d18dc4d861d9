"""What every part uses and what uses none of them: errors, sizes, progress, time limits, exit codes."""

__all__: list[str] = []
