"""Golden values of an independent implementation (confseq), and that mixtures are what they are said to be."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from lowprec.evaluation.stats.confidence import radius
from lowprec.evaluation.stats.mixture import log_one_sided_mixture


def test_the_radius_is_that_of_the_two_sided_normal_mixture():
    assert radius(100, 0.05, tuned_for=100) * 100 == pytest.approx(30.35209, abs=5e-6)


def test_the_one_sided_mixture_has_the_value_of_another_implementation():
    wanted = 2 * math.log(1 / (2 * 0.05))
    rho = 100 / (wanted + math.log(1 + wanted))
    assert log_one_sided_mixture(10.0, 100.0, rho) == pytest.approx(-0.06502391, abs=5e-9)


@pytest.mark.parametrize(("s", "v", "rho"), [(3.0, 2.0, 0.5), (-4.0, 9.0, 2.0), (0.0, 1.0, 10.0)])
def test_it_is_the_mixture_over_half_of_a_normal_distribution(s, v, rho):
    def likelihood(mean):
        return math.exp(mean * s - mean**2 * v / 2) * 2 * stats.norm.pdf(mean, scale=1 / math.sqrt(rho))

    expected, _ = integrate.quad(likelihood, 0, np.inf)
    assert log_one_sided_mixture(s, v, rho) == pytest.approx(math.log(expected), rel=1e-9)
