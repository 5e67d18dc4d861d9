"""The FC layers of a model: found by their paths, watched, and computed at low precision without being rewritten."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowprec.core.errors import ModelError
from lowprec.models.adapter import ModelAdapter, ModelInputs
from lowprec.models.called import layer_rows
from lowprec.models.layers import LayerModules
from lowprec.ops.linear import safe_input_bits
from lowprec.plan import Precision, Unit
from lowprec.plan.layer_form import LayerForm


class Towers(nn.Module):
    """Two towers over one table, one layer called on a sequence, one weight shared by two modules, in-place ReLUs."""

    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(20, 8, mode="sum", include_last_offset=True)
        self.left = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True))
        self.right = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
        self.again = nn.Linear(8, 8)
        self.again.weight = self.right[0].weight
        self.over = nn.Linear(8, 1, bias=False)

    def forward(self, dense, sparse):
        left = self.left(dense)
        right = self.right(self.table(*sparse["x"]))
        steps = torch.stack([left, right, left * right], dim=1)
        return self.over(self.again(steps)).sum(dim=(1, 2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Towers().eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return ModelInputs(torch.randn(30, 3), {"x": (torch.randint(0, 20, (60,)), torch.arange(0, 61, 2))})


def test_layers_are_called_by_their_paths_and_shared_weights_are_one(model):
    layers = LayerModules(model)
    assert layers.units == (Unit("layer:left.0", 8, 3), Unit("layer:right.0", 8, 8), Unit("layer:over", 1, 8))
    assert layers.paths == {"layer:left.0": "left.0", "layer:right.0": "right.0", "layer:over": "over"}
    assert layers.weights["layer:over"].data_ptr() == model.over.weight.data_ptr()


def by_pytorch(model, dense, sparse):
    """The model with the shared layer computed as PyTorch's own documentation does it, weights by their maximum."""

    def low(x, module):
        scales = module.weight.detach().abs().amax(dim=1) / 127
        codes = torch.round(module.weight.detach() / scales[:, None]).to(torch.int8)
        zeros = torch.zeros(8, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, module.bias)
        return torch.ops.quantized.linear_dynamic(x, packed, safe_input_bits() == 7)

    left = model.left(dense)
    right = functional.relu(low(model.table(*sparse["x"]), model.right[0]))
    steps = torch.stack([left, right, left * right], dim=1)
    return model.over(low(steps.reshape(-1, 8), model.again).reshape(-1, 3, 8)).sum(dim=(1, 2))


def test_a_low_layer_is_computed_wherever_its_weight_is(model, inputs):
    adapter = ModelAdapter(model)
    reference = adapter.reference(inputs)
    outputs = [call.output for call in reference.calls]
    at = (("layer:right.0", Precision.INT8_DYNAMIC, LayerForm(input_bits=safe_input_bits())),)
    before = torch.backends.quantized.engine
    found = adapter.run_with_outputs(inputs, reference, outputs, at)
    assert torch.backends.quantized.engine == before
    torch.backends.quantized.engine = "fbgemm"
    try:
        with torch.inference_mode():
            expected = by_pytorch(model, inputs.dense, inputs.sparse)
    finally:
        torch.backends.quantized.engine = before
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.equal(found, reference.logits)
    assert torch.equal(adapter.run_with_outputs(inputs, reference, outputs), reference.logits)
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("layer", ["layer:left.0", "layer:right.0"])
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16, Precision.INT8_DYNAMIC, Precision.INT8_STATIC])
def test_first_order_changes_are_nearly_what_a_low_layer_does(model, inputs, precision, layer):
    """The change of a logit by a layer alone, against the gradient of its output times the change of its output."""
    adapter = ModelAdapter(model)
    reference, gradients = adapter.differentiated(inputs, None, [layer])
    static = {"input_scale": 0.05, "input_zero_point": 64} if precision is Precision.INT8_STATIC else {}
    form = LayerForm(input_bits=safe_input_bits(), **static)
    change = torch.zeros(30)
    for call, gradient in zip(reference.layer_calls, gradients.layers, strict=True):
        assert gradient.shape == call.output.shape
        low = adapter.layers.low(call.layer, call.position, precision, form)
        with torch.no_grad():
            moved = low(call.input.reshape(-1, call.input.shape[-1])) - call.output.reshape(-1, 8)
            change += (moved * gradient.reshape(-1, 8)).reshape(30, -1).sum(dim=1)
    outputs = [call.output for call in reference.calls]
    exact = adapter.run_with_outputs(inputs, reference, outputs, ((layer, precision, form),)) - reference.logits
    error, size = float((exact - change).square().sum()), float(exact.square().sum())
    # Called once, the layer does what its gradient says. Where it is called on what it has changed itself, that is
    # rounded anew, so that errors are as large as they were, and others.
    assert [call.position for call in reference.layer_calls] == ([0] if layer == "layer:left.0" else [0, 1])
    assert error < (0.001 if layer == "layer:left.0" else 0.5) * size
    torch.testing.assert_close(reference.logits, adapter.reference(inputs).logits)


def test_watching_changes_no_bit_and_keeps_inputs_from_what_the_model_does_to_them(model, inputs):
    adapter = ModelAdapter(model)
    expected = adapter.reference(inputs).logits
    with torch.inference_mode(), adapter.layers.watched(["layer:left.0", "layer:over"]) as calls:
        found = adapter.model(inputs.dense, dict(inputs.sparse))
    assert torch.equal(found, expected)
    assert [(call.layer, tuple(call.input.shape)) for call in calls] == [
        ("layer:left.0", (30, 3)),
        ("layer:over", (30, 3, 8)),
    ]
    reference, _ = adapter.differentiated(inputs, None, ["layer:left.0"])
    (call,) = reference.layer_calls
    # The ReLU after it works in place; what is kept is what the layer gave.
    torch.testing.assert_close(call.output, functional.linear(call.input, model.left[0].weight, model.left[0].bias))


def test_low_layers_are_kept_up_to_a_bound(model, monkeypatch):
    monkeypatch.setattr("lowprec.models.layers.MAX_LOW_BYTES", 2 * 4 * model.again.weight.numel())
    layers = LayerModules(model)
    forms = [LayerForm(outliers=k, input_bits=safe_input_bits()) for k in (0, 0.1, 0.2)]
    first, second, _ = made = [layers.low("layer:right.0", 0, Precision.INT8_DYNAMIC, form) for form in forms]
    # Of three, the last two are kept; one that is asked for again is the youngest of them.
    assert layers.low("layer:right.0", 0, Precision.INT8_DYNAMIC, forms[1]) is second
    assert layers.low("layer:right.0", 0, Precision.INT8_DYNAMIC, forms[0]) is not first
    assert layers.low("layer:right.0", 0, Precision.INT8_DYNAMIC, forms[1]) is second
    assert layers.low("layer:right.0", 0, Precision.INT8_DYNAMIC, forms[2]) is not made[2]


class Wrapped(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_layer_with_a_forward_of_its_own_stays_fp32(model, inputs):
    model.over = Wrapped(8, 1)
    layers = LayerModules(model)
    with pytest.raises(ModelError, match='"layer:over" is a Wrapped of torch.float32 with a forward of its own'):
        layers.low("layer:over", 0, Precision.BF16, None)


def test_rows_of_an_example_are_counted_without_looking_anything_up(model, inputs):
    adapter = ModelAdapter(model)
    with torch.no_grad():
        model.table.weight.fill_(torch.nan)
    assert layer_rows(adapter, inputs) == {"layer:left.0": 1.0, "layer:right.0": 1.0 + 3.0, "layer:over": 3.0}
