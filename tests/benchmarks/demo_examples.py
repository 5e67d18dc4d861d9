"""The demo's held-out examples in memory, and an evaluator that answers from arrays instead of from a model.

With both, lowprec's own tasks (`ProfileTask`, `RaceTask`) do what they do on traffic on any examples that a benchmark
chooses: random splits, bootstrap draws, plans whose true gap was set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from demo_model import large_demo_config
from numpy.typing import NDArray
from sizes import sized

from lowprec.evaluation.exact.exact_evaluator import BatchLogits
from lowprec.evaluation.profile.profile import Column, Profile, ProfilePart, ProfileTask, logit_changes
from lowprec.evaluation.workers.worker import evaluator_of, load_adapter
from lowprec.models.adapter import Gradients
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision
from lowprec.search import SearchJob, open_job
from lowprec.traffic import SyntheticSpec
from lowprec.traffic.batch import Batch
from lowprec.traffic.synthetic.truth import Truth

Single = NDArray[np.float32]

# The windows that hold them: 250,000 and 200,000 examples of the large demo.
WINDOWS = ("search", "confirm")


@dataclass(frozen=True)
class Examples:
    """N examples: first-order logit changes float32[K, N] of K columns, reference logits and labels float32[N]."""

    columns: tuple[Column, ...]
    changes: Single
    reference: Single
    labels: Single

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: NDArray[np.int64], index: int = 0) -> Batch:
        """A batch of these examples for a `Replay`, which finds them by what stands for their times."""
        nothing = np.empty((len(rows), 0), np.float32)
        return Batch(index=index, labels=self.labels[rows], dense=nothing, sparse={}, times=rows)

    def profile(self, rows: NDArray[np.int64], *, num_blocks: int = 20) -> Profile:
        """The profile of a window that holds these rows, in equal blocks."""
        replay: Any = Replay(self, {})
        parts = []
        for b, block in enumerate(np.array_split(rows, num_blocks)):
            task, part = ProfileTask(self.columns, num_blocks, ()), None
            for k in range(0, len(block), 4096):
                sums = task.sums(replay, self.batch(block[k : k + 4096], b))
                part = sums if part is None else part + sums
            parts.append(part or ProfilePart.zero(len(self.columns), num_blocks, by_group=False))
        evidence = parts[0].evidence
        for part in parts[1:]:
            evidence = evidence + part.evidence
        return Profile(self.columns, tuple(part.block for part in parts), evidence)

    def by_plan(self, plans: Sequence[Plan]) -> tuple[Examples, list[Plan]]:
        """The same examples as of a model whose units are these plans, and for each the plan that takes it alone.

        Predictions depend on the first-order change of a plan as a whole, so they stay what they are.
        """
        chosen = np.array([[plan[unit] is p for unit, p in self.columns] for plan in plans], dtype=np.float32)
        names = [f"table:plan{k}" for k in range(len(plans))]
        units = tuple((name, Precision.INT8) for name in names)
        fp32 = Plan(dict.fromkeys(names, Precision.FP32))
        alone = [fp32.replace({name: Precision.INT8}) for name in names]
        return Examples(units, chosen @ self.changes, self.reference, self.labels), alone


class Replay:
    """What tasks ask of an `ExactEvaluator`, answered from arrays: every column is a unit that adds to the logit.

    `logits` has the exact logits float32[N] of each plan that may be asked for.
    """

    def __init__(self, examples: Examples, logits: Mapping[Plan, Single]) -> None:
        self._examples, self._logits = examples, logits
        self._rows = {column: k for k, column in enumerate(examples.columns)}
        self.tables = SimpleNamespace(scores=self._scores)
        self.kept = SimpleNamespace(get=_made)
        self.forms: dict[Any, Any] = {}

    def logits(self, batch: Batch, plans: Sequence[Plan]) -> BatchLogits:
        """The logits of the reference and of the plans."""
        found = np.array([self._logits[plan][batch.times] for plan in plans], np.float32)
        return BatchLogits(self._examples.reference[batch.times], found.reshape(len(plans), batch.num_rows))

    def check_assignment(self, *_: object) -> None:
        """Row k of every unit's output belongs to example k."""

    def layer_changes(self, *_: object) -> Iterator[Any]:
        """There are no layers."""
        return iter(())

    def differentiated(self, batch: Batch, needed: Mapping[str, Any]) -> tuple[Any, Gradients]:
        """A reference pass in which every unit has an output of one number, 0, whose gradient is 1."""
        zero = torch.zeros(batch.num_rows, 1)
        calls = [SimpleNamespace(table=unit, output=zero, rows=batch.times) for unit in needed]
        logits = torch.from_numpy(self._examples.reference[batch.times])
        return SimpleNamespace(logits=logits, calls=calls), Gradients((zero + 1,) * len(calls))

    def _scores(
        self, calls: Sequence[Any], precisions: Sequence[Sequence[Precision]], gradients: Sequence[torch.Tensor]
    ) -> list[dict[Precision, Single]]:
        return [
            {p: gradient[:, 0].numpy() * self._examples.changes[self._rows[call.table, p], call.rows] for p in wanted}
            for call, wanted, gradient in zip(calls, precisions, gradients, strict=True)
        ]


def read_examples(job: SearchJob, windows: Sequence[str] = WINDOWS) -> Examples:
    """All examples of the windows, with the changes of every column of the job."""
    evaluator = evaluator_of(job.spec, load_adapter(job.spec))
    logits, changes, labels = [], [], []
    for batch in _batches(job, windows):
        reference, s = logit_changes(evaluator, batch, job.columns)
        logits.append(reference)
        changes.append(s)
        labels.append(batch.labels)
    return Examples(job.columns, np.concatenate(changes, axis=1), np.concatenate(logits), np.concatenate(labels))


def exact_logits(job: SearchJob, plans: Sequence[Plan], windows: Sequence[str] = WINDOWS) -> dict[Plan, Single]:
    """The logits of every plan on all examples of the windows, by the kernels that serve, float32[N] each."""
    evaluator = evaluator_of(job.spec, load_adapter(job.spec))
    distinct = list(dict.fromkeys(plans))
    found = [evaluator.logits(batch, distinct).plans for batch in _batches(job, windows)]
    return dict(zip(distinct, np.concatenate(found, axis=1), strict=True))


def true_probabilities(job: SearchJob, windows: Sequence[str] = WINDOWS) -> NDArray[np.float64]:
    """The probability with which each label of the made-up traffic was drawn, float64[N]."""
    assert job.config.traffic.synthetic is not None
    truth = Truth(SyntheticSpec.from_dict(job.config.traffic.synthetic))
    logits = [truth.logits(batch.times, batch.dense, batch.sparse) for batch in _batches(job, windows)]
    return 1 / (1 + np.exp(-np.concatenate(logits)))


def one_mixed_plan(kl_pct: float) -> tuple[SearchJob, Examples, Single]:
    """The large demo, its held-out examples, and the exact logits float32[N] of a mixed plan with this KL gap."""
    job = open_job(large_demo_config())
    examples = read_examples(job)
    profile = examples.profile(np.arange(len(examples)))
    (plan,) = mixed_plans(job, profile, kl_pct=kl_pct, count=1, rng=np.random.default_rng(0))
    return job, examples, exact_logits(job, [plan])[plan]


# How far the KL gap of a mixed plan may be from the one asked for, as a share of it.
TOLERANCE = sized(0.15, 1e6)


def mixed_plans(
    job: SearchJob,
    profile: Profile,
    *,
    kl_pct: float,
    count: int,
    rng: np.random.Generator,
    tolerance: float = sized(0.15, 1e6),
) -> list[Plan]:
    """Random plans with a KL gap of about `kl_pct`: each draws shares of precisions, then its tables by them."""
    found: list[Plan] = []
    precisions = list(TABLE_PRECISIONS)
    for _ in range(200):
        if len(found) >= count:
            break
        shares = rng.dirichlet(np.full(len(precisions), 0.7), size=2000)
        below = rng.random((2000, len(job.units), 1)) > shares.cumsum(axis=1)[:, None, :-1]
        picks = below.sum(axis=2)
        plans = [Plan({u.name: precisions[k] for u, k in zip(job.units, row, strict=True)}) for row in picks]
        _, kl = profile.gaps_pct(profile.selected(plans))
        # Mixed: of three precisions at least.
        found += [plan for plan, v in zip(plans, kl, strict=True) if abs(v / kl_pct - 1) <= tolerance and _mixed(plan)]
    assert len(found) >= count, f"hardly any mixed plan has a KL gap of {kl_pct} percent"
    return found[:count]


def _mixed(plan: Plan) -> bool:
    return len(set(plan.values())) >= 3


def _batches(job: SearchJob, windows: Sequence[str]) -> Iterator[Batch]:
    for name in windows:
        for batch in job.window(name).batches():
            assert batch.weights is None and batch.groups is None and not np.isnan(batch.labels).any()
            yield batch


def _made(_: object, make: Callable[[], Any], __: object) -> Any:
    return make()
