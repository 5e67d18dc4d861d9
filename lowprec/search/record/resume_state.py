"""What a run began with that its config does not say, and that its resumption needs the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

from lowprec.plan import Plan
from lowprec.session import Session
from lowprec.storage import Location

__all__ = ["RunOrigin"]

_FILE = "origin.json"


@dataclass(frozen=True)
class RunOrigin:
    """cuts: by table, for those shared among workers in pieces, the first row of each piece; sums over bags depend on
    them to the last bit. calibration_sha256: of the file of `cost.calibration`, None without one. start: the plan that
    the search begins with, where it was given one.
    """

    cuts: Mapping[str, list[int]]
    calibration_sha256: str | None
    start: Mapping[str, str] | None = None

    @classmethod
    def of(cls, session: Session, start: Plan | None = None) -> Self:
        """What a run of this session would begin with."""
        path = session.config.cost.calibration
        digest = None if path is None else hashlib.sha256(Location.of(path).read_bytes()).hexdigest()
        plan = None if start is None else {unit: str(precision) for unit, precision in start.items()}
        return cls(session.placement.cuts if session.placement else {}, digest, plan)

    @classmethod
    def read(cls, folder: Location) -> Self | None:
        """As it was written to a run's folder; None where a run was killed before that, with nothing done."""
        try:
            return cls(**json.loads((folder / _FILE).read_bytes()))
        except FileNotFoundError:
            return None

    def write(self, folder: Location) -> None:
        """Keep it in a run's folder."""
        with (folder / _FILE).whole_file() as partial:
            partial.write_text(json.dumps(asdict(self), indent=2))
