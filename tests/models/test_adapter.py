"""Any module with embedding bags is found, watched and answered for, and left as it was."""

import pytest
import torch
from torch import nn

from lowprec.core.errors import ModelError
from lowprec.models.adapter import ModelAdapter, ModelInputs
from lowprec.models.called import tables_of_features
from lowprec.models.checks import check_passes
from lowprec.plan import Unit
from lowprec.traffic import Schema, SparseFeature


class TwoTowers(nn.Module):
    """As a user would write it: a shared table, mean pooling, weights, 2-D ids, padding, both forms of offsets."""

    def __init__(self):
        super().__init__()
        self.user = nn.ModuleDict({"id": nn.EmbeddingBag(50, 8, mode="sum", include_last_offset=True)})
        self.item = nn.EmbeddingBag(30, 8, mode="mean", include_last_offset=True)
        self.tags = nn.EmbeddingBag(20, 4, mode="sum", padding_idx=0)
        self.many = nn.ModuleList([nn.EmbeddingBag(10, 4, mode="sum"), nn.EmbeddingBag(12, 4, mode="sum")])
        self.position = nn.Embedding(5, 4)
        self.out = nn.Linear(8 * 3 + 4 * 3 + 2, 1)

    def forward(self, dense, sparse):
        user_ids, user_offsets, user_weights = sparse["user"]
        parts = [dense, self.user["id"](user_ids, user_offsets, per_sample_weights=user_weights)]
        parts += [self.item(*sparse[name]) for name in ("shown", "liked")]
        tags, tag_offsets = sparse["tags"]
        parts.append(self.tags(tags, tag_offsets[:-1]))
        shown = sparse["shown"][0].reshape(len(dense), -1)
        parts += [bag((shown % bag.num_embeddings).int()) for bag in self.many]
        return self.out(torch.cat(parts, dim=1)).squeeze(1)


SCHEMA = Schema(
    label="y",
    dense=("d0", "d1"),
    sparse=(
        SparseFeature("user", "user", weights="w"),
        SparseFeature("shown", "shown"),
        SparseFeature("liked", "liked"),
        SparseFeature("tags", "tags"),
    ),
)


def bags(rng, num_rows, num_ids, lengths, weights=False):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, num_ids, (int(offsets[-1]),), generator=rng)
    return (ids, offsets, torch.rand(len(ids), generator=rng)) if weights else (ids, offsets)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoTowers()


@pytest.fixture
def inputs():
    rng = torch.Generator().manual_seed(1)
    sparse = {
        "user": bags(rng, 4, 50, [2, 0, 3, 1], weights=True),
        "shown": bags(rng, 4, 30, [1, 1, 1, 1]),
        "liked": bags(rng, 4, 30, [0, 4, 2, 0]),
        "tags": bags(rng, 4, 20, [3, 0, 1, 2]),
    }
    return ModelInputs(torch.rand(4, 2, generator=rng), sparse)


def test_units_are_named_after_their_modules(model):
    assert ModelAdapter(model).units == (
        Unit("table:id", 50, 8),
        Unit("table:item", 30, 8),
        Unit("table:tags", 20, 4),
        Unit("table:many.0", 10, 4),
        Unit("table:many.1", 12, 4),
    )
    assert ModelAdapter(model).other_embeddings == ("position",)


def test_the_reference_pass_is_the_model_itself(model, inputs):
    adapter = ModelAdapter(model)
    with torch.inference_mode():
        expected = model(inputs.dense, inputs.sparse)
    torch.testing.assert_close(adapter.reference(inputs).logits, expected, rtol=0, atol=0)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_recorded_calls_say_all_that_a_lookup_needs(model, inputs):
    """From indices, offsets and weights alone, in one form for every way to call a bag, the output comes again."""
    adapter = ModelAdapter(model)
    calls = adapter.reference(inputs).calls
    assert [c.table for c in calls] == [
        "table:id", "table:item", "table:item", "table:tags", "table:many.0", "table:many.1"
    ]  # fmt: skip
    for call in calls:
        again = nn.functional.embedding_bag(
            call.indices,
            adapter.weights[call.table],
            call.offsets,
            mode=call.mode,
            per_sample_weights=call.weights,
            include_last_offset=True,
        )
        torch.testing.assert_close(again, call.output)
        assert call.offsets[-1] == len(call.indices)


def test_substituting_the_same_outputs_changes_no_bit(model, inputs):
    adapter = ModelAdapter(model)
    reference = adapter.reference(inputs)
    same = adapter.run_with_outputs(inputs, reference, [c.output for c in reference.calls])
    torch.testing.assert_close(same, reference.logits, rtol=0, atol=0)


def test_substituting_equals_a_model_with_other_weights(model, inputs):
    adapter = ModelAdapter(model)
    reference = adapter.reference(inputs)
    with torch.no_grad():
        model.item.weight.mul_(0.5)
    outputs = [c.output * (0.5 if c.table == "table:item" else 1) for c in reference.calls]
    torch.testing.assert_close(adapter.run_with_outputs(inputs, reference, outputs), adapter.reference(inputs).logits)


def test_features_reach_tables_only_where_their_ids_are_unchanged(model):
    assert tables_of_features(ModelAdapter(model), SCHEMA) == {
        "user": "table:id", "shown": "table:item", "liked": "table:item", "tags": "table:tags"
    }  # fmt: skip


def test_bags_that_share_a_weight_are_one_table():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True)
            self.b = nn.EmbeddingBag(9, 4, mode="mean", include_last_offset=True)
            self.b.weight = self.a.weight

        def forward(self, dense, sparse):
            return (self.a(*sparse["x"]) + self.b(*sparse["x"])).sum(1)

    adapter = ModelAdapter(Tied())
    assert adapter.units == (Unit("table:a", 9, 4),)
    sparse = {"x": (torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]))}
    calls = adapter.reference(ModelInputs(torch.zeros(2, 0), sparse)).calls
    assert [(c.table, c.mode) for c in calls] == [("table:a", "sum"), ("table:a", "mean")]


def test_a_model_keeps_a_forward_of_its_own(model, inputs):
    original = model.item.forward
    seen = []

    def watched(*args):
        seen.append(1)
        return original(*args)

    model.item.forward = watched
    ModelAdapter(model).reference(inputs)
    assert len(seen) == 2 and model.item.forward is watched


def test_errors_leave_the_model_as_it_was(model, inputs):
    adapter = ModelAdapter(model)
    wrong = {**inputs.sparse, "shown": (torch.tensor([0, 1, 2, 30]), torch.arange(5))}
    with pytest.raises(ModelError, match='table "item" has 30 rows and was asked for id 30'):
        adapter.reference(ModelInputs(inputs.dense, wrong))
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    ("bag", "said"),
    [
        (nn.EmbeddingBag(4, 4, mode="max"), 'pools by "max"'),
        (nn.EmbeddingBag(4, 4, mode="sum", max_norm=1.0), "max_norm=1.0"),
    ],
)
def test_bags_without_a_low_precision_form_are_refused(bag, said):
    with pytest.raises(ModelError, match=said):
        ModelAdapter(nn.Sequential(bag))


def test_a_model_without_tables_is_refused():
    with pytest.raises(ModelError, match="no nn.EmbeddingBag"):
        ModelAdapter(nn.Linear(2, 1))


def test_a_model_that_returns_no_logits_is_refused():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True)

        def forward(self, dense, sparse):
            return self.a(*sparse["x"])

    sparse = {"x": (torch.tensor([1]), torch.tensor([0, 1, 1]))}
    with pytest.raises(ModelError, match=r"must return 2 float logits; returned \(2, 4\)"):
        ModelAdapter(Wide()).reference(ModelInputs(torch.zeros(2, 0), sparse))


def test_calls_that_depend_on_outputs_are_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True)
            self.b = nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True)

        def forward(self, dense, sparse):
            first = self.a(*sparse["x"])
            return (self.b if first.sum() < 1e6 else self.a)(*sparse["x"]).sum(1)

    adapter = ModelAdapter(Fickle())
    inputs = ModelInputs(torch.zeros(2, 0), {"x": (torch.tensor([1]), torch.tensor([0, 1, 1]))})
    reference = adapter.reference(inputs)
    with pytest.raises(ModelError, match="out of order"):
        adapter.run_with_outputs(inputs, reference, [torch.full((2, 4), 1e9), torch.zeros(2, 4)])


def test_gradients_are_those_of_each_row(model, inputs):
    """Moving one output by a small step in a random direction moves the logits as the gradient says."""
    adapter = ModelAdapter(model)
    model.double()
    double = ModelInputs(
        inputs.dense.double(),
        {k: tuple(t.double() if t.is_floating_point() else t for t in v) for k, v in inputs.sparse.items()},
    )
    reference, gradients = adapter.differentiated(double)
    torch.testing.assert_close(reference.logits, adapter.reference(double).logits)
    outputs = [c.output for c in reference.calls]
    for k, gradient in enumerate(gradients.tables):
        step = 1e-6 * torch.randn_like(outputs[k])
        moved = [o + step if j == k else o for j, o in enumerate(outputs)]
        change = adapter.run_with_outputs(double, reference, moved) - reference.logits
        torch.testing.assert_close(change, (gradient * step).sum(1), rtol=1e-3, atol=1e-12)
    assert not any("forward" in m.__dict__ for m in model.modules())


class OneTable(nn.Module):
    def __init__(self, bag=None, before=lambda dense: dense, after=lambda pooled: pooled):
        super().__init__()
        self.table = bag or nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True)
        self.before, self.after = before, after

    def forward(self, dense, sparse):
        return self.after(self.table(*sparse["x"])).sum(1) + self.before(dense).sum(1)


class Scaled(nn.EmbeddingBag):
    def forward(self, *args):
        return 2 * super().forward(*args)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (OneTable(before=lambda dense: dense.clamp_(min=0).log1p_()), "changes its inputs in place"),
        (OneTable(after=lambda pooled: nn.functional.dropout(pooled, 0.5)), "draws random numbers"),
        (OneTable(Scaled(9, 4, mode="sum", include_last_offset=True)), "something else than the embedding bag"),
    ],
    ids=["in-place", "dropout", "own-forward"],
)
def test_models_that_cannot_be_replayed_are_refused(model, said):
    torch.manual_seed(0)
    adapter = ModelAdapter(model)
    inputs = ModelInputs(torch.rand(64, 2) + 0.5, {"x": (torch.arange(64) % 9, torch.arange(65))})
    with pytest.raises(ModelError, match=said):
        check_passes(adapter, inputs, adapter.reference(inputs))


def test_well_behaved_models_pass_the_check(model, inputs):
    adapter = ModelAdapter(model)
    check_passes(adapter, inputs, adapter.reference(inputs))


def test_fewer_calls_in_a_second_pass_are_refused():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True)

        def forward(self, dense, sparse):
            first = self.a(*sparse["x"])
            return (first + self.a(*sparse["x"]) if first.sum() < 1e6 else first).sum(1)

    adapter = ModelAdapter(Lazy())
    inputs = ModelInputs(torch.zeros(2, 0), {"x": (torch.tensor([1]), torch.tensor([0, 1, 1]))})
    with pytest.raises(ModelError, match="2 times at first and 1 times"):
        adapter.run_with_outputs(inputs, adapter.reference(inputs), [torch.full((2, 4), 1e9)] * 2)


def test_a_weight_that_another_module_uses_too_is_refused():
    model = OneTable()
    model.linear = nn.Linear(4, 9, bias=False)
    model.linear.weight = model.table.weight
    with pytest.raises(ModelError, match='table "table" is also linear.weight of a Linear'):
        ModelAdapter(model)


def test_tables_of_another_type_are_refused():
    with pytest.raises(ModelError, match="bfloat16"):
        ModelAdapter(OneTable().bfloat16())
