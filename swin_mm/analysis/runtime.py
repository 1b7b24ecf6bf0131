"""Running exported files, by onnxruntime or OpenVINO, in place of the model that they were exported from.

B: images, N: objects of an image, H, W: height and width.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor, nn

from swin_mm.analysis.export.metadata import KEY, VERSION, Input, Metadata
from swin_mm.engine.images import test_pipeline, without_annotations
from swin_mm.openmmlab.config import config_errors, test_dataset, type_name
from swin_mm.utils.errors import DependencyError, InputError, one_line

# With the library's scope; None if the file predicts neither objects nor segments.
TASKS = {'semantic': 'mmseg', 'detection': 'mmdet', 'instance': 'mmdet', 'queries': None, 'backbone': None}
RUNTIMES = {'.onnx': ('onnxruntime', 'openvino'), '.xml': ('openvino',)}  # by suffix; the first is the default
MODEL = 'swin_mm.analysis.runtime.ExportedModel'
MASK_THRESHOLD = 0.5  # of a file that names none
Run = Callable[[np.ndarray], dict[str, np.ndarray]]


def parse_metadata(text: str | None, source: object) -> Metadata:
    """Read the JSON text in a file.

    Raises:
        InputError: there is none, or one of another version, or something in it is missing or unknown.
    """
    if not text:
        raise InputError(
            f'{source} says nothing about its classes and its preprocessing; it should be a file that tools/export.py '
            'wrote'
        )
    try:
        content = json.loads(text)
        if content['version'] != VERSION:
            raise InputError(f'{source}: its metadata has version {content["version"]}, expected {VERSION}')
        known = {key: content[key] for key in Metadata.__dataclass_fields__ if key in content}
        metadata = Metadata(**{**known, 'input': Input(**content['input'])})
        for name, value, choices in (
            ('task', metadata.task, TASKS),
            ('channels', metadata.input.channels, ('RGB', 'BGR')),
            ('mask_format', metadata.mask_format, (None, 'box28', 'image')),
        ):
            if value not in choices:
                raise ValueError(f'{name} {value!r}, expected one of {", ".join(map(str, choices))}')
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f'{source}: its metadata cannot be used: {one_line(error)}') from error
    return metadata


def is_exported(path: str | Path) -> bool:
    """Whether a path has the suffix of a file that a runtime reads."""
    return Path(path).suffix in RUNTIMES


def require_file(path: str | Path) -> Path:
    """Check that an exported file exists.

    Raises:
        InputError: it does not, or has another suffix.
    """
    path = Path(path)
    if path.suffix not in RUNTIMES:
        raise InputError(f'{path}: expected a file that ends in {" or ".join(RUNTIMES)}')
    if not path.is_file():
        raise InputError(f'{path} does not exist')
    return path


def read_metadata(path: str | Path) -> Metadata:
    """Read the metadata of an exported file.

    Raises:
        InputError: the file cannot be read, or has none.
        DependencyError: the library that reads it is not installed.
    """
    path = require_file(path)
    library: Any = import_library(path, 'onnx' if path.suffix == '.onnx' else 'openvino')
    try:
        if path.suffix == '.onnx':
            properties = {each.key: each.value for each in library.load(path, load_external_data=False).metadata_props}
        else:
            model = library.Core().read_model(path)
            properties = {KEY: model.get_rt_info(KEY).astype(str)} if model.has_rt_info(KEY) else {}
    except Exception as error:  # they raise many kinds
        raise InputError(f'{path} cannot be read: {one_line(error)[:300]}') from error
    return parse_metadata(properties.get(KEY), path)


def import_library(path: Path, name: str) -> ModuleType:
    """Import a library that an exported file needs.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(f'{path} needs {name}; install it with: pip install {name}') from error


class LoadedFile(NamedTuple):
    """A model that is in memory already, in the place of an :class:`ExportedFile`."""

    run: Run
    metadata: Metadata

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name for images (B, channels, H, W)."""
        return self.run(images)


class ExportedFile:
    """An exported file, loaded into a runtime, as a function of a batch of images.

    Args:
        path: the file, ``.onnx`` or ``.xml``.
        runtime: 'onnxruntime' or 'openvino'; None for the default of the suffix.
        dtype: 'fp32', or 'bf16' with OpenVINO on a processor that has it.
        threads: of the processor; None for as many as PyTorch uses.

    Raises:
        InputError: the file cannot be read, or does not fit the options.
        DependencyError: the runtime is not installed.
    """

    def __init__(
        self, path: str | Path, runtime: str | None = None, dtype: str = 'fp32', threads: int | None = None
    ) -> None:
        path = require_file(path)
        runtimes = RUNTIMES[path.suffix]
        runtime = runtime or runtimes[0]
        if runtime not in runtimes:
            raise InputError(f'{path} runs in {" or ".join(runtimes)}, not in {runtime}')
        load = {'onnxruntime': load_onnxruntime, 'openvino': load_openvino}[runtime]
        self.path, self.metadata = path, read_metadata(path)
        self.run = load(path, dtype, threads or torch.get_num_threads())

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name for images (B, channels, H, W), in the dtype of the metadata.

        Raises:
            InputError: the file cannot take images of this size.
        """
        try:
            return self.run(images)
        except Exception as error:  # runtimes raise many kinds
            size = ' × '.join(map(str, images.shape))
            raise InputError(f'{self.path} fails on images of {size}: {one_line(error)[:300]}') from error


def load_onnxruntime(path: Path, dtype: str, threads: int) -> Run:
    """Load a file into onnxruntime.

    Raises:
        InputError: the file cannot be read, or ``dtype`` is not fp32.
        DependencyError: onnxruntime is not installed.
    """
    if dtype != 'fp32':
        raise InputError(f'--dtype {dtype}: onnxruntime has no {dtype} on CPUs; use --runtime openvino')
    onnxruntime: Any = import_library(path, 'onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    except Exception as error:  # it raises many kinds
        raise InputError(f'{path} cannot be read: {one_line(error)[:300]}') from error
    return onnxruntime_run(session)


def onnxruntime_run(session: Any) -> Run:
    """An ``onnxruntime.InferenceSession`` as a function of a batch of images."""
    (name,) = (each.name for each in session.get_inputs())
    names = [each.name for each in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {name: images}), strict=True))


def load_openvino(path: Path, dtype: str, threads: int) -> Run:
    """Load a file into OpenVINO.

    Raises:
        InputError: the file cannot be read, or the processor has no instructions for ``dtype``.
        DependencyError: OpenVINO is not installed.
    """
    openvino: Any = import_library(path, 'openvino')
    core = openvino.Core()
    if dtype not in ('fp32', 'bf16') or dtype.upper() not in core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        raise InputError(f'--dtype {dtype}: OpenVINO has no {dtype} on this processor')
    try:
        model = core.read_model(path)
    except Exception as error:
        raise InputError(f'{path} cannot be read: {one_line(error)[:300]}') from error
    return compile_openvino(model, dtype, threads)


def compile_openvino(model: Any, dtype: str = 'fp32', threads: int | None = None) -> Run:
    """Compile an OpenVINO model for this processor; the function that runs it.

    Args:
        model: an ``openvino.Model``.
        dtype: 'fp32' or 'bf16'. OpenVINO's own default is bf16 where the processor has it.
        threads: of the processor; None for as many as PyTorch uses.
    """
    import openvino

    settings = {
        'INFERENCE_PRECISION_HINT': {'fp32': 'f32', 'bf16': 'bf16'}[dtype],
        'INFERENCE_NUM_THREADS': threads or torch.get_num_threads(),
        'PERFORMANCE_HINT': 'LATENCY',
    }
    return openvino_run(openvino.compile_model(model, 'CPU', settings))


def openvino_run(compiled: Any) -> Run:
    """An ``openvino.CompiledModel`` as a function of a batch of images."""
    names = [output.any_name for output in compiled.outputs]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        results = compiled([images])
        return {name: results[i].copy() for i, name in enumerate(names)}

    return run


class ExportedModel(BaseModel):
    """A detector or segmentor whose network is an exported file.

    It takes what mmdet's and mmseg's models take in a test, and returns the same data samples. Images run one by one.

    Args:
        file: path of the file, or a function of a batch of images that has the file's ``metadata``.
        runtime: see :class:`ExportedFile`.
        dtype: see :class:`ExportedFile`.
        data_preprocessor: not used; mmengine's Runner passes the config's, but the file knows what it takes.

    Raises:
        InputError: the file is a backbone, cannot be read, or does not fit the options.
        DependencyError: the runtime is not installed.
    """

    def __init__(
        self, file: Any, runtime: str | None = None, dtype: str = 'fp32', data_preprocessor: dict | None = None
    ) -> None:
        self_file = ExportedFile(file, runtime, dtype) if isinstance(file, str | Path) else file
        metadata = self_file.metadata
        require_predictions(metadata, file)
        super().__init__(preprocessor_config(metadata))
        self.file, self.metadata = self_file, metadata
        self.file_meta = {'classes': metadata.classes, 'palette': metadata.palette}  # inferencers change dataset_meta
        self.mask_threshold = metadata.mask_threshold or MASK_THRESHOLD
        self.paste: Any = None
        if metadata.mask_format == 'box28':
            from mmdet.models import FCNMaskHead

            tiny = dict(num_convs=0, in_channels=1, conv_out_channels=1, num_classes=1)  # only its pasting is used
            self.paste = FCNMaskHead(class_agnostic=True, **tiny)

    def test_step(self, data: dict | tuple | list) -> list[BaseDataElement]:
        """Predict on the images of a batch, each by itself."""
        assert isinstance(data, dict)
        singles = zip(data['inputs'], data['data_samples'], strict=True)
        return [super(ExportedModel, self).test_step({'inputs': [i], 'data_samples': [s]})[0] for i, s in singles]

    def forward(self, inputs: Tensor, data_samples: Sequence[Any] | None = None, mode: str = 'predict') -> list:
        """Predict on one preprocessed image (1, channels, H, W).

        Raises:
            ValueError: the mode is not 'predict', or there are several images.
        """
        if mode != 'predict' or not data_samples or len(data_samples) != 1:
            raise ValueError(f'an exported file predicts on one image at a time; got mode {mode!r}, {inputs.shape}')
        images = inputs.cpu().numpy().astype(self.metadata.input.dtype)
        found = {name: torch.from_numpy(values) for name, values in self.file(np.ascontiguousarray(images)).items()}
        add = self._add_segments if self.metadata.task == 'semantic' else self._add_objects
        add(data_samples[0], {name: values[0] for name, values in found.items()})
        return list(data_samples)

    def _add_segments(self, sample: Any, found: dict[str, Tensor]) -> None:
        """Put class ids of pixels into a sample, at the size of the original image."""
        size = sample.ori_shape[:2]
        if 'logits' in found:
            logits = _without_padding(found['logits'], sample)
            logits = nn.functional.interpolate(logits[None].float(), size, mode='bilinear')[0]
            labels = logits.argmax(0, keepdim=True) if len(logits) > 1 else (logits.sigmoid() > 0.5).long()
        else:
            labels = _without_padding(found['labels'][None], sample)
            labels = nn.functional.interpolate(labels[None].float(), size, mode='nearest-exact')[0].long()
        sample.pred_sem_seg = PixelData(data=labels)

    def _add_objects(self, sample: Any, found: dict[str, Tensor]) -> None:
        """Put objects into a sample, in pixels of the original image."""
        keep = found['scores'] > 0  # 0 is padding
        height, width = sample.img_shape[:2]
        boxes = found['boxes'][keep].float()
        limits = boxes.new_tensor([width, height, width, height])
        boxes = boxes.clamp(min=0).minimum(limits)  # the file does not know what is padding
        objects = InstanceData(bboxes=boxes, scores=found['scores'][keep], labels=found['labels'][keep].long())
        objects.bboxes = boxes / boxes.new_tensor(sample.get('scale_factor', (1.0, 1.0))).repeat(2)
        if self.paste is not None:
            (objects,) = self.paste.predict_by_feat(
                (found['masks'][keep].float().logit()[:, None],),  # it takes logits
                [objects],
                [{'ori_shape': sample.ori_shape, 'scale_factor': (1.0, 1.0)}],  # the boxes are scaled already
                ConfigDict(mask_thr_binary=self.mask_threshold),
                rescale=True,
            )
        elif 'masks' in found:
            objects.masks = _resize_masks(found['masks'][keep], sample, self.mask_threshold)
        sample.pred_instances = objects


def _without_padding(maps: Tensor, sample: Any) -> Tensor:
    """The part of maps (channels, H, W) that shows the image; padding is to the right and below."""
    height, width = sample.img_shape[:2]
    return maps[:, :height, :width]


def _resize_masks(masks: Tensor, sample: Any, threshold: float) -> Tensor:
    """Masks (N, H, W) at the size of the original image, bool; one by one, since there may be many."""
    masks = _without_padding(masks, sample)
    resized = torch.zeros(len(masks), *sample.ori_shape[:2], dtype=torch.bool)
    for i, mask in enumerate(masks):
        probabilities = nn.functional.interpolate(mask[None, None].float(), sample.ori_shape[:2], mode='bilinear')
        resized[i] = probabilities[0, 0] > threshold
    return resized


def preprocessor_config(metadata: Metadata) -> dict[str, Any]:
    """The data preprocessor that gives a file the images it takes."""
    image = metadata.input
    settings: dict[str, Any] = {'bgr_to_rgb': image.channels == 'RGB'}
    if not image.normalize_inside and image.mean:
        settings |= {'mean': list(image.mean), 'std': list(image.std)}
    if TASKS[metadata.task] == 'mmdet':
        return {'type': 'mmdet.DetDataPreprocessor', 'pad_size_divisor': image.size_divisor, **settings}
    padding = {'test_cfg': {'size_divisor': image.size_divisor}} if image.size_divisor > 1 else {}
    return {'type': 'mmseg.SegDataPreProcessor', **padding, **settings}


def pipeline_of(metadata: Metadata, pipeline: Sequence[dict]) -> list[dict]:
    """A test pipeline without what an exported file does itself: resizing and padding."""
    inside = ('Resize', 'Pad') if metadata.input.resize_inside else ()
    return [step for step in pipeline if type_name(step) not in inside]


def require_predictions(metadata: Metadata, source: object) -> None:
    """Check that a file predicts objects or segments.

    Raises:
        InputError: it does not.
    """
    if TASKS[metadata.task] is None:
        gives = 'features' if metadata.task == 'backbone' else 'classes and masks of queries'
        raise InputError(f'{source} is for the task {metadata.task}: it gives {gives}, not objects or segments')


def use_exported(cfg: Config, path: str | Path, runtime: str | None = None, dtype: str = 'fp32') -> None:
    """Put an exported file in the place of a config's model.

    Args:
        cfg: the config, changed in place.
        path: the file.
        runtime: see :class:`ExportedFile`.
        dtype: see :class:`ExportedFile`.

    Raises:
        InputError: the file does not fit the config, or cannot be read.
        DependencyError: the runtime is not installed.
    """
    metadata = read_metadata(path)
    scope = TASKS[metadata.task]
    if scope != cfg.get('default_scope'):
        raise InputError(
            f'{path} is for the task {metadata.task}, and {cfg.filename} is a config of '
            f'{cfg.get("default_scope") or "no library"}'
        )
    dataset = test_dataset(cfg)
    dataset.pipeline = pipeline_of(metadata, dataset.pipeline)
    cfg.model = dict(type=MODEL, file=str(path), runtime=runtime, dtype=dtype)


def config_of(path: str | Path, runtime: str | None = None, dtype: str = 'fp32') -> Config:
    """A config for predicting with an exported file, made from its metadata.

    Raises:
        InputError: the file is a backbone, or cannot be read.
        DependencyError: the runtime is not installed.
    """
    metadata = read_metadata(path)
    scope = TASKS[metadata.task]
    require_predictions(metadata, path)
    resize = []
    if metadata.resize is not None:
        scale, keep_ratio = tuple(metadata.resize['scale']), metadata.resize['keep_ratio']
        resize = [dict(type='Resize', scale=scale, keep_ratio=keep_ratio)]
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pack = dict(type='PackDetInputs' if scope == 'mmdet' else 'PackSegInputs', meta_keys=keys)
    dataset = dict(
        type='CocoDataset' if scope == 'mmdet' else 'BaseSegDataset',
        metainfo=dict(classes=metadata.classes, palette=metadata.palette),
        pipeline=[dict(type='LoadImageFromFile'), *resize, pack],
    )
    model = dict(type=MODEL, file=str(path), runtime=runtime, dtype=dtype)
    content = dict(default_scope=scope, model=model, test_dataloader=dict(dataset=dataset))
    return Config(content, cfg_text=f'# made from {path}', filename=str(path))


def sample_images(cfg: Config, metadata: Metadata, count: int) -> Iterator[np.ndarray]:
    """Images of a config's training set, prepared by its test pipeline, as an exported file takes them.

    Args:
        cfg: the config; without a training set, or with a mixture of several, its test set is used.
        metadata: of the file.
        count: how many, evenly spread over the set; all if there are fewer.

    Raises:
        InputError: the data set cannot be built.
    """
    pipeline = pipeline_of(metadata, without_annotations(test_pipeline(cfg)))
    dataset = dict((cfg.get('train_dataloader') or cfg.test_dataloader)['dataset'])
    while 'dataset' in dataset:
        dataset = dict(dataset['dataset'])
    if 'datasets' in dataset:
        dataset = dict(test_dataset(cfg))
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    with config_errors(cfg):
        images = DATASETS.build({**dataset, 'pipeline': pipeline, 'test_mode': True})
        preprocessor = MODELS.build(preprocessor_config(metadata))
    for index in np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int).tolist():
        batch = preprocessor(pseudo_collate([images[index]]))
        yield batch['inputs'].numpy().astype(metadata.input.dtype)
