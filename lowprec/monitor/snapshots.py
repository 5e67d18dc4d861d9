"""Finds the checkpoint that was live at a time, by a date pattern."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from lowprec.core.errors import CheckpointError, ConfigError
from lowprec.storage import Location
from lowprec.traffic import format_time
from lowprec.traffic.schema import TimeUnit
from lowprec.traffic.window import UNITS_PER_SECOND

__all__ = ["Snapshots"]

# The fields of strftime that name a moment, and what they look like.
_FIELDS = {
    "Y": r"(?P<Y>\d{4})",
    "m": r"(?P<m>\d{2})",
    "d": r"(?P<d>\d{2})",
    "H": r"(?P<H>\d{2})",
    "M": r"(?P<M>\d{2})",
    "S": r"(?P<S>\d{2})",
    "s": r"(?P<s>\d+)",
}


@dataclass(frozen=True)
class Snapshots:
    """The checkpoints of a pattern such as `models/%Y-%m-%d/model.safetensors`; without a field, the only one."""

    pattern: str
    unit: TimeUnit | None

    def __post_init__(self) -> None:
        fields = self._fields
        unknown = [f for f in fields if f not in _FIELDS]
        if unknown or len(set(fields)) < len(fields):
            raise ConfigError(
                f'monitor.checkpoint "{self.pattern}": has the fields {", ".join("%" + f for f in fields)}; expected '
                f"each of {', '.join('%' + f for f in _FIELDS)} at most once (a percent sign is %%)"
            )
        if fields and "s" not in fields and not {"Y", "m", "d"} <= set(fields):
            raise ConfigError(
                f'monitor.checkpoint "{self.pattern}": does not name a day; expected %Y, %m and %d, or %s (seconds '
                "since 1970)"
            )
        if fields and self.unit is None:
            raise ConfigError(
                f'monitor.checkpoint "{self.pattern}": snapshots are chosen by date, and this traffic has no time'
            )

    def live_at(self, time: int) -> str:
        """The latest snapshot from `time` or before; raises `CheckpointError` where there is none."""
        if not self._fields:
            return self.pattern.replace("%%", "%")
        assert self.unit is not None
        limit = time / UNITS_PER_SECOND[self.unit]
        found = sorted(self._found())
        live = [path for moment, path in found if moment <= limit]
        if not live:
            there = f"the first of {len(found)} is {found[0][1]}" if found else "nothing matches the pattern"
            raise CheckpointError(
                f"monitor.checkpoint {self.pattern}: no snapshot was live at {format_time(time, self.unit)}: {there}; "
                "put the snapshot there, or set monitor.start"
            )
        return live[-1]

    @property
    def _fields(self) -> list[str]:
        return [f for f in re.findall(r"%(.)", self.pattern) if f != "%"]

    def _found(self) -> Iterator[tuple[float, str]]:
        """Every checkpoint with its moment, in seconds since 1970."""
        head, _, rest = self.pattern.partition("%")
        fixed, _, first = head.rpartition("/")
        parts = f"{first}%{rest}".split("/")
        root = Location.of(fixed or ("/" if head.startswith("/") else "."))
        for place, fields in _matching(root, parts, {}):
            try:
                yield _moment(fields), str(place)
            except ValueError:  # a 31st of February is no snapshot
                continue


def _matching(folder: Location, parts: list[str], fields: dict[str, str]) -> Iterator[tuple[Location, dict[str, str]]]:
    part, rest = parts[0], parts[1:]
    there = (folder / part).kind() is not None if "%" not in part else False
    for name in folder.names() if "%" in part else [part] * there:
        match = re.fullmatch(_expression(part), name)
        if match is None:
            continue
        known = fields | match.groupdict()
        if rest:
            yield from _matching(folder / name, rest, known)
        else:
            yield folder / name, known


def _expression(part: str) -> str:
    pieces = re.split(r"(%.)", part)
    return "".join(
        re.escape("%") if p == "%%" else _FIELDS[p[1]] if p.startswith("%") and len(p) == 2 else re.escape(p)
        for p in pieces
    )


def _moment(fields: dict[str, str]) -> float:
    if "s" in fields:
        return float(fields["s"])
    year, month, day, hour, minute, second = (int(fields.get(f, 0)) for f in "YmdHMS")
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()
