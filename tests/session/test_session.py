"""A session needs the windows that its command reads, and no others."""

import pytest

from lowprec.core.errors import ConfigError
from lowprec.debug import debug_plan
from lowprec.export import export_plan
from lowprec.gate import verify_plan
from lowprec.models.training.train import train
from lowprec.plan import Precision
from lowprec.search import run_search
from lowprec.search.space.hand_plan import HandPlan, write_hand_plan
from lowprec.session import open_session
from lowprec.storage import Location


@pytest.fixture
def config(small_config):
    """A config that has the confirm window alone."""
    whole = small_config()
    return whole.with_(windows=dict.fromkeys(("train", "validation", "search")))


@pytest.fixture
def plan(config, tmp_path):
    path = Location.of(tmp_path / "plan.json")
    write_hand_plan(config, HandPlan(Precision.INT8), path)
    return path


def test_what_reads_the_confirm_window_needs_no_other(config, plan, tmp_path):
    assert open_session(config).typical_window == "confirm"
    assert verify_plan(config, plan).window
    assert debug_plan(config, plan).units
    assert export_plan(config, plan, tmp_path / "served").plan_bytes


@pytest.mark.parametrize(("run", "name"), [(run_search, "search"), (train, "train")])
def test_a_window_that_is_missing_is_named(config, run, name):
    with pytest.raises(ConfigError, match=rf"windows\.{name}: is required here; give it a start and an end"):
        run(config)
