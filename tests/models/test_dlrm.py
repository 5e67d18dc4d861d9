"""The built-in DLRM: what it computes, which tables it makes, what it refuses."""

import itertools

import pytest
import torch
from torch import nn

from lowprec.core.errors import ConfigError, ModelError
from lowprec.models.dlrm import _pairwise_dots, _PairwiseDots, build
from lowprec.traffic.schema import Schema, SparseFeature


def schema(*features, dense=("d0", "d1")):
    return Schema(label="y", dense=dense, sparse=tuple(features))


def feature(name, num_embeddings=None, weights=None):
    return SparseFeature(name=name, column=name, num_embeddings=num_embeddings, weights=weights)


def bags(*lists):
    lengths = torch.tensor([0, *(len(ids) for ids in lists)])
    return torch.tensor([i for ids in lists for i in ids], dtype=torch.int64), lengths.cumsum(0)


TWO = schema(feature("a", 10), feature("b", 20))
SPARSE = {"a": bags([1, 2], [], [3]), "b": bags([4], [5, 5], [19])}
DENSE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def test_one_table_for_each_feature_under_its_own_name():
    model = build(TWO, embedding_dim=4)
    tables = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.EmbeddingBag)}
    assert tables == {"tables.a": (10, 4), "tables.b": (20, 4)}
    assert "pairs" not in model.state_dict()


def test_logits_are_those_of_the_paper_written_out():
    torch.manual_seed(0)
    model = build(TWO, embedding_dim=4, bottom=(5,), top=(6,))
    model.set_dense_statistics(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.5]))
    logits = model(DENSE, SPARSE)
    for row in range(3):
        first = model.bottom((DENSE[row] - torch.tensor([3.0, 4.0])) / torch.tensor([2.0, 0.5]))
        vectors = [first]
        for name, (ids, offsets) in SPARSE.items():
            vectors.append(model.tables[name].weight[ids[offsets[row] : offsets[row + 1]]].sum(0))
        dots = [torch.dot(vectors[i], vectors[j]) for i in range(3) for j in range(i)]
        expected = model.top(torch.cat([first, torch.stack(dots)]))
        # A dozen float32 products and sums of order one, in another order.
        torch.testing.assert_close(logits[row], expected[0], rtol=1e-5, atol=1e-6)


def test_features_can_share_a_table_with_its_own_pooling():
    shared = schema(feature("movie", 50), feature("history", 50), feature("user", 7))
    tables = {"item": {"features": ["history", "movie"], "num_embeddings": 60, "pooling": "mean"}}
    model = build(shared, embedding_dim=4, tables=tables)
    assert model.feature_tables == {"movie": "item", "history": "item", "user": "user"}
    assert list(model.tables) == ["item", "user"]
    assert (model.tables["item"].num_embeddings, model.tables["item"].mode) == (60, "mean")
    assert (model.tables["user"].num_embeddings, model.tables["user"].mode) == (7, "sum")
    ids = {"movie": bags([1]), "history": bags([1, 2]), "user": bags([3])}
    model(DENSE[:1], ids).sum().backward()
    assert set(model.tables["item"].weight.grad.coalesce().indices()[0].tolist()) == {1, 2}


def test_per_sample_weights_scale_the_rows():
    model = build(schema(feature("a", 10, weights="w"), feature("b", 20)), embedding_dim=4)
    ids, offsets = SPARSE["a"]
    once = model(DENSE, {**SPARSE, "a": (*bags([1, 2], [], [3, 3]), torch.tensor([1.0, 1.0, 1.0, 1.0]))})
    twice = model(DENSE, {**SPARSE, "a": (ids, offsets, torch.tensor([1.0, 1.0, 2.0]))})
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-6)


def test_no_dense_columns_and_a_single_feature():
    model = build(schema(feature("a", 10), dense=()), embedding_dim=4)
    logits = model(torch.zeros(3, 0), {"a": SPARSE["a"]})
    assert logits.shape == (3,)
    logits.sum().backward()
    assert model.constant.grad.abs().sum() > 0


def test_table_gradients_are_sparse_and_everything_trains():
    model = build(TWO)
    model(DENSE, SPARSE).sum().backward()
    assert model.tables["a"].weight.grad.is_sparse
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tables_start_small_as_in_the_reference_implementation():
    torch.manual_seed(0)
    weight = build(schema(feature("a", 10_000)), embedding_dim=16).tables["a"].weight
    assert weight.abs().max() <= 0.01
    # Uniform in +-b has deviation b / sqrt(3); 160,000 values know it to 0.2 percent, five deviations are 1 percent.
    assert weight.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.01)


def test_an_outlier_or_a_constant_column_stays_finite():
    model = build(TWO)
    model.set_dense_statistics(torch.zeros(2), torch.tensor([1.0, 0.0]))
    far, further = (model(torch.full((3, 2), value), SPARSE) for value in (1e6, 1e30))
    assert torch.isfinite(far).all()
    torch.testing.assert_close(far, further, rtol=0, atol=0)


A = feature("a", 10)


@pytest.mark.parametrize(
    ("columns", "arguments", "sentence"),
    [
        (schema(feature("a")), {}, 'table "a": number of rows is unknown; set num_embeddings or modulo of "a"'),
        (schema(A), {"pooling": "max"}, "pooling must be one of sum, mean; got 'max'"),
        (schema(A), {"embedding_dim": 0}, "model.args.embedding_dim: sizes must be positive"),
        (schema(A), {"top": (64, "x")}, "model.args.top: sizes must be positive"),
        (schema(A), {"tables": {"t": {"features": ["z"]}}}, 'tables.t: "z" is not among traffic.sparse (a)'),
        (schema(A), {"tables": {"t": {"rows": 3, "features": ["a"]}}}, "no such key: rows"),
        (schema(A), {"tables": {"t": {}}}, "needs {features: [...]}"),
        (schema(A), {"tables": {"t": {"features": ["a"], "num_embeddings": 9}}}, "has ids up to 9"),
        (schema(A), {"tables": {"t": {"features": ["a"], "num_embeddings": "9"}}}, "must be a positive integer"),
        (
            schema(A, feature("b", 3)),
            {"tables": {"s": {"features": ["a"]}, "t": {"features": ["a", "b"]}}},
            'feature "a" already reads table "s"',
        ),
        (schema(A, feature("b", 3)), {"tables": {"a": {"features": ["b"]}}}, "has a table of that name already"),
        (schema(feature("type", 3)), {}, 'table "type": torch does not allow this module name'),
        (schema(feature("x.y", 3)), {}, 'table "x.y": torch does not allow this module name'),
        (schema(feature("a", 3, weights="w")), {"pooling": "mean"}, "has weights, which need pooling sum"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(columns, arguments, sentence):
    with pytest.raises(ConfigError) as raised:
        build(columns, **arguments)
    assert sentence in str(raised.value)


def test_a_table_can_be_renamed_where_torch_forbids_the_name():
    model = build(schema(feature("type", 3)), tables={"kind": {"features": ["type"]}})
    assert model(DENSE, {"type": bags([1], [2], [0])}).shape == (3,)


def test_a_missing_sparse_input_is_named():
    with pytest.raises(ModelError, match='sparse input "b" is missing; got a'):
        build(TWO)(DENSE, {"a": SPARSE["a"]})


def test_every_pair_is_used_once():
    model = build(schema(*(feature(f"f{i}", 4) for i in range(4))))
    num_vectors = 5
    pairs = {divmod(flat, num_vectors) for flat in model.pairs.tolist()}
    assert pairs == {(i, j) for j, i in itertools.combinations(range(num_vectors), 2)}


def test_the_gradient_of_pairwise_dots_is_autograds():
    n = 5
    pairs = torch.tensor([i * n + j for i in range(n) for j in range(i)])
    vectors = torch.randn(7, n, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, len(pairs), dtype=torch.float64)
    expected = torch.autograd.grad((_pairwise_dots(vectors, pairs) * weights).sum(), vectors)
    found = torch.autograd.grad((_PairwiseDots.apply(vectors, pairs) * weights).sum(), vectors)
    torch.testing.assert_close(found, expected)
