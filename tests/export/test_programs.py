"""Programs of TorchScript and torch.export: the room that they need, and what they have no type for."""

import shutil

import pytest
import torch
from plans import write_mixed_plan

from lowprec.core.errors import ExportError
from lowprec.export import export_plan
from lowprec.export.programs import write_program
from lowprec.models.adapter import ModelInputs


@pytest.mark.parametrize("programs", [(), ("torchscript", "torch_export")])
def test_programs_count_for_the_room_that_is_needed(small_config, tmp_path, monkeypatch, programs):
    """PyTorch ends the process where the disk is full while it writes a program."""
    write_mixed_plan(config := small_config(), tmp_path / "plan.json")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 600_000))
    if programs:
        with pytest.raises(ExportError, match=r"and as much for each of 2 programs\) and the disk has 600 KB free"):
            export_plan(config, tmp_path / "plan.json", tmp_path / "served", programs=programs)
    else:
        export_plan(config, tmp_path / "plan.json", tmp_path / "served")


def test_torchscript_says_that_it_cannot_mix_features_with_and_without_weights(small_config, tmp_path):
    ids, ends = torch.arange(3), torch.arange(4)
    inputs = ModelInputs(torch.zeros(3, 1), {"plain": (ids, ends), "weighted": (ids, ends, torch.ones(3))})
    with pytest.raises(ExportError, match="has no type for a dict of features of which some have weights"):
        write_program("torchscript", torch.nn.Identity(), inputs, tmp_path)
