"""What a model returns: logits or probabilities, in any float type."""

import math

import pytest
import torch
from torch import nn

from lowprec.core.errors import ModelError
from lowprec.models.adapter import ModelAdapter, ModelInputs
from lowprec.models.checks import check_passes
from lowprec.models.outputs import MIN_OUTPUTS, OutputCount, as_logits


class Head(nn.Module):
    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True)
        self.head = head

    def forward(self, dense, sparse):
        return self.head(3 * self.table(*sparse["x"]).sum(1) + dense.sum(1))


def inputs(num_rows=64):
    return ModelInputs(
        torch.linspace(-3, 3, num_rows)[:, None], {"x": (torch.arange(num_rows) % 9, torch.arange(num_rows + 1))}
    )


def test_probabilities_become_the_logits_that_they_came_from():
    z = torch.linspace(-16, 16, 101, dtype=torch.float64)
    found = as_logits(torch.sigmoid(z), len(z), "probabilities", model="M")
    torch.testing.assert_close(found, z, rtol=0, atol=1e-7)
    # In float32 a probability near 1 has the resolution of float32: 6e-8 of 1 - p.
    single = as_logits(torch.sigmoid(z.float()), len(z), "probabilities", model="M")
    assert single.dtype == torch.float32
    bound = 2**-22 / torch.sigmoid(-z) + 1e-5  # sigmoid itself is off by two units in the last place
    assert ((single - z).abs() <= bound).all()


def test_certain_probabilities_are_clamped():
    found = as_logits(torch.tensor([0.0, 1.0, 1.0000001]), 3, "probabilities", model="M")
    edge = math.log(2**-24) - math.log1p(-(2**-24))
    torch.testing.assert_close(found, torch.tensor([edge, -edge, -edge]))


def test_gradients_go_through_the_conversion():
    adapter = ModelAdapter(Head(torch.sigmoid), "probabilities")
    plain = ModelAdapter(Head(lambda z: z))
    reference, gradients = adapter.differentiated(inputs())
    expected, slopes = plain.differentiated(inputs())
    torch.testing.assert_close(reference.logits, expected.logits, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients.tables[0], slopes.tables[0], rtol=1e-2, atol=1e-5)


def test_what_is_declared_a_probability_and_is_none_is_refused():
    adapter = ModelAdapter(Head(lambda z: z), "probabilities")
    for run in (adapter.reference, adapter.differentiated):
        with pytest.raises(ModelError, match=r"model\.outputs: probabilities says that outputs lie in \[0, 1\]"):
            run(inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_half_a_float_become_fp32(dtype):
    adapter = ModelAdapter(Head(lambda z: z.to(dtype)))
    reference, gradients = adapter.differentiated(inputs())
    assert reference.logits.dtype == torch.float32
    torch.testing.assert_close(reference.logits, adapter.reference(inputs()).logits, rtol=0, atol=0)
    torch.testing.assert_close(gradients.tables[0], torch.full((64, 4), 3.0))
    check_passes(adapter, inputs(), reference)


def test_only_outputs_that_all_lie_in_0_to_1_are_probabilities():
    inside, outside = torch.linspace(0, 1, MIN_OUTPUTS), torch.tensor([-0.1])
    with pytest.raises(ModelError, match=r"all 32 outputs lie in \[0, 1\].*model\.outputs: probabilities"):
        OutputCount.of(inside, "logits").check()
    for count in (
        OutputCount.of(inside, "logits") + OutputCount.of(outside, "logits"),
        OutputCount.of(inside[1:], "logits"),
        OutputCount.of(inside, "unchecked_logits"),
        OutputCount.of(inside, "probabilities"),
    ):
        count.check()
