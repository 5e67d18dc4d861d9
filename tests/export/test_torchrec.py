"""What TorchRec does with an export."""

import os
from importlib.util import find_spec

import pytest
import torch

from lowprec.export.torchrec import is_reordered
from lowprec.models.adapter import ModelAdapter


@pytest.mark.skipif(find_spec("torchrec") is None and "CI" not in os.environ, reason="make setup installs TorchRec")
def test_an_order_of_tables_that_torchrec_changes_is_said(tmp_path):
    """As TorchRec itself does it, and as the note says it."""
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
    from torchrec.inference.modules import quantize_embeddings

    for poolings, moves in ((["SUM", "MEAN", "SUM"], True), (["SUM", "SUM", "MEAN"], False)):
        tables = [
            EmbeddingBagConfig(
                name=f"t{k}", embedding_dim=8, num_embeddings=5, feature_names=[f"f{k}"], pooling=PoolingType[pooling]
            )
            for k, pooling in enumerate(poolings)
        ]
        model = torch.nn.Sequential(EmbeddingBagCollection(tables=tables))
        features = KeyedJaggedTensor.from_lengths_sync(["f0", "f1", "f2"], torch.arange(3), torch.ones(3).int())
        keys = [list(m(features).keys()) for m in (model, quantize_embeddings(model, torch.qint8, inplace=False))]
        assert (keys[0] != keys[1]) == moves == is_reordered(ModelAdapter(model))
