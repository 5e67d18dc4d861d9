"""Bytes are what FBGEMM allocates, and choices that cost as much as a more exact one are dropped."""

import pytest
import torch

from lowprec.ops.linear import stored_linear
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision, Unit
from lowprec.plan.cost import LayerStorage, plan_bytes, undominated, unit_bytes
from lowprec.plan.layer_form import LayerForm


@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("precision", list(TABLE_PRECISIONS))
@pytest.mark.parametrize("dim", [8, 16, 64, 128])
def test_row_bytes_equal_those_of_the_serving_module(alignment, precision, dim):
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import rounded_row_size_in_bytes

    served = rounded_row_size_in_bytes(dim, SparseType[precision.name], alignment)
    assert unit_bytes(Unit("table:t", 7, dim), precision, alignment) == 7 * served


def test_at_alignment_16_a_row_of_16_values_gains_nothing_from_int8_over_fp16_nor_from_int2_over_int4():
    unit = Unit("table:t", 100, 16)
    kept, dropped = undominated("table:t", [unit], TABLE_PRECISIONS, 16)
    assert kept == (Precision.FP32, Precision.FP16, Precision.INT4)
    assert [(d.precision, d.size_bytes, d.by, d.by_size_bytes) for d in dropped] == [
        (Precision.INT8, 3200, Precision.FP16, 3200),
        (Precision.INT2, 1600, Precision.INT4, 1600),
    ]
    assert undominated("table:t", [unit], TABLE_PRECISIONS, 1)[1] == ()


def test_narrow_rows_pay_more_for_scale_and_bias_than_they_save():
    kept, dropped = undominated("table:t", [Unit("table:t", 3, 2)], TABLE_PRECISIONS, 1)
    assert kept == (Precision.FP32, Precision.FP16)
    assert {d.precision for d in dropped} == {Precision.INT8, Precision.INT4, Precision.INT2}


def test_a_group_is_judged_by_its_sum():
    units = [Unit("table:a", 1, 2), Unit("table:b", 1000, 64)]
    kept, _ = undominated("group:0", units, TABLE_PRECISIONS, 1)
    assert kept == TABLE_PRECISIONS


def test_plan_bytes_add_up():
    units = [Unit("table:a", 10, 16), Unit("table:b", 5, 32)]
    plan = Plan({"table:a": Precision.INT4, "table:b": Precision.FP32})
    assert plan_bytes(units, plan, 1) == 10 * (4 + 8) + 5 * 128


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8_dynamic"])
def test_bytes_of_a_layer_are_those_that_are_stored(precision):
    unit, share = Unit("layer:top", num_rows=24, dim=50), 0.02
    form = LayerForm(outliers=share, input_bits=7)
    stored = stored_linear(torch.randn(24, 50), torch.randn(24), Precision(precision), form)
    size = sum(tensor.nbytes for name, tensor in stored.items() if name != "bias")
    assert unit_bytes(unit, Precision(precision), 1, LayerStorage(outliers=share)) == size
