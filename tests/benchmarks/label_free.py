"""The label-free gap against the labelled one: how many examples each needs, and how wrong it is where the model is.

A mixed plan of the demo model is evaluated exactly on its 450,000 held-out examples, with its gap at the budget and at
twice the budget, against the labels, against the reference's own predictions (KL over entropy), and against the
probabilities that the labels were drawn with, which is the truth.

Prints one JSON object as its last line: `ratio`, the examples that the labelled gap needs to see the gap double over
those that KL needs (95 percent power at 5 percent, one-sided, each from its own mean and spread); `examples`; and
`bias`: for references whose logits are shifted, so that their calibration is off, the true gap beside the label-free
one.
"""

import json

import numpy as np
import torch
from demo_examples import one_mixed_plan, true_probabilities
from numpy.typing import NDArray
from scipy.optimize import brentq

Float = NDArray[np.float64]

BUDGET = 0.05
SHIFTS = (-0.3, -0.1, 0.0, 0.1, 0.3)
# 5 percent of false alarms, 95 percent of power.
DEVIATIONS = 1.645 + 1.645


def softplus(z: Float) -> Float:
    return np.logaddexp(0, z)


def losses(z: Float, p: Float) -> Float:
    """Expected loss of logits where labels have probability p (a label itself is 0 or 1)."""
    return softplus(z) - p * z


def gap_pct(z: Float, moved: Float, p: Float) -> float:
    return float(100 * (losses(moved, p).sum() / losses(z, p).sum() - 1))


def examples_to_see(before: tuple[Float, Float], after: tuple[Float, Float]) -> float:
    """Examples until a ratio of sums tells `after` from `before`, both (numerators, denominators) by example."""
    ratio = before[0].sum() / before[1].sum()
    change = after[0].mean() - ratio * after[1].mean()
    spread = (after[0] - ratio * after[1]).std()
    return float((DEVIATIONS * spread / change) ** 2)


def main() -> None:
    torch.set_num_threads(1)
    job, examples, logits = one_mixed_plan(BUDGET)
    z, y = examples.reference.astype(float), examples.labels.astype(float)
    change = logits.astype(float) - z
    truth = true_probabilities(job)
    own = 1 / (1 + np.exp(-z))

    def at(gap: float) -> Float:
        factor = brentq(lambda f: gap_pct(z, z + f * change, own) - gap, 0.1, 6.0, xtol=1e-7)
        return z + factor * change

    once, twice = at(BUDGET), at(2 * BUDGET)
    assert abs(gap_pct(z, once, own) - BUDGET) < 1e-5 and abs(gap_pct(z, twice, own) - 2 * BUDGET) < 1e-5
    examples_kl = examples_to_see(*((losses(moved, own) - losses(z, own), losses(z, own)) for moved in (once, twice)))
    # Single labels only add noise: by how much the gap changes is told by the probabilities that they were drawn with.
    kept, doubled = (losses(moved, truth) - losses(z, truth) for moved in (once, twice))
    ratio = kept.sum() / losses(z, truth).sum()
    spread = (losses(twice, y) - (1 + ratio) * losses(z, y)).std()
    examples_labels = float((DEVIATIONS * spread / (doubled.mean() - kept.mean())) ** 2)
    bias = []
    for shift in SHIFTS:
        shifted, moved = z + shift, once + shift
        predicted = 1 / (1 + np.exp(-shifted))
        bias.append(
            {
                "calibration": round(float(predicted.sum() / truth.sum()), 3),
                "true_gap_pct": round(gap_pct(shifted, moved, truth), 4),
                "label_free_gap_pct": round(gap_pct(shifted, moved, predicted), 4),
            }
        )
    assert examples_kl < examples_labels, "labels would be less noisy than no labels"
    print(
        json.dumps(
            {
                "ratio": round(examples_labels / examples_kl, 1),
                "examples": {"labels": round(examples_labels), "kl": round(examples_kl)},
                "bias": bias,
                "budget_pct": BUDGET,
            }
        )
    )


if __name__ == "__main__":
    main()
