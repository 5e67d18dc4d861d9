"""A toy model for simulations: the logits of every example, and what each column does to them, stand in the batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from lowprec.evaluation.exact.exact_evaluator import BatchLogits
from lowprec.evaluation.profile.window_profile import measure_profile
from lowprec.evaluation.race.race_sums import RaceTask
from lowprec.evaluation.workers.worker import Chunk
from lowprec.plan import Plan, Precision, Unit
from lowprec.traffic.batch import Batch


@dataclass
class Toy:
    """A window of batches whose dense columns are z_ref, K first-order logit changes, and K exact ones.

    Units are table:0 to table:K-1, each int4 or fp32; a plan's exact logit change is the sum of those of its units.
    """

    num_columns: int
    batches: list[Batch] = field(default_factory=list)
    forms: dict[object, object] = field(default_factory=dict)

    @property
    def columns(self):
        return tuple((f"table:{k}", Precision.INT4) for k in range(self.num_columns))

    @property
    def units(self):
        return [Unit(name, 10, 4) for name, _ in self.columns]

    @property
    def num_batches(self):
        return len(self.batches)

    @property
    def num_rows(self):
        return sum(batch.num_rows for batch in self.batches)

    def batch(self, k):
        return self.batches[k]

    def plan(self, *low):
        return Plan.uniform(self.units, Precision.FP32).replace({f"table:{k}": Precision.INT4 for k in low})

    def fill(self, z, s, labels, *, exact=None, weights=None, groups=None, batch_size=100):
        """Cut examples into batches; z: [N], s: [K, N], exact: [K, N] or None where s is exact."""
        dense = np.concatenate([z[None], s, s if exact is None else exact]).T.astype(np.float32)
        self.batches = [
            Batch(
                index=k,
                labels=labels[rows].astype(np.float32),
                dense=dense[rows],
                sparse={},
                times=np.arange(len(labels))[rows],
                weights=None if weights is None else weights[rows],
                groups=None if groups is None else groups[rows],
            )
            for k, rows in enumerate(
                slice(i, min(i + batch_size, len(labels))) for i in range(0, len(labels), batch_size)
            )
        ]
        return self

    def run(self, window, tasks):
        for task in tasks:
            total = None
            for k in task.batches:
                sums = task.sums(self, window.batch(k))
                total = sums if total is None else total + sums
            yield Chunk(total, sum(window.batch(k).num_rows for k in task.batches))

    def measure(self):
        by_group = self.batches[0].groups is not None
        return measure_profile(self, self, self.columns, by_group=by_group, batches_per_task=1).profile

    def lap(self, plans, slices):
        """The sums of plans on some slices; slices are batches here."""
        slices = tuple(int(k) for k in slices)
        task = RaceTask(tuple(plans), self.columns, slices, ((0,),) * len(slices), (1,) * len(slices), "toy")
        return next(self.run(self, [task])).sums

    # What an evaluator does for tasks.

    def logits(self, batch, plans):
        chosen = np.array([[plan[unit] is precision for unit, precision in self.columns] for plan in plans])
        z, exact = batch.dense[:, 0], batch.dense[:, 1 + self.num_columns :]
        return BatchLogits(z, (z + chosen.reshape(len(plans), -1).astype(np.float32) @ exact.T).astype(np.float32))

    @property
    def kept(self):
        return SimpleNamespace(get=lambda key, make, size_bytes: make())

    def logit_changes(self, batch):
        return batch.dense[:, 0], np.ascontiguousarray(batch.dense[:, 1 : 1 + self.num_columns].T)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Toy]:
    """Makes toys with K columns."""
    for name in ("profile.profile", "race.race_sums"):
        monkeypatch.setattr(f"lowprec.evaluation.{name}.logit_changes", lambda toy, batch, _: toy.logit_changes(batch))
    return Toy
