"""The job of a search: a session, its search space and its costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lowprec.config import Config
from lowprec.evaluation.profile.profile import Column, columns_of
from lowprec.evaluation.profile.profile_file import ProfileOrigin
from lowprec.evaluation.profile.window_profile import MeasuredProfile, measure_profile
from lowprec.evaluation.rows import TableUse
from lowprec.evaluation.workers.auto_workers import SEARCH_PASSES, Work
from lowprec.evaluation.workers.worker import Workers
from lowprec.models.adapter import inputs_of
from lowprec.models.called import called_units
from lowprec.plan import Precision
from lowprec.search.space.space import SearchSpace, build_space
from lowprec.session import Session, open_session
from lowprec.session.costs import Costs
from lowprec.session.session import check_labels
from lowprec.storage import Location
from lowprec.traffic import TrafficWindow

__all__ = ["SearchJob", "job_of", "open_job"]


@dataclass(frozen=True, kw_only=True)
class SearchJob(Session):
    """A session and the plans that a search of it may choose from.

    fp32_layers: those that can be nothing but fp32, with the reason.
    """

    space: SearchSpace
    fp32_layers: Mapping[str, str] = field(default_factory=dict)

    def search_work(self) -> Work:
        """What a search does."""
        windows = [self.window(name) for name in ("search", "confirm")]
        return Work(windows[0], SEARCH_PASSES * sum(window.num_batches for window in windows))

    def search_costs(self, use: Mapping[str, TableUse]) -> Costs:
        """What plans of the space cost under traffic that uses the tables so.

        Raises `ConfigError` where that cannot be said.
        """
        return self.costs(use, [(unit, p) for d in self.space.decisions for unit in d.units for p in d.choices])

    def profile_origin(self, name: str) -> ProfileOrigin:
        """What a profile of the window called `name` is of."""
        window, *traffic, _ = self.with_forms({}).evaluated_on(name, self.window(name))
        return ProfileOrigin(
            checkpoint_sha256=self.checkpoint_sha256,
            window=str(window),
            traffic=hashlib.sha256(json.dumps(traffic, default=str).encode()).hexdigest()[:16],
            row_range=self.config.space.row_range,
            columns=self.columns,
        )

    @property
    def columns(self) -> tuple[Column, ...]:
        """Every unit at every low precision that a plan of the space may give it, in the order of units."""
        choices = {unit: set(d.choices) for d in self.space.decisions for unit in d.units}
        return tuple(c for c in columns_of(self.units, Precision) if c[1] in choices[c[0]])

    def measure_profile(
        self,
        workers: Workers,
        name: str,
        window: TrafficWindow,
        *,
        quarantine: Location,
        on_progress: Callable[[int], None] | None = None,
    ) -> MeasuredProfile:
        """Profile a window; bad rows are written to `quarantine`, and too many of them stop the job."""
        measured = measure_profile(
            workers,
            window,
            self.columns,
            forms=self.forms,
            by_group=self.config.traffic.group is not None,
            batches_per_task=self.config.evaluation.batches_per_task,
            max_bad_fraction=self.config.traffic.max_bad_fraction,
            on_progress=on_progress,
        )
        self.judge_rows(name, measured.rows, measured.bad_rows, quarantine)
        check_labels(name, measured.rows, measured.profile.num_rows)
        return measured


def open_job(config: Config, *, is_placed: bool = True) -> SearchJob:
    """Open a session and find what its search may choose from; raises a `LowprecError` for whatever does not fit.

    is_placed: tables too, on the workers of the config.
    """
    return job_of(open_session(config, is_placed=is_placed))


def job_of(session: Session) -> SearchJob:
    """The search of a session; raises `ConfigError` where the config's space does not fit its units."""
    config, fixed = session.config, _fp32_layers(session)
    # By latency a larger precision may be the faster one, so no choice is ruled out by its bytes then.
    space = build_space(session.units, config.space, prune=config.cost.calibration is None, fp32=fixed)
    return SearchJob(**vars(session), space=space, fp32_layers=fixed)


def _fp32_layers(session: Session) -> dict[str, str]:
    """The layers that cannot be below fp32 and why: of another kind, or not called on the search window's first batch.

    Where the window has no rows, nothing is known of calls.
    """
    if session.config.space.layers is None:
        return {}
    layers = session.adapter.layers
    found = {unit.name: why for unit in layers.units if (why := layers.why_fp32(unit.name))}
    window = session.find_window("search")
    batch = window.batch(0) if window is not None else None
    if batch is not None and batch.num_rows:
        called = called_units(session.adapter, inputs_of(batch))
        uncalled = [unit.name for unit in layers.units if unit.name not in called]
        found |= {name: "is not called through its module" for name in uncalled}
    return found
