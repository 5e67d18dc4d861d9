"""Parameters that no plan covers are named once, with their bytes."""

import pytest
import torch
from torch import nn

from lowprec.core.errors import ModelError
from lowprec.models.adapter import ModelAdapter
from lowprec.models.uncovered import note_on_uncovered, uncovered_parameters


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(9, 4, mode="sum")
        self.position = nn.Embedding(5, 4)
        self.same = self.position
        self.cross = nn.Parameter(torch.zeros(4, 4))
        self.conv = nn.Conv1d(4, 2, 3)
        self.norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.top = nn.Linear(4, 1)
        self.head = nn.Conv1d(1, 1, 1, bias=False).bfloat16()


def test_every_parameter_outside_tables_and_layers_is_counted_once():
    found = {(u.name, u.kind): u.num_bytes for u in uncovered_parameters(ModelAdapter(Model()))}
    assert found == {
        ("attention", "nn.MultiheadAttention"): 4 * (12 * 4 + 12),
        ("conv", "nn.Conv1d"): 4 * (4 * 2 * 3 + 2),
        ("position", "nn.Embedding"): 4 * 5 * 4,
        ("attention.out_proj", "nn.NonDynamicallyQuantizableLinear"): 4 * (4 * 4 + 4),
        ("cross", "nn.Parameter"): 4 * 16,
        ("norm", "nn.BatchNorm1d"): 4 * 8,
        ("head", "nn.Conv1d of bfloat16"): 2,
    }
    (note,) = note_on_uncovered(uncovered_parameters(ModelAdapter(Model())))
    assert "attention (nn.MultiheadAttention, 240 B)" in note and "and 2 more" in note


def test_a_model_of_tables_and_layers_has_none():
    assert uncovered_parameters(ModelAdapter(nn.Sequential(nn.EmbeddingBag(9, 4, mode="sum"), nn.Linear(4, 1)))) == ()
    assert note_on_uncovered(()) == []


def test_embeddings_of_a_model_without_bags_are_named():
    model = nn.ModuleDict({"item": nn.Embedding(500, 8), "user": nn.Embedding(3000, 8)})
    with pytest.raises(ModelError, match=r"no nn.EmbeddingBag.*item \(500 x 8\), user \(3,000 x 8\)"):
        ModelAdapter(model)
