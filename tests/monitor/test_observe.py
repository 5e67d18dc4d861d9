"""An observation of a window: the changes by unit are traced on some batches of many, everything else on all."""

import numpy as np
import pytest

from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.monitor import observe as observing
from lowprec.monitor.judging.units import unit_shares
from lowprec.monitor.observe import observe
from lowprec.monitor.window_evidence import precisions_of
from lowprec.plan import Plan, Precision
from lowprec.search import open_job


@pytest.fixture
def observed(small_config, monkeypatch):
    """What an observation of many batches finds: traced on every fourth, or on all of them."""
    job = open_job(small_config("traffic.batch_size=32"))
    workers = LocalWorkers(job.spec, job.adapter)
    plan = Plan.uniform(job.units, Precision.INT2)

    def observation(*, all_traced):
        monkeypatch.setattr(observing, "_MAX_STRIDE", 1 if all_traced else 4)
        window = job.window("search")
        assert window.num_batches >= 64
        return observe(workers, window, plan, on_inputs=lambda *_: None), precisions_of(plan)

    return observation


def test_tracing_some_batches_changes_nothing_but_shares_of_units(observed):
    (some, _), (every, _) = observed(all_traced=False), observed(all_traced=True)
    assert some.exact.loss.tolist() == every.exact.loss.tolist()
    assert some.label_free.moments.tolist() == every.label_free.moments.tolist()
    assert some.units.entropy[0] == pytest.approx(every.units.entropy[0] / 4, rel=0.1)
    assert every.units.entropy[0] == pytest.approx(every.label_free.totals[1], rel=1e-9)
    assert every.units.loss[0] == pytest.approx(every.exact.loss[0], rel=1e-9)


def test_shares_of_some_batches_agree_with_those_of_all_within_their_errors(observed):
    some, every = (unit_shares(*observed(all_traced=every)) for every in (False, True))
    z = [(a.kl_pct - b.kl_pct) / np.hypot(a.kl_error_pct, b.kl_error_pct) for a, b in zip(some, every, strict=True)]
    z += [
        (a.first_pct - b.first_pct) / np.hypot(a.first_error_pct, b.first_error_pct)
        for a, b in zip(some, every, strict=True)
    ]
    assert max(map(abs, z)) < 3.5
    assert sum(s.kl_pct for s in some) == pytest.approx(sum(s.kl_pct for s in every), rel=0.25)
