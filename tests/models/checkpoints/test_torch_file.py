"""Files of `torch.save` as people have them: training state beside the weights, cut short, in an old format."""

import argparse
import pickle

import numpy as np
import pytest
import torch
from checkpoint_formats import model_with, state_of

from lowprec.core.errors import CheckpointError
from lowprec.models.checkpoints.checkpoint import load_checkpoint


def loaded(path):
    model = model_with(2)
    load_checkpoint(model, path)
    return model


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_numbers_of_numpy_may_stand_beside_a_state_dict(key, tmp_path):
    beside = {
        "auc": np.float64(0.6),
        "loss": [np.float32(1.5), np.float16(2)],
        "epoch": np.int64(3),
        "is_best": np.bool_(True),
        "name": np.str_("x"),
        "random": np.random.RandomState(0).get_state(),
    }
    torch.save({**beside, key: state_of(model_with(1))}, tmp_path / "m.pt")
    assert torch.equal(loaded(tmp_path / "m.pt").tables["c3"].weight, model_with(1).tables["c3"].weight)


def test_numbers_as_numpy_1_wrote_them(tmp_path, monkeypatch):
    class Numpy1(pickle._Pickler):
        def save_global(self, obj, name=None):
            if obj is np._core.multiarray.scalar:
                self.write(b"cnumpy.core.multiarray\nscalar\n")
            else:
                super().save_global(obj, name)

    module = type("module", (), {"Pickler": Numpy1})
    torch.save({"auc": np.float64(1), "model": state_of(model_with(1))}, tmp_path / "m.pt", pickle_module=module)
    assert b"numpy.core.multiarray" in (tmp_path / "m.pt").read_bytes()
    loaded(tmp_path / "m.pt")


def test_objects_get_one_hint(tmp_path):
    state = state_of(model_with(1))
    for beside, named in (
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (np.array([{}], dtype=object), "ObjectDType"),
    ):
        torch.save({"x": beside, "state_dict": state}, tmp_path / "m.pt")
        with pytest.raises(CheckpointError) as raised:
            loaded(tmp_path / "m.pt")
        message = str(raised.value)
        assert named in message and message.endswith("save model.state_dict() instead")
        assert "safe_globals" not in message and "weights_only" not in message


def test_a_state_dict_under_another_key_is_named(tmp_path):
    torch.save({"epoch": 3, "net": state_of(model_with(1))}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match='must hold a state dict .*; save what its key "net" holds alone'):
        loaded(tmp_path / "m.pt")


def test_a_file_that_is_cut_at_any_length_is_truncated(tmp_path):
    torch.save(state_of(model_with(1)), tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    # Every kind of what PyTorch says of it is among these lengths, and the last bytes all are.
    lengths = {
        *range(5),
        21,
        22,
        30,
        100,
        *range(1000, len(whole), len(whole) // 20),
        *range(len(whole) - 30, len(whole)),
    }
    for length in sorted(lengths):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as raised:
            loaded(tmp_path / "cut.pt")
        assert f"cut.pt: is truncated: it ends after {length:,} bytes" in str(raised.value), length


def test_other_files_say_what_they_are(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(state_of(model_with(1)), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format of PyTorch before 1\.6"):
        loaded(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        loaded(path)


def test_a_weight_that_was_stored_transposed_is_put_in_order(tmp_path):
    state = state_of(model_with(1))
    state["tables.c3.weight"] = state["tables.c3.weight"].t().contiguous().t()
    torch.save(state, tmp_path / "m.pt")
    weight = loaded(tmp_path / "m.pt").tables["c3"].weight
    assert weight.is_contiguous() and torch.equal(weight, state["tables.c3.weight"])
