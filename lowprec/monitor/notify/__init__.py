"""Notifications: command, textfile, webhook."""

__all__: list[str] = []
