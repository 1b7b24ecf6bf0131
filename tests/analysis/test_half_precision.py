"""fp16 on paper: the simulation against PyTorch's own fp16, and the nodes that have to stay in fp32."""

import numpy as np
import pytest
import torch
from support.exported import require_exporter
from torch import nn

from swin_mm.analysis.half_precision import (
    convert_to_fp16,
    largest_magnitudes,
    layer_precisions,
    nodes_to_keep,
    session,
    simulate_fp16,
)

pytest.importorskip('onnxruntime')
require_exporter()


class Net(nn.Module):
    """A residual block with a large stream, a head, and a decoding that counts in pixels."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.embed, self.norm, self.mlp = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.embed(image) * self.scale
        x = x + self.mlp(self.norm(x))
        return self.head(nn.functional.layer_norm(x, (16,))) * 8 + 1500.3


def exported(scale: float):
    """The module, its ONNX model, and images."""
    torch.manual_seed(0)
    net, image = Net(scale).eval(), torch.randn(5, 8)
    options = dict(input_names=['image'], output_names=['boxes'], verbose=False, dynamo=True)
    model = torch.onnx.export(net, (image,), dynamic_shapes=({0: 'batch'},), **options).model_proto
    return net, model, image


def ops(model, names):
    return [node.op_type for node in model.graph.node if node.name in names]


def test_the_simulation_agrees_with_half_precision_of_pytorch():
    net, model, image = exported(1.0)
    expected = net.half()(image.half()).float()
    simulated = torch.from_numpy(session(simulate_fp16(model))(image.numpy())['boxes'])
    exact = torch.from_numpy(session(model)(image.numpy())['boxes'])
    assert (simulated == expected).float().mean() > 0.8, 'both count in whole pixels'
    assert 0.1 < (simulated - exact).abs().max() <= 1.5


def test_what_overflows_and_what_counts_in_pixels_is_kept():
    _net, model, image = exported(1e5)
    assert not np.isfinite(session(simulate_fp16(model))(image.numpy())['boxes']).all()
    keep = nodes_to_keep(model, largest_magnitudes(model, [image.numpy()]))
    assert list(keep.values()) == ['overflow'] * 4 + ['boxes'] * 2
    assert ops(model, [name for name, why in keep.items() if why == 'overflow']) == [
        'Mul',
        'LayerNormalization',
        'Add',
        'LayerNormalization',
    ]
    exact = session(model)(image.numpy())['boxes']
    kept = session(simulate_fp16(model, keep))(image.numpy())['boxes']
    assert np.abs(kept - exact).max() < 0.05
    without_boxes = [name for name, why in keep.items() if why != 'boxes']
    assert np.abs(session(simulate_fp16(model, without_boxes))(image.numpy())['boxes'] - exact).max() > 0.1


def test_squares_inside_a_normalisation_are_kept_before_the_values_overflow():
    _, model, image = exported(1e3)
    keep = nodes_to_keep(model, largest_magnitudes(model, [image.numpy()]))
    assert ops(model, [name for name, why in keep.items() if why == 'squares']) == ['LayerNormalization'] * 2
    assert 'overflow' not in keep.values()


def test_coordinates_of_an_operator_inside_the_network_count_as_boxes():
    """As between the stages of a detector: RoiAlign's maps are of the network, its boxes are not."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), 'weight')
    nodes = [
        helper.make_node('Conv', ['image', 'weight'], ['map'], 'conv'),
        helper.make_node('Mul', ['deltas', 'deltas'], ['boxes'], 'decode'),
        helper.make_node('RoiAlign', ['map', 'boxes', 'batch'], ['crops'], 'roi', output_height=1, output_width=1),
        helper.make_node('Conv', ['crops', 'weight'], ['out'], 'head'),
    ]
    names = {'image': [1, 1, 8, 8], 'deltas': [1, 4]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in names.items()]
    inputs.append(helper.make_tensor_value_info('batch', TensorProto.INT64, [1]))
    out = helper.make_tensor_value_info('out', TensorProto.FLOAT, [1, 1, 1, 1])
    model = helper.make_model(helper.make_graph(nodes, 'two stages', inputs, [out], [weight]))
    magnitudes = dict.fromkeys(['map', 'boxes', 'crops', 'out'], 1.0)
    assert nodes_to_keep(model, magnitudes) == {'decode': 'boxes'}


def test_the_converted_file_computes_what_is_simulated():
    pytest.importorskip('onnxconverter_common')
    _, model, image = exported(1e5)
    keep = nodes_to_keep(model, largest_magnitudes(model, [image.numpy()]))
    simulated = session(simulate_fp16(model, keep))(image.numpy())['boxes']
    half = session(convert_to_fp16(model, keep))(image.numpy())['boxes']
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, simulated, atol=0.02)
    rounded = session(convert_to_fp16(model, []))(image.numpy())['boxes']
    assert np.abs(rounded - simulated).max() > 0.1, 'it counts in whole pixels'


def test_arguments_of_tensorrt():
    arguments = layer_precisions(['a', 'b'])
    assert arguments['--layerPrecisions'] == arguments['--layerOutputTypes'] == 'a:fp32,b:fp32'
