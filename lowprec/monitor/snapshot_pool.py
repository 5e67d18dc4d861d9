"""The model that was live in a window: a snapshot with its workers."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass

from lowprec.config import Config
from lowprec.core.errors import ConfigError, TrafficError
from lowprec.core.progress import Progress
from lowprec.evaluation.workers.auto_workers import MONITOR_PASSES, Work
from lowprec.evaluation.workers.worker import Workers
from lowprec.monitor.certified import Certified, CertifiedCounts
from lowprec.monitor.deployment import Deployment
from lowprec.monitor.inputs.range_growth import RangeGrowth, grown_ranges
from lowprec.monitor.schedule import Schedule, certified_window
from lowprec.monitor.snapshots import Snapshots
from lowprec.monitor.window_evidence import observe_window, precisions_of
from lowprec.plan import Plan
from lowprec.session import Session, open_session, open_workers
from lowprec.session.planned import read_planned
from lowprec.storage import AnyPath, Location
from lowprec.traffic import Window, format_window

__all__ = ["LiveSnapshot", "SnapshotPool"]


@dataclass(frozen=True)
class LiveSnapshot:
    """A snapshot of the model with its workers, ready for windows."""

    path: str
    session: Session
    workers: Workers
    plan: Plan


class SnapshotPool:
    """Opens one snapshot after the other; the workers of the last one are closed when the block is left."""

    def __init__(
        self,
        config: Config,
        plan_path: AnyPath,
        deployment: Deployment,
        schedule: Schedule,
        artifacts: Location,
        progress: Progress,
        *,
        num_due: int,
    ) -> None:
        """Open nothing yet; raises `ConfigError` where the config's windows or snapshots make no sense.

        num_due: how many windows are to be judged.
        """
        self._config, self._plan_path, self._deployment = config, plan_path, deployment
        self._schedule, self._artifacts, self._progress = schedule, artifacts, progress
        self._certified_window = certified_window(config, schedule)
        self._snapshots = Snapshots(config.monitor.checkpoint or config.model.checkpoint, schedule.unit)
        self._num_due = num_due
        self._live: LiveSnapshot | None = None
        self._certified: Certified | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> SnapshotPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def in_window(self, window: Window) -> LiveSnapshot:
        """The snapshot that was live when a window began; raises `CheckpointError` where there is none."""
        return self._at(self._snapshots.live_at(window.start or 0), window)

    def certified(self, window: Window) -> Certified:
        """What the certified window was like: measured once, on the snapshot that the plan was certified on.

        The snapshot of `window` is open afterwards.
        """
        live = self.in_window(window)
        if self._certified is None:
            self._certified = Certified.read(self._artifacts, live.session.reader.schema)
        if self._certified is None:
            made_for = self._deployment.plan.checkpoint_sha256
            if live.session.checkpoint_sha256 != made_for:
                live = self._at(self._config.model.checkpoint, window)
            if live.session.checkpoint_sha256 != made_for:
                raise ConfigError(
                    f"model.checkpoint {live.path}: is not the one that plan {self._plan_path} was made for "
                    f"({made_for[:12]}); the first run of the monitor compares with it"
                )
            self._certified = self._measured(live)
            self._certified.write(self._artifacts)
            self.in_window(window)
        return self._certified

    def grown_ranges(self, live: LiveSnapshot) -> list[RangeGrowth]:
        """Rows whose range grew since the certified snapshot, by table; found once for each snapshot and kept."""
        certified = self._config.model.checkpoint
        if live.session.checkpoint_sha256 == self._deployment.plan.checkpoint_sha256:
            return []
        path = self._artifacts / f"ranges-{live.session.checkpoint_sha256[:16]}.json"
        if path.kind() is not None:
            return [RangeGrowth(**growth) for growth in json.loads(path.read_bytes())]
        if Location.of(certified).kind() is None:
            self._progress.note(f"model.checkpoint {certified}: is gone, so ranges of rows are not compared with it")
            return []
        tensors = live.session.adapter.weight_names
        found = grown_ranges(live.session.units, tensors, certified, live.path, live.plan)
        with path.whole_file() as partial:
            partial.write_text(json.dumps([growth.to_dict() for growth in found]))
        return found

    def _at(self, checkpoint: str, window: Window) -> LiveSnapshot:
        if self._live is not None and self._live.path == checkpoint:
            return self._live
        self._stack.close()
        self._live = None
        session = open_session(self._config.with_(model={"checkpoint": checkpoint}))
        file = read_planned(session, self._plan_path, any_checkpoint=self._config.monitor.checkpoint is not None)
        session = session.as_planned(file)
        rows = session.reader.window(window)
        work = Work(rows, MONITOR_PASSES * self._num_due * rows.num_batches)
        workers = self._stack.enter_context(open_workers(session, work, self._progress.note))
        self._live = LiveSnapshot(checkpoint, session, workers, file.plan)
        return self._live

    def _measured(self, live: LiveSnapshot) -> Certified:
        try:
            window = live.session.reader.window(self._certified_window)
        except TrafficError as error:
            raise TrafficError(
                f"{error}; the monitor compares with the window that the plan was certified on: name one in "
                "monitor.certified whose rows are still there"
            ) from None
        counts = CertifiedCounts(window.schema)
        self._progress.stage("certified", window.num_batches)
        observation = observe_window(
            live.session,
            live.workers,
            live.plan,
            window,
            on_inputs=counts.add,
            quarantine=self._artifacts / "quarantine",
            name="certified",
            on_progress=self._progress.advance,
        )
        text = format_window(self._certified_window, self._schedule.unit)
        return Certified.of(counts, observation, precisions_of(live.plan), text)
