"""INT8 quantization of exported files with NNCF, and their metrics before and after."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from swin_mm.analysis.export.metadata import KEY, Metadata
from swin_mm.analysis.half_precision import prediction_layers
from swin_mm.analysis.runtime import (
    ExportedFile,
    ExportedModel,
    LoadedFile,
    Run,
    import_library,
    onnxruntime_run,
    openvino_run,
    read_metadata,
    sample_images,
    use_exported,
)
from swin_mm.openmmlab.config import as_list, config_errors, require_data
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import require_new_file

RANKING_IMAGES = 16  # of the test set, by which layers are ranked
MAX_DROP = 0.5  # points, hundredths of the metric's range
METRICS = {'coco/segm_mAP': 100.0, 'coco/bbox_mAP': 100.0, 'mIoU': 1.0}  # the preferred one first; factor to points


class Quantized(NamedTuple):
    """What an INT8 file reaches.

    Args:
        metric: name of the metric.
        before: of the file in float, in points.
        after: of the file in INT8, in points.
        quantized: matrix products and convolutions that compute in INT8.
        total: all matrix products and convolutions.
    """

    metric: str
    before: float
    after: float
    quantized: int
    total: int


class AccuracyError(RuntimeError):
    """The INT8 file loses more than the permitted points. It was not written."""


def check_arguments(source: Path, out: Path, force: bool) -> None:
    """Check the arguments of :func:`quantize` before anything is built.

    Raises:
        InputError: they do not fit together, or the file cannot be written.
        DependencyError: a library is missing.
    """
    read_metadata(source)
    if source.suffix != '.onnx':
        raise InputError(f'{source}: expected an .onnx file; --out may be an .xml of OpenVINO')
    if out.suffix not in ('.onnx', '.xml'):
        raise InputError(f'--out {out} must end in .onnx or .xml')
    for path in (out, out.with_suffix('.bin')) if out.suffix == '.xml' else (out,):
        require_new_file(path, force)
    for library in ('nncf', 'openvino') if out.suffix == '.xml' else ('nncf', 'onnxruntime'):
        import_library(out, library)


def quantize(
    cfg: Config, source: Path, out: Path, images: int = 128, max_drop: float = MAX_DROP, force: bool = False
) -> Quantized:
    """Quantize an exported file to INT8, keeping as many layers in float as the metric needs.

    NNCF calibrates on images of the training set, and if the metric on the test set drops by more than ``max_drop``,
    it searches for the layers that cost the most and keeps them in float.

    Args:
        cfg: the config whose test set and metric decide; it is changed.
        source: an exported ``.onnx`` file.
        out: the file to write: ``.xml`` for OpenVINO, or ``.onnx`` for onnxruntime.
        images: how many to calibrate on.
        max_drop: of the metric, in points.
        force: replace an existing file.

    Raises:
        InputError: something in the arguments, the config or the data is wrong.
        DependencyError: a library is missing.
        AccuracyError: the metric drops by more than ``max_drop`` even so.
    """
    check_arguments(source, out, force)
    require_data(cfg, 'test')
    metadata = read_metadata(source)
    use_exported(cfg, source, dtype='fp32')
    loader, evaluator = test_set(cfg)
    name, factor = '', 1.0

    def points(file: Any, batches: Iterable[dict]) -> float:
        nonlocal name, factor
        metrics = evaluate(ExportedModel(file), batches, evaluator)
        name, factor = next(((key, METRICS[key]) for key in METRICS if key in metrics), ('', 1.0))
        if not name:
            raise InputError(f'the test gives none of the metrics {", ".join(METRICS)}, but {", ".join(metrics)}')
        return metrics[name] * factor

    backend = _OpenVino() if out.suffix == '.xml' else _Onnx()
    quantized = _by_nncf(
        backend.read(source),
        list(sample_images(cfg, metadata, images)),
        metadata.input.name,
        layers_in_float(source),
        loader,
        lambda compiled, batches: (points(LoadedFile(backend.runner(compiled), metadata), batches), None),
        max_drop,
    )
    before = points(ExportedFile(source, None if out.suffix == '.onnx' else 'openvino'), loader)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix='.') as folder:
        part = Path(folder, out.name)
        backend.save(quantized, part, metadata)
        after = points(ExportedFile(part), loader)
        if before - after > max_drop:
            raise AccuracyError(
                f'{name} drops from {before:.2f} to {after:.2f}, more than {max_drop:g}; {out} is not written. More '
                'images to calibrate on may help'
            )
        for file in sorted(Path(folder).iterdir()):  # the weights, .bin, before the .xml that names them
            os.replace(file, out.with_name(file.name))
    return Quantized(name, before, after, *backend.count(quantized))


def test_set(cfg: Config) -> tuple[DataLoader, Evaluator]:
    """The batches of a config's test set, one image each, and its metrics."""
    init_default_scope(cfg.default_scope)
    with config_errors(cfg):
        # Without data workers: forked processes do not get along with OpenVINO's threads.
        in_process = dict(batch_size=1, num_workers=0, persistent_workers=False)
        loader = Runner.build_dataloader({**cfg.test_dataloader, **in_process})
        evaluator = Evaluator(as_list(cfg.test_evaluator))
    evaluator.dataset_meta = getattr(loader.dataset, 'metainfo', None)
    return loader, evaluator


def evaluate(model: Any, batches: Iterable[dict], evaluator: Evaluator) -> dict[str, float]:
    """The metrics of a model on batches of a test set."""
    count = 0
    for batch in batches:
        samples = model.test_step(batch)
        evaluator.process(data_samples=samples, data_batch=batch)
        count += len(samples)
    return evaluator.evaluate(count)


def layers_in_float(source: Path) -> Any:
    """NNCF's scope of the layers whose results are the predictions: they are small, and decide the accuracy.

    OpenVINO 2026.4 also fails on quantized ones whose results are reshaped into boxes.

    Args:
        source: the ``.onnx`` file; NNCF uses its names for OpenVINO's operations as well.
    """
    import nncf
    import onnx

    names = prediction_layers(onnx.load(source))
    return nncf.IgnoredScope(patterns=[f'{re.escape(name)}(/.*)?' for name in names], validate=False)


def calibrate(model: Any, images: list[np.ndarray], name: str, source: Path) -> Any:
    """Quantize an OpenVINO or ONNX model by NNCF with the ranges of some images, whatever the accuracy.

    Args:
        model: an ``openvino.Model`` or an ``onnx.ModelProto``.
        images: batches that it takes.
        name: of its input.
        source: the ``.onnx`` file that it was read from.
    """
    import nncf

    return _by_preset(
        partial(
            nncf.quantize,
            model,
            nncf.Dataset(images, lambda image: {name: image}),
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=layers_in_float(source),
        )
    )


def _by_preset(quantize: Callable[..., Any]) -> Any:
    """Quantize with asymmetric activations, which suit transformers, or else with symmetric ones.

    NNCF 3.4 fails on asymmetric activations where maps of different kinds are concatenated, as in UPerNet's pooling.
    """
    import nncf

    try:
        return quantize(preset=nncf.QuantizationPreset.MIXED)
    except nncf.InternalError:
        return quantize(preset=nncf.QuantizationPreset.PERFORMANCE)


def _by_nncf(
    model: Any,
    images: list[np.ndarray],
    name: str,
    ignored: Any,
    loader: DataLoader,
    validate: Callable,
    max_drop: float,
) -> Any:
    """Quantize by NNCF, for a transformer, with accuracy control."""
    import nncf

    return _by_preset(
        partial(
            nncf.quantize_with_accuracy_control,
            model,
            nncf.Dataset(images, lambda image: {name: image}),
            nncf.Dataset(loader),
            validate,
            max_drop=max_drop,
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=ignored,
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=RANKING_IMAGES
            ),
        )
    )


class _OpenVino:
    """Reading, running and writing OpenVINO models."""

    def read(self, path: Path) -> Any:
        import openvino

        return openvino.Core().read_model(path)

    def runner(self, compiled: Any) -> Run:
        return openvino_run(compiled)

    def save(self, model: Any, path: Path, metadata: Metadata) -> None:
        import openvino

        model.set_rt_info(metadata.dumps(), KEY)
        openvino.save_model(model, path, compress_to_fp16=False)

    def count(self, model: Any) -> tuple[int, int]:
        weighted = [op for op in model.get_ops() if op.get_type_name() in ('Convolution', 'MatMul')]
        inputs = [op.input_value(0).get_node().get_type_name() for op in weighted]
        return sum(kind == 'FakeQuantize' for kind in inputs), len(weighted)


class _Onnx:
    """Reading, running and writing ONNX models."""

    def read(self, path: Path) -> Any:
        import onnx

        return onnx.load(path)

    def runner(self, model: Any) -> Run:
        import onnxruntime

        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
        return onnxruntime_run(session)

    def save(self, model: Any, path: Path, metadata: Metadata) -> None:
        import onnx

        if KEY not in {each.key for each in model.metadata_props}:
            onnx.helper.set_model_props(model, {KEY: metadata.dumps()})
        onnx.save(model, path)

    def count(self, model: Any) -> tuple[int, int]:
        from_integers = {node.output[0] for node in model.graph.node if node.op_type == 'DequantizeLinear'}
        weighted = [node for node in model.graph.node if node.op_type in ('Conv', 'MatMul', 'Gemm')]
        return sum(node.input[0] in from_integers for node in weighted), len(weighted)
