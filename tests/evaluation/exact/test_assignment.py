"""Whether the first order knows which example a table changes is measured: right models pass, others are refused."""

import pytest
import torch
from torch import nn

from lowprec.core.errors import ModelError
from lowprec.evaluation.exact.assignment import check_assignment, check_bags
from lowprec.models.adapter import ModelAdapter, ModelInputs


class Model(nn.Module):
    def __init__(self, combine, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.item = nn.EmbeddingBag(90, 8, mode="sum", include_last_offset=True)
        self.user = nn.EmbeddingBag(90, 8, mode="sum", include_last_offset=True)
        self.hidden = nn.Linear(16, 32)
        self.top = nn.Linear(32, 1)
        self.combine = combine
        with torch.no_grad():
            self.item.weight.mul_(scale)

    def head(self, item, user):
        return self.top(torch.relu(self.hidden(torch.cat([item, user], 1)))).squeeze(1)

    def forward(self, dense, sparse):
        return self.combine(self, sparse["x"], self.user(*sparse["x"]))


def inputs(num_rows=128):
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 90, (num_rows,), generator=rng)
    return ModelInputs(torch.zeros(num_rows, 1), {"x": (ids, torch.arange(num_rows + 1))})


def check(model, tables=("table:item", "table:user")):
    adapter = ModelAdapter(model)
    reference, gradients = adapter.differentiated(inputs())
    check_assignment(adapter, inputs(), reference, gradients, tables)


def plain(model, x, user):
    return model.head(model.item(*x), user)


def hard(model, x, user):
    return 5 * torch.tanh(20 * model.head(model.item(*x), user)) + torch.relu(model.item(*x)).sum(1)


def in_bf16(model, x, user):
    with torch.autocast("cpu", torch.bfloat16):
        return model.head(model.item(*x), user)


def in_place(model, x, user):
    item = model.item(*x)
    item *= 2
    return model.head(torch.relu_(item), user)


def rounded(model, x, user):
    item = model.item(*x)
    return model.head(item + (torch.round(item) - item).detach(), user)


@pytest.mark.parametrize("combine", [plain, hard, in_bf16, in_place, rounded])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 100.0])
def test_right_models_pass(combine, scale):
    check(Model(combine, scale))


def test_a_table_that_does_nothing_passes():
    check(Model(lambda model, x, user: model.head(0 * model.item(*x), user)))


def sorted_rows(model, x, user):
    ids, order = x[0].sort()
    item = model.item(ids, x[1])
    return model.head(torch.zeros_like(item).index_copy(0, order, item), user)


def shared(model, x, user):
    return model.head(model.item(*x).mean(0, keepdim=True).expand_as(user), user)


def without_grad(model, x, user):
    with torch.no_grad():
        item = model.item(*x)
    return model.head(item, user)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(
    ("combine", "said"),
    [
        (sorted_rows, 'table "item".*reorders the rows of its lookup'),
        (shared, 'table "item".*shares them among examples'),
        (without_grad, 'table "item".*no gradient reaches it'),
        (lambda model, x, user: model.head(model.item(*x).detach(), user), 'table "item".*no gradient reaches it'),
        (
            lambda model, x, user: model.head(0.6 * model.item(*x).detach() + 0.4 * model.item(*x), user),
            'table "item".*predicts only a part of what',
        ),
    ],
    ids=["sorted", "shared", "no_grad", "detach", "half"],
)
def test_wrong_models_are_refused(combine, said, scale):
    with pytest.raises(ModelError, match=said):
        check(Model(combine, scale))
    check(Model(combine, scale), ["table:user"])


def test_a_cut_gradient_under_autocast_is_refused():
    def cut(model, x, user):
        with torch.autocast("cpu", torch.bfloat16):
            return model.head(model.item(*x).detach(), user)

    with pytest.raises(ModelError, match="no gradient reaches it"):
        check(Model(cut))


@pytest.mark.parametrize(
    ("lookup", "said"),
    [
        (
            lambda bag, ids: bag(ids.repeat(4), torch.arange(513)),
            r'"item" was looked up with 512 bags for a batch of 128',
        ),
        (lambda bag, ids: bag(ids[:1], torch.arange(2)), r'"item" was looked up with 1 bag for .*one lookup for all'),
    ],
)
def test_lookups_that_are_not_one_vector_an_example_are_named(lookup, said):
    def combine(model, x, user):
        return model.head(lookup(model.item, x[0])[:1].expand_as(user), user)

    calls = ModelAdapter(Model(combine)).reference(inputs()).calls
    with pytest.raises(ModelError, match=said):
        check_bags(calls, 128, ["table:item"])
    check_bags(calls, 128, ["table:user"])
