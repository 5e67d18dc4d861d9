"""A config, opened: traffic, windows, model, checkpoint and workers.

A search builds its space and its costs on top of a session; debug, export, monitor and the launch gate need no more.
"""

from lowprec.session.planned import read_planned
from lowprec.session.session import Session, open_session
from lowprec.session.workers import open_workers

__all__ = ["Session", "open_session", "open_workers", "read_planned"]
