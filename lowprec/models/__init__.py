"""Models: the built-in DLRM, any other `nn.Module`, and their checkpoints.

Training is in `lowprec.models.training`, the adapter that finds the tables of a model in `lowprec.models.adapter`.
"""

from lowprec.models.checkpoints.checkpoint import checkpoint_sha256, load_checkpoint, read_rows, save_checkpoint
from lowprec.models.dlrm import DLRM
from lowprec.models.factory import build_model, load_factory, without_table_init

__all__ = [
    "DLRM",
    "build_model",
    "checkpoint_sha256",
    "load_checkpoint",
    "load_factory",
    "read_rows",
    "save_checkpoint",
    "without_table_init",
]
