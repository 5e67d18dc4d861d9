"""A plan that is deployed on the small model, watched day by day."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from lowprec.config import Config
from lowprec.monitor import MonitorOutcome, run_monitor
from lowprec.plan import Plan, PlanFile, Precision, RowRange, write_plan
from lowprec.search import open_job

NOW = datetime(2026, 1, 11, tzinfo=UTC)
WATCH = ("windows.confirm={start: 2026-01-08, end: 2026-01-09}", "windows.search={start: 2026-01-05, end: 2026-01-08}")
# Six days instead of two.
LONGER = (
    "windows.train={end: 2026-01-03}",
    "windows.search={start: 2026-01-03, end: 2026-01-04}",
    "windows.confirm={start: 2026-01-04, end: 2026-01-05}",
)


@pytest.fixture
def deployed(small_config: Callable[..., Config], tmp_path: Path) -> Callable[..., tuple[Config, Path]]:
    """A config whose windows after the certified one are January 9 and 10, and a plan that it was certified with."""

    def make(
        *overrides: str, precision: Precision = Precision.INT8, budget: float = 5.0, longer: bool = False
    ) -> tuple[Config, Path]:
        config = small_config(*(LONGER if longer else WATCH), *overrides)
        job = open_job(config)
        path = tmp_path / "plan.json"
        plan = Plan({unit.name: Precision.FP32 if unit.is_layer else precision for unit in job.units})
        write_plan(
            PlanFile(
                plan=plan,
                model=config.model.factory,
                checkpoint_sha256=job.checkpoint_sha256,
                size_bytes=job.space.size_bytes(plan),
                row_ranges={unit.name: RowRange.MINMAX for unit in job.units if not unit.is_layer},
                evidence={"budget_pct": budget},
            ),
            path,
        )
        return config, path

    return make


@pytest.fixture
def monitored() -> Callable[..., MonitorOutcome]:
    """A run of the monitor on January 11."""

    def run(config: Config, plan: Path, now: datetime = NOW, **bounds: Any) -> MonitorOutcome:
        return run_monitor(config, plan, now=now, **bounds)

    return run


@pytest.fixture
def traffic_copy(small_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """The small traffic in one file of the test's own, its table given to a function first."""

    def make(change: Callable[[object], object] = lambda table: table) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        table = pads.dataset(small_folder / "traffic", format="parquet", exclude_invalid_files=True).to_table()
        pq.write_table(change(table), folder / "part.parquet", row_group_size=1000)
        return folder

    return make
