"""What a model gets from a checkpoint: other formats of numbers, tied tables, names and shapes that do not fit, NaN."""

import numpy as np
import pytest
import torch
from checkpoint_formats import every_format, model_with, state_of, write_distributed, write_one
from safetensors.torch import save_file
from torch import nn

from lowprec.core.errors import CheckpointError, WeightError
from lowprec.models.checkpoints.checkpoint import load_checkpoint, read_rows, save_checkpoint


def test_other_float_formats_are_cast_and_reported(tmp_path):
    state = state_of(model_with(1))
    state["tables.c3.weight"] = state["tables.c3.weight"].to(torch.bfloat16)
    state["tables.c4.weight"] = state["tables.c4.weight"].half()
    state["top.weight"] = state["top.weight"].double()
    path, model = write_one(state, tmp_path), model_with(2)
    loaded = load_checkpoint(model, path)
    assert loaded.cast == {"tables.c3.weight": "bfloat16", "tables.c4.weight": "float16", "top.weight": "float64"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype))
    rows = read_rows(path, "tables.c3.weight", 3, 5)
    np.testing.assert_array_equal(rows, state["tables.c3.weight"][3:5].float().numpy())


def test_integers_are_no_weights(tmp_path):
    state = state_of(model_with(1))
    state["top.bias"] = torch.ones(1, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r'"top.bias": is torch.int64, model has torch.float32'):
        load_checkpoint(model_with(2), write_one(state, tmp_path))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.item = nn.EmbeddingBag(9, 4), nn.EmbeddingBag(9, 4)
        self.item.weight = self.query.weight


@pytest.mark.parametrize("stored", [("query.weight",), ("item.weight",), ("query.weight", "item.weight")])
def test_tied_tables_stay_one_table(stored, tmp_path):
    weight = torch.randn(9, 4)
    model = Tied()
    load_checkpoint(model, write_one({name: weight.clone() for name in stored}, tmp_path))
    assert model.item.weight is model.query.weight
    assert torch.equal(model.item.weight, weight)


def test_tied_tables_are_saved_and_must_be_stored_equal(tmp_path):
    model = Tied()
    save_checkpoint(model, tmp_path / "tied.safetensors")
    load_checkpoint(Tied(), tmp_path / "tied.safetensors")
    path = write_one({"query.weight": torch.zeros(9, 4), "item.weight": torch.ones(9, 4)}, tmp_path)
    with pytest.raises(CheckpointError, match="ties .* but they are stored different"):
        load_checkpoint(Tied(), path)


@every_format
def test_another_shape(write, tmp_path):
    path = write(state_of(model_with(1)), tmp_path)
    with pytest.raises(CheckpointError, match="tables.c3.weight: checkpoint has 100 x 16, model has 200 x 16"):
        load_checkpoint(model_with(2, rows=200), path)


def test_missing_and_unexpected_names(tmp_path):
    state = state_of(model_with(1))
    state["tables.c5.weight"] = state.pop("tables.c4.weight")
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(model_with(2), write_one(state, tmp_path))
    assert 'the checkpoint has no "tables.c4.weight"; the model has no "tables.c5.weight"' in str(raised.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "net.model."])
def test_names_of_a_wrapped_model_get_a_hint(prefix, tmp_path):
    state = {f"{prefix}{name}": tensor for name, tensor in state_of(model_with(1)).items()}
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(model_with(2), write_one(state, tmp_path))
    assert str(raised.value).endswith(f'every name begins with "{prefix}": save model.{prefix}state_dict()')
    state.popitem()  # and another difference beside
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(model_with(2), write_one(state, tmp_path))
    assert ("every name begins with" in str(raised.value)) == ("net" not in prefix)


def test_wrappers_of_the_model_and_of_its_parts_get_a_hint(tmp_path):
    model = nn.ModuleDict({"_orig_mod": model_with(1)})
    with pytest.raises(CheckpointError, match='every name of the model begins with "_orig_mod.": let model.factory'):
        load_checkpoint(model, write_one(state_of(model_with(1)), tmp_path))
    state = {name.replace("tables.", "tables.module._orig_mod."): t for name, t in state_of(model_with(1)).items()}
    with pytest.raises(CheckpointError, match='names hold "_orig_mod." and "module." of wrapped modules: rename them'):
        load_checkpoint(model_with(1), write_one(state, tmp_path))


def test_nan_in_dense_weights_is_named(tmp_path):
    state = state_of(model_with(1))
    state["top.weight"][0, 3] = float("nan")
    with pytest.raises(WeightError, match=r'"top.weight": holds nan at \[0, 3\]'):
        load_checkpoint(model_with(2), write_one(state, tmp_path))


def test_nan_in_a_table_is_left_to_those_who_read_the_row(tmp_path):
    state = state_of(model_with(1))
    state["tables.c3.weight"][5] = float("inf")
    load_checkpoint(model_with(2), write_one(state, tmp_path))


def test_writing_to_a_loaded_weight_leaves_the_file_alone(tmp_path):
    path = write_one(state_of(model_with(1)), tmp_path)
    before, model = path.read_bytes(), model_with(2)
    load_checkpoint(model, path)
    model.tables["c3"].weight.fill_(7.0)
    assert path.read_bytes() == before


def test_a_model_whose_only_child_is_called_model_is_not_taken_for_a_nested_checkpoint(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 3)

    saved, loaded = Wrapped(), Wrapped()
    folder = write_distributed(dict(saved.state_dict()), tmp_path)
    load_checkpoint(loaded, folder)
    torch.testing.assert_close(loaded.model.weight, saved.model.weight, check_stride=False)
    np.testing.assert_array_equal(read_rows(folder, "model.weight", 1, 2), saved.model.weight[1:2].detach().numpy())


def test_where_a_tensor_lies_in_a_file_decides_no_bit(tmp_path):
    """Products of matrices and vectors depend on the alignment of memory in their last bits."""
    torch.manual_seed(0)
    weight, x = torch.randn(1, 256), torch.randn(1000, 256)
    found = []
    for k in range(4):
        # The tensor before it, by name, moves it by four bytes.
        save_file({"a": torch.zeros(k + 1), "over.weight": weight}, tmp_path / f"{k}.safetensors")
        model = nn.Module()
        model.register_buffer("a", torch.zeros(k + 1))
        model.over = nn.Linear(256, 1, bias=False)
        load_checkpoint(model, tmp_path / f"{k}.safetensors")
        found.append(model.over(x))
        assert model.over.weight.data_ptr() % 64 == 0
    assert all(torch.equal(found[0], other) for other in found)
