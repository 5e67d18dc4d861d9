"""A small model, and the formats in which a checkpoint of it is read."""

import json
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn


class Model(nn.Module):
    def __init__(self, rows=100, dim=16):
        super().__init__()
        self.tables = nn.ModuleDict({"c3": nn.EmbeddingBag(rows, dim), "c4": nn.EmbeddingBag(7, dim)})
        self.top = nn.Linear(dim, 1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("steps", torch.tensor(5))


def model_with(seed, **sizes):
    torch.manual_seed(seed)
    return Model(**sizes)


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write_one(state, folder):
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_sharded(state, folder):
    names = list(state)
    files = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def write_sharded_folder(state, folder):
    return write_sharded(state, folder).parent


def write_folder_without_index(state, folder):
    write_sharded(state, folder).unlink()
    return folder


def write_torch(state, folder):
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def write_torch_nested(state, folder):
    torch.save({"epoch": 3, "state_dict": state}, folder / "model.pth")
    return folder / "model.pth"


def write_distributed(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it saves in one process
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def write_distributed_nested(state, folder):
    return write_distributed({"model": state}, folder)


WRITERS = [
    write_one,
    write_sharded,
    write_sharded_folder,
    write_folder_without_index,
    write_torch,
    write_torch_nested,
    write_distributed,
    write_distributed_nested,
]
every_format = pytest.mark.parametrize("write", WRITERS)
