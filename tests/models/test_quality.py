"""NE, AUC and calibration against the definitions written out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.models.quality import auc, calibration, cross_entropy, normalized_entropy, quality

# Small integers as logits make ties common.
examples = st.lists(
    st.tuples(st.integers(-4, 4), st.integers(0, 1), st.integers(1, 3)), min_size=2, max_size=30
).filter(lambda rows: 0 < sum(y for _, y, _ in rows) < len(rows))


def columns(rows):
    return (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))


@settings(max_examples=60)
@given(examples)
def test_auc_is_the_share_of_ordered_pairs(rows):
    logits, labels, weights = columns(rows)
    wins = total = 0.0
    for z, y, w in rows:
        for other_z, other_y, other_w in rows:
            if y == 1 and other_y == 0:
                total += w * other_w
                wins += w * other_w * (1.0 if z > other_z else 0.5 if z == other_z else 0.0)
    # Both sides are sums of at most 900 small halves: exact in float64 but for one division.
    assert auc(logits, labels, weights) == pytest.approx(wins / total, rel=1e-15)


@settings(max_examples=60)
@given(examples)
def test_a_weight_counts_like_repeated_rows(rows):
    logits, labels, weights = columns(rows)
    repeated = np.repeat(np.arange(len(rows)), weights.astype(int))
    for metric in (normalized_entropy, auc, calibration):
        assert metric(logits, labels, weights) == pytest.approx(metric(logits[repeated], labels[repeated]), rel=1e-12)


@settings(max_examples=60)
@given(examples)
def test_normalized_entropy_by_definition(rows):
    logits, labels, _ = columns(rows)
    p = 1 / (1 + np.exp(-logits))
    rate = labels.mean()
    loss = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert normalized_entropy(logits, labels) == pytest.approx(loss / entropy, rel=1e-12)
    assert calibration(logits, labels) == pytest.approx(p.sum() / labels.sum(), rel=1e-12)


def test_predicting_the_rate_has_entropy_one_and_is_calibrated():
    labels = np.array([1, 0, 0, 0], dtype=np.float32)
    found = quality(np.full(4, math.log(1 / 3), dtype=np.float64), labels)
    assert found.ne == pytest.approx(1.0, rel=1e-12)
    assert found.calibration == pytest.approx(1.0, rel=1e-12)
    assert found.auc == 0.5
    assert found.num_examples == 4


def test_huge_logits_neither_overflow_nor_lose_the_loss():
    with np.errstate(over="raise", invalid="raise"):
        losses = cross_entropy(np.array([1e4, -1e4, 1e4, -1e4]), np.array([1.0, 0.0, 0.0, 1.0]))
        assert calibration(np.array([1e4, -1e4]), np.array([1.0, 0.0])) == 1.0
    assert losses.tolist() == [0.0, 0.0, 1e4, 1e4]


def test_float32_logits_are_summed_in_float64():
    logits = np.full(1 << 20, 0.1, dtype=np.float32)
    labels = np.tile(np.array([0, 1], dtype=np.float32), 1 << 19)
    expected = 0.5 * (math.log1p(math.exp(np.float64(logits[0]))) + math.log1p(math.exp(-np.float64(logits[0]))))
    assert normalized_entropy(logits, labels) * math.log(2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("labels", [[0.0, 0.0], [1.0, 1.0], []])
def test_one_label_has_no_entropy_and_no_order(labels):
    found = quality(np.zeros(len(labels)), np.array(labels))
    assert math.isnan(found.ne)
    assert math.isnan(found.auc)
