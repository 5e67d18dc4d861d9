"""Confirmation: chooses finalists, evaluates them on the confirm window, recommends one."""

__all__: list[str] = []
