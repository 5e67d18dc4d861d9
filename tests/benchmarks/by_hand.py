"""What `lowprec search` is measured against: searches as a good user writes them by hand for the demo's DLRM.

Every table is quantized once to every precision before the search, batches are decoded once and stay in memory, what
does not depend on a plan (the bottom MLP, the reference's loss) is computed once, and a plan's lookups are one call of
FBGEMM's operator on one thread. What these searches do not have is what the benchmark is about: a profile of the
window, and anything shared between two plans.
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import fbgemm_gpu  # noqa: F401  (registers the operator)
import numpy as np
import optuna
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from sizes import sized
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.models.adapter import inputs_of
from lowprec.models.dlrm import DLRM
from lowprec.ops import quantize
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision
from lowprec.search import SearchJob
from lowprec.traffic.batch import Batch

Float = NDArray[np.float64]

NUM_PLANS = sized(64, 4)
# Batches that sensitivities and gradients are measured on, spread over the window.
SAMPLE_BATCHES = 8
# Steps between the least and the greatest value of a row; for the floating-point precisions, below the greatest.
NUM_STEPS = {
    Precision.FP32: 2.0**24,
    Precision.FP16: 2.0**11,
    Precision.INT8: 255.0,
    Precision.INT4: 15.0,
    Precision.INT2: 3.0,
}


@dataclass(frozen=True)
class Found:
    """What a search found: plans with their bytes and exact gaps (percent) over the window, and what it cost.

    passes: seconds over those of one fp32 pass. Both include what `HandModel` does before any search can begin.
    """

    plans: tuple[Plan, ...]
    bytes: NDArray[np.int64]
    gaps: Float
    passes: float
    seconds: float


@dataclass(frozen=True)
class HandBatch:
    """A decoded batch of B rows, ready for one lookup in all tables.

    bottom: float32[B, dim], the dense vector; indices: int64[num_ids], table after table; offsets: int64[T * B + 1];
    labels, reference: float64[B], the latter the fp32 model's logits; reference_loss, reference_entropy: the sums of
    its losses and of the entropies of its predictions.
    """

    bottom: Tensor
    indices: Tensor
    offsets: Tensor
    labels: Tensor
    reference: Tensor
    reference_loss: float
    reference_entropy: float


class HandModel:
    """The demo's DLRM with its tables in every precision, and the search window in memory.

    Only what the demo has: one feature a table, one dim, sum pooling, no weights, every row labelled (asserted).
    """

    def __init__(
        self, job: SearchJob, *, pass_seconds: float, window: str = "search", num_batches: int | None = None
    ) -> None:
        """Prepare the model for all batches of a window of the job, or for its first `num_batches`."""
        torch.set_num_threads(1)
        began = time.perf_counter()
        model = job.adapter.model
        assert isinstance(model, DLRM)
        self.job, self.window, self.model = job, window, model
        self.units, self.size_bytes = job.units, job.space.size_bytes
        assert [f"table:{table}" for table in model.feature_tables.values()] == [u.name for u in job.units]
        assert all(table.mode == "sum" for table in model.tables.values())
        assert job.storage.row_alignment == 1 and len({unit.dim for unit in job.units}) == 1

        # All tables in all precisions lie in one buffer, and a plan is a list of places in it.
        stored = {
            (name, p): quantize(weight.numpy(), p, row_range=job.config.space.row_range).reshape(-1)
            for name, weight in job.adapter.weights.items()
            for p in TABLE_PRECISIONS
        }
        starts = np.cumsum([0, *(rows.size for rows in stored.values())])[:-1]
        self._starts = dict(zip(stored, starts.tolist(), strict=True))
        self._stored = torch.from_numpy(np.concatenate(list(stored.values())))
        dims = np.cumsum([0, *(unit.dim for unit in job.units)])
        self._dim_offsets = torch.from_numpy(dims.astype(np.int32))
        self._placements = torch.full((len(job.units),), 3, dtype=torch.int32)  # EmbeddingLocation.HOST

        with torch.no_grad():
            self.batches = [self._prepared(batch) for batch in job.window(window).batches(0, num_batches)]
        self.pass_seconds = pass_seconds
        self.prepare_seconds = time.perf_counter() - began

    @property
    def sample(self) -> list[HandBatch]:
        """`SAMPLE_BATCHES` batches, evenly spread."""
        at = np.linspace(0, len(self.batches) - 1, min(SAMPLE_BATCHES, len(self.batches)))
        return [self.batches[int(k)] for k in at]

    @torch.inference_mode()
    def losses(self, batch: HandBatch, plan: Plan) -> Tensor:
        """The loss of every example under the plan, float64[B]."""
        return cross_entropy(self._logits(batch, plan), batch.labels, reduction="none")

    def gap_pct(self, plan: Plan, batches: Sequence[HandBatch] | None = None) -> float:
        """The exact gap over the batches, all by default."""
        batches = self.batches if batches is None else batches
        loss = sum(float(self.losses(batch, plan).sum()) for batch in batches)
        return 100 * (loss / sum(batch.reference_loss for batch in batches) - 1)

    @torch.inference_mode()
    def kl_pct(self, plan: Plan, batches: Sequence[HandBatch] | None = None) -> float:
        """The label-free gap over the batches: KL divergence from the reference's predictions, of its entropy."""
        batches = self.batches if batches is None else batches
        total = 0.0
        for batch in batches:
            expected = torch.sigmoid(batch.reference)
            crossed = float(cross_entropy(self._logits(batch, plan), expected, reduction="sum"))
            total += crossed - batch.reference_entropy
        return 100 * total / sum(batch.reference_entropy for batch in batches)

    def lookup(self, batch: HandBatch, plan: Plan) -> Tensor:
        """The pooled outputs of all tables, float32[B, T * dim]."""
        dims, dim = self._dim_offsets, self.units[0].dim
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function.default(
            self._stored,
            torch.empty(0, dtype=torch.uint8),
            self._placements,
            torch.tensor([self._starts[item] for item in plan.items()]),
            torch.tensor([SparseType[p.name].as_int() for p in plan.values()], dtype=torch.uint8),
            dims,
            int(dims[-1]),
            *[dim] * 5,
            batch.indices,
            batch.offsets,
            0,  # pooling: sum
            None,
            SparseType.FP32.as_int(),
            row_alignment=1,
        )

    def dense(self, bottom: Tensor, pooled: Tensor) -> Tensor:
        """Logits float32[B] of the part of the model behind its tables; pooled: float32[B, T * dim]."""
        vectors = torch.cat([bottom, pooled], dim=1).view(len(bottom), -1, bottom.shape[1])
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return self.model.top(torch.cat([bottom, products.index_select(1, self.model.pairs)], dim=1)).squeeze(1)

    def found(self, plans: Sequence[Plan], gaps: Sequence[float], *, began: float) -> Found:
        """The plans of a search that began at `began` on the performance counter and ends now."""
        seconds = self.prepare_seconds + time.perf_counter() - began
        sizes = np.array([self.size_bytes(plan) for plan in plans])
        return Found(tuple(plans), sizes, np.array(gaps), seconds / self.pass_seconds, seconds)

    def evaluated(self, plans: Iterable[Plan], *, began: float) -> Found:
        """The plans, each once, with their exact gaps."""
        distinct = list(dict.fromkeys(plans))
        return self.found(distinct, [self.gap_pct(plan) for plan in distinct], began=began)

    def _logits(self, batch: HandBatch, plan: Plan) -> Tensor:
        return self.dense(batch.bottom, self.lookup(batch, plan)).double()

    def _prepared(self, batch: Batch) -> HandBatch:
        assert batch.weights is None and not np.isnan(batch.labels).any()
        inputs, bags = inputs_of(batch), list(batch.sparse.values())
        starts = np.cumsum([0, *(len(b.values) for b in bags)])
        offsets = [b.offsets[:-1] + start for b, start in zip(bags, starts[:-1], strict=True)]
        labels = torch.from_numpy(batch.labels).double()
        reference = self.model(inputs.dense, inputs.sparse).double()
        return HandBatch(
            bottom=self.model._dense_vector(inputs.dense),
            indices=torch.from_numpy(np.concatenate([b.values for b in bags])),
            offsets=torch.from_numpy(np.concatenate([*offsets, starts[-1:]])),
            labels=labels,
            reference=reference,
            reference_loss=float(cross_entropy(reference, labels, reduction="sum")),
            reference_entropy=float(cross_entropy(reference, torch.sigmoid(reference), reduction="sum")),
        )


def fp32_pass_seconds(job: SearchJob, *, num_batches: int | None = None, repeats: int = 3) -> float:
    """Median seconds of one fp32 pass over the search window: read from Parquet, run the model, on one thread."""
    torch.set_num_threads(1)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        with torch.inference_mode():
            for batch in job.window("search").batches(0, num_batches):
                inputs = inputs_of(batch)
                job.adapter.model(inputs.dense, inputs.sparse)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def check_agreement(model: HandModel) -> None:
    """Assert that a mixed plan has the gap and the KL gap here that lowprec's exact evaluation gives it."""
    picks = np.random.default_rng(0).integers(0, len(TABLE_PRECISIONS), len(model.units))
    plan = Plan({unit.name: TABLE_PRECISIONS[k] for unit, k in zip(model.units, picks, strict=True)})
    workers = LocalWorkers(model.job.spec, model.job.adapter)
    window, batches = model.job.window(model.window), range(len(model.batches))
    try:
        result = evaluate_plans(workers, window, [plan], confidence=0.95, batches_per_task=4, batches=batches)
    finally:
        workers.close()
    lowprec = result.metrics[0]
    for by_hand, expected in ((model.gap_pct(plan), lowprec.gap_pct), (model.kl_pct(plan), lowprec.kl_pct)):
        assert abs(by_hand - expected) < 1e-4, f"by hand {by_hand} percent, by lowprec {expected}"


def optuna_study(
    model: HandModel,
    *,
    sampler: Literal["tpe", "nsga2"],
    num_trials: int = 500,
    seed: int = 0,
    timeout_s: float | None = None,
) -> Found:
    """An Optuna study over (bytes, gap): one categorical a table, uniform plans first, new plans evaluated in full."""
    began = time.perf_counter()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"tpe": optuna.samplers.TPESampler, "nsga2": optuna.samplers.NSGAIISampler}
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=samplers[sampler](seed=seed))
    for precision in TABLE_PRECISIONS:
        study.enqueue_trial({unit.name: str(precision) for unit in model.units})

    names = [str(p) for p in TABLE_PRECISIONS]
    known: dict[Plan, float] = {}

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        plan = Plan({unit.name: Precision(trial.suggest_categorical(unit.name, names)) for unit in model.units})
        if plan not in known:  # TPE proposes many plans again
            known[plan] = model.gap_pct(plan)
        return model.size_bytes(plan), known[plan]

    study.optimize(objective, n_trials=num_trials, timeout=timeout_s)
    trials = study.get_trials(deepcopy=False)
    plans = [Plan({name: Precision(text) for name, text in trial.params.items()}) for trial in trials]
    return model.found(plans, [trial.values[1] for trial in trials], began=began)


def greedy_revert(model: HandModel, *, measure: Literal["gap", "kl"], num_plans: int = NUM_PLANS) -> Found:
    """From all tables at int2, one step up for one table at a time, where it is expected to pay most per byte.

    The sensitivity of a table is the gap, or the KL gap, of int2 for it alone on the sample; a table that int2 seems to
    improve is reverted last. What higher precisions leave of a sensitivity follows from their steps: a second-order
    error goes with the square of a step's width.
    """
    began = time.perf_counter()
    fp32 = Plan.uniform(model.units, Precision.FP32)
    steps = []
    for unit in model.units:
        alone = fp32.replace({unit.name: Precision.INT2})
        measured = (model.gap_pct if measure == "gap" else model.kl_pct)(alone, model.sample)
        sensitivity = max(measured, 0.0)
        sizes = {p: model.size_bytes(fp32.replace({unit.name: p})) for p in TABLE_PRECISIONS}
        for low, high in itertools.pairwise(reversed(TABLE_PRECISIONS)):
            gain = sensitivity * NUM_STEPS[Precision.INT2] ** 2 * (NUM_STEPS[low] ** -2 - NUM_STEPS[high] ** -2)
            steps.append((gain / (sizes[high] - sizes[low]), unit.name, high))
    path = [Plan.uniform(model.units, Precision.INT2)]
    # The gain per byte falls from step to step of a table, so sorting keeps them in order.
    for _, name, precision in sorted(steps, key=lambda step: -step[0]):
        path.append(path[-1].replace({name: precision}))
    picked = np.linspace(0, len(path) - 1, min(num_plans, len(path))).round().astype(int)
    return model.evaluated([path[k] for k in picked], began=began)


def integer_program(model: HandModel, *, score: Literal["absolute", "squared"], num_plans: int = NUM_PLANS) -> Found:
    """For each budget of bytes, evenly spaced by ratio, the plan with the least sum of `gradient_scores`."""
    began = time.perf_counter()
    scores = gradient_scores(model, score=score)
    fp32 = Plan.uniform(model.units, Precision.FP32)
    full = model.size_bytes(fp32)
    saved = np.array(
        [[full - model.size_bytes(fp32.replace({u.name: p})) for p in TABLE_PRECISIONS] for u in model.units]
    )
    cheapest = model.size_bytes(Plan.uniform(model.units, Precision.INT2))
    one_each = np.kron(np.eye(len(model.units)), np.ones(len(TABLE_PRECISIONS)))
    plans = []
    for budget in np.geomspace(cheapest, full, num_plans).round():
        solved = milp(
            scores.ravel() / scores.max() * 1e6,  # far above the solver's absolute tolerances
            integrality=np.ones(scores.size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(saved.ravel()[None], full - budget, np.inf),
            ],
        )
        assert solved.success, solved.message
        picks = solved.x.reshape(scores.shape).argmax(axis=1)
        plans.append(Plan({u.name: TABLE_PRECISIONS[k] for u, k in zip(model.units, picks, strict=True)}))
    return model.evaluated(plans, began=began)


def gradient_scores(model: HandModel, *, score: Literal["absolute", "squared"]) -> Float:
    """Additive scores float64[T, 5] from one gradient of the logits by pooled outputs on the sample.

    With s = g . (pooled_p - pooled_fp32), the first-order change of an example's logit: the mean of |dl/dlogit s|
    ("absolute", the Taylor score), or of d2l/dlogit2 s^2 / 2 ("squared", the diagonal of the Hessian).
    """
    totals = torch.zeros(len(TABLE_PRECISIONS), len(model.units), dtype=torch.float64)
    for batch in model.sample:
        with torch.no_grad():
            pooled = [model.lookup(batch, Plan.uniform(model.units, p)) for p in TABLE_PRECISIONS]
        leaf = pooled[0].requires_grad_()
        (gradient,) = torch.autograd.grad(model.dense(batch.bottom, leaf).sum(), leaf)
        predicted = torch.sigmoid(batch.reference)
        with torch.no_grad():
            for total, low in zip(totals, pooled, strict=True):
                s = (gradient * (low - leaf)).view(len(low), len(model.units), -1).sum(dim=2).double()
                if score == "absolute":
                    total += (predicted - batch.labels).abs() @ s.abs()
                else:
                    total += (predicted * (1 - predicted) / 2) @ s.square()
    return (totals / sum(len(batch.labels) for batch in model.sample)).T.numpy()
