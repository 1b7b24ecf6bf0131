"""Which nodes of an ONNX file to keep in fp32 when the rest runs in fp16, and a simulation that shows the effect.

fp16 holds numbers up to 65504, with 11 bits: between 1024 and 2048 it counts in whole pixels. Three kinds of nodes are
kept in fp32:

* ``overflow``: the largest number in an output, over sample images, is too near 65504; its readers are kept, too, since
  they would get it in fp16 otherwise;
* ``squares``: nodes that sum squares of their input inside (normalisation), where the squares are too near 65504;
* ``boxes``: everything behind the network's last weights, such as decoding of boxes and suppression, which counts in
  pixels and offsets boxes of different classes by more than 65504.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config

from swin_mm.analysis.export.comparison import compare, paste_masks
from swin_mm.analysis.export.metadata import Metadata
from swin_mm.analysis.runtime import onnxruntime_run, read_metadata, sample_images
from swin_mm.utils.errors import InputError

LARGEST = 65504.0
MARGIN = 4.0  # other images may have larger numbers than the sample
SQUARING = ('LayerNormalization', 'InstanceNormalization', 'GroupNormalization', 'ReduceL2', 'ReduceSumSquare')
WEIGHTED = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
# Inputs that are coordinates: what computes them is no part of the network, although its output gets there.
COORDINATES = {'RoiAlign': (1, 2), 'GridSample': (1,), 'NonMaxSuppression': (0,)}
Batch = dict[str, np.ndarray]


def largest_magnitudes(model: Any, images: Iterable[np.ndarray], threads: int = 1) -> dict[str, float]:
    """The largest magnitude of every float tensor that a node of an ONNX model gives, over some images.

    Args:
        model: an ``onnx.ModelProto``.
        images: batches that the model takes.
        threads: of the processor.

    Returns:
        Magnitudes by name of the tensor; infinite where a tensor has an infinity or NaN.
    """
    from onnx import ModelProto, TensorProto, helper

    probe = ModelProto()
    probe.CopyFrom(model)
    names = {}
    for tensor in float_tensors(model):
        names[f'{tensor}/largest'] = tensor
        probe.graph.node.extend(
            [
                helper.make_node('Abs', [tensor], [f'{tensor}/magnitude']),
                helper.make_node('ReduceMax', [f'{tensor}/magnitude'], [f'{tensor}/largest'], keepdims=0),
            ]
        )
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in names)
    run = session(probe, threads)
    magnitudes: dict[str, float] = dict.fromkeys(names.values(), 0.0)
    for image in images:
        for name, value in run(image).items():
            number = float(value) if np.isfinite(value) else np.inf if value != -np.inf else 0.0  # -inf: empty
            magnitudes[names[name]] = max(magnitudes[names[name]], number)
    return magnitudes


def nodes_to_keep(model: Any, magnitudes: dict[str, float], margin: float = MARGIN) -> dict[str, str]:
    """The nodes of an ONNX model to keep in fp32.

    Args:
        model: an ``onnx.ModelProto`` whose nodes have names.
        magnitudes: from :func:`largest_magnitudes`.
        margin: how many times larger than the sample's the numbers of other images may be.

    Returns:
        The reason by name of the node, in the order of the graph: 'overflow', 'squares' or 'boxes'.
    """
    limit = LARGEST / margin
    reads = defaultdict(list)
    for node in model.graph.node:
        for tensor in node.input:
            reads[tensor].append(node.name)
    network = _network(model)
    reasons: dict[str, str] = {}
    for node in model.graph.node:
        floats = [tensor for tensor in node.output if tensor in magnitudes]
        if node.op_type in SQUARING and magnitudes.get(node.input[0], 0) ** 2 > limit:
            reasons.setdefault(node.name, 'squares')
        for tensor in floats:
            if magnitudes[tensor] > limit:
                reasons[node.name] = 'overflow'
                for reader in reads[tensor]:
                    reasons.setdefault(reader, 'overflow')
        if floats and node.name not in network:
            reasons[node.name] = 'boxes'
    order = {node.name: i for i, node in enumerate(model.graph.node)}
    return dict(sorted(reasons.items(), key=lambda item: order[item[0]]))


def prediction_layers(model: Any) -> list[str]:
    """The names of the last products with weights: their result reaches no other one, except as coordinates.

    Args:
        model: an ``onnx.ModelProto``.
    """
    weighted = _weighted(model)
    before = _reaching(model, [name for node in weighted for name in node.input])
    return [node.name for node in weighted if node.name not in before]


def _network(model: Any) -> set[str]:
    """The names of nodes whose output reaches a product with weights, other than as coordinates; and those products."""
    weighted = _weighted(model)
    return {node.name for node in weighted} | _reaching(model, [name for node in weighted for name in node.input])


def _weighted(model: Any) -> list[Any]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in WEIGHTED and weights.intersection(node.input)]


def _reaching(model: Any, tensors: list[str]) -> set[str]:
    """The names of nodes that give some tensors or what these are computed from, other than as coordinates.

    Indices and comparisons, such as the choice of a level by the size of a box, do not count either.
    """
    floats = set(float_tensors(model))
    producer = {tensor: node for node in model.graph.node for tensor in node.output if tensor in floats}
    names: set[str] = set()
    queue = [producer[name] for name in tensors if name in producer]
    while queue:
        node = queue.pop()
        if node.name in names:
            continue
        names.add(node.name)
        skipped = COORDINATES.get(node.op_type, ())
        queue += [producer[name] for i, name in enumerate(node.input) if i not in skipped and name in producer]
    return names


def simulate_fp16(model: Any, keep: Iterable[str] = ()) -> Any:
    """An ONNX model that computes in fp32 and rounds to fp16 what its nodes hand to each other.

    A number stays as it is where the node that gives it and the node that reads it are both kept, as TensorRT and
    onnxconverter-common do it. Sums inside a node are fp32, as on tensor cores.

    Args:
        model: an ``onnx.ModelProto``.
        keep: names of the nodes that stay in fp32.
    """
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    keep = set(keep)
    simulated = ModelProto()
    simulated.CopyFrom(model)
    graph, nodes = simulated.graph, list(simulated.graph.node)
    floats, given = float_tensors(model), {tensor.name for tensor in graph.output}
    kept_values = {tensor for node in nodes if node.name in keep for tensor in node.output}
    del graph.node[:]
    rounded = {}
    for image in graph.input:
        if image.type.tensor_type.elem_type == TensorProto.FLOAT:
            rounded[image.name] = f'{image.name}/fp16'
            graph.node.extend(_rounding(helper, TensorProto, image.name, rounded[image.name]))
    for node in nodes:
        for i, name in enumerate(node.input):
            if name in rounded and not (node.name in keep and name in kept_values):
                node.input[i] = rounded[name]
        after = []
        for i, name in enumerate(node.output):
            if name not in floats or (name in given and node.name in keep):
                continue
            if name in given:
                node.output[i] = f'{name}/exact'
                after += _rounding(helper, TensorProto, f'{name}/exact', name)
            else:
                rounded[name] = f'{name}/fp16'
                after += _rounding(helper, TensorProto, name, rounded[name])
        graph.node.extend([node, *after])
    readers = defaultdict(set)
    for node in nodes:
        for name in node.input:
            readers[name].add(node.name)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and not readers[tensor.name] <= keep:
            values = numpy_helper.to_array(tensor)
            with np.errstate(over='ignore'):
                values = values.astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return simulated


def _rounding(helper: Any, types: Any, source: str, target: str) -> list:
    return [
        helper.make_node('Cast', [source], [f'{target}/half'], to=types.FLOAT16),
        helper.make_node('Cast', [f'{target}/half'], [target], to=types.FLOAT),
    ]


def convert_to_fp16(model: Any, keep: Iterable[str]) -> Any:
    """An ONNX model in fp16, by onnxconverter-common, with some nodes in fp32; images and outputs stay fp32.

    The converter also hands constants and results of kept nodes to kept nodes, and to the outputs, in fp16; this is
    undone.

    Args:
        model: an ``onnx.ModelProto``.
        keep: names of the nodes that stay in fp32.
    """
    from onnx import ModelProto, TensorProto
    from onnxconverter_common import float16

    half = ModelProto()
    half.CopyFrom(model)
    half = float16.convert_float_to_float16(
        half, keep_io_types=True, node_block_list=list(keep), min_positive_val=0, max_finite_val=LARGEST
    )
    casts = {node.output[0]: (node.input[0], node.attribute[0].i) for node in half.graph.node if node.op_type == 'Cast'}
    exact = {  # fp32 -> fp16 -> fp32
        name: casts[source][0]
        for name, (source, to) in casts.items()
        if to == TensorProto.FLOAT and casts.get(source, ('', 0))[1] == TensorProto.FLOAT16
    }
    for tensor in model.graph.initializer:
        copies = [name for name, (source, to) in casts.items() if source == tensor.name and to == TensorProto.FLOAT]
        if copies and tensor.data_type == TensorProto.FLOAT:
            half.graph.initializer.add().CopyFrom(tensor)
            half.graph.initializer[-1].name = f'{tensor.name}/fp32'
            exact.update(dict.fromkeys(copies, f'{tensor.name}/fp32'))
    for node in half.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = exact.get(name, name)
    producers = {name: node for node in half.graph.node for name in node.output}
    for output, original in zip(half.graph.output, model.graph.output, strict=True):
        node = producers[output.name]
        if output.type.tensor_type.elem_type != original.type.tensor_type.elem_type and node.op_type == 'Cast':
            node.attribute[0].i = original.type.tensor_type.elem_type
            output.type.CopyFrom(original.type)
    return half


def float_tensors(model: Any) -> list[str]:
    """The names of the fp32 tensors that nodes of an ONNX model give."""
    from onnx import TensorProto, shape_inference

    graph = shape_inference.infer_shapes(model).graph
    known = [*graph.value_info, *graph.output]
    floats = {each.name for each in known if each.type.tensor_type.elem_type == TensorProto.FLOAT}
    return [name for node in model.graph.node for name in node.output if name in floats]


def session(model: Any, threads: int = 1) -> Callable[[np.ndarray], Batch]:
    """Load an ONNX model into onnxruntime as it stands; its optimizations would remove rounding."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    loaded = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return onnxruntime_run(loaded)


def layer_precisions(keep: Iterable[str]) -> dict[str, str]:
    """The arguments of TensorRT's ``trtexec`` that keep nodes in fp32."""
    value = ','.join(f'{name}:fp32' for name in keep)
    return {'--precisionConstraints': 'obey', '--layerPrecisions': value, '--layerOutputTypes': value}


class Report(NamedTuple):
    """What fp16 does to an exported file.

    Args:
        keep: the reason to keep a node in fp32, by its name.
        nodes: of the file.
        everything_half: the largest differences from fp32 over all images with every node in fp16, by what is compared.
        kept: the same with the nodes of ``keep`` in fp32.
    """

    keep: dict[str, str]
    nodes: int
    everything_half: dict[str, float]
    kept: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The lists in the forms that other tools take, and the rest."""
        return {
            'node_block_list': list(self.keep),
            'trtexec': layer_precisions(self.keep),
            'reasons': self.keep,
            'differences': {'every node in fp16': self.everything_half, 'these nodes in fp32': self.kept},
        }


def examine(cfg: Config, source: Path, count: int, margin: float = MARGIN) -> tuple[Report, Any]:
    """Find the nodes of an exported file that have to stay in fp32, and simulate fp16 with and without them.

    Args:
        cfg: the config, for images of its training set.
        source: an ``.onnx`` file.
        count: how many images.
        margin: see :func:`nodes_to_keep`.

    Returns:
        The report, and the ``onnx.ModelProto``.

    Raises:
        InputError: the file is not an ONNX file, or cannot be read.
    """
    import onnx

    if source.suffix != '.onnx':
        raise InputError(f'{source}: expected an .onnx file')
    metadata = read_metadata(source)
    model, threads = onnx.load(source), torch.get_num_threads()
    images = [torch.from_numpy(image) for image in sample_images(cfg, metadata, count)]
    magnitudes = largest_magnitudes(model, (image.numpy() for image in images), threads)
    keep = nodes_to_keep(model, magnitudes, margin)
    run = session(model, threads)
    exact = [_with_whole_masks(metadata, _outputs(metadata, run, image), image) for image in images]
    differences = []
    for kept in ((), keep):
        half = partial(_outputs, metadata, session(simulate_fp16(model, kept), threads))
        largest: dict[str, float] = defaultdict(float)
        for image, expected in zip(images, exact, strict=True):
            for each in compare(list(metadata.outputs), image, expected, half, metadata.mask_threshold):
                largest[each.measure] = max(largest[each.measure], each.value)
        differences.append(dict(largest))
    return Report(keep, len(model.graph.node), *differences), model


def _outputs(metadata: Metadata, run: Callable[[np.ndarray], Batch], image: torch.Tensor) -> list[torch.Tensor]:
    found = run(image.numpy())
    return [torch.from_numpy(found[name]) for name in metadata.outputs]


def _with_whole_masks(metadata: Metadata, outputs: list[torch.Tensor], image: torch.Tensor) -> list[torch.Tensor]:
    """The outputs with masks of the image's size, bool, as a comparison expects them."""
    if metadata.mask_format is None or metadata.mask_threshold is None:
        return outputs
    boxes, scores, labels, masks = outputs
    if metadata.mask_format == 'box28':
        size = (image.shape[2], image.shape[3])
        masks = torch.stack([paste_masks(mask, box, size) for mask, box in zip(masks, boxes, strict=True)])
    return [boxes, scores, labels, masks >= metadata.mask_threshold]
