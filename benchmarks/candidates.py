"""The candidates: backbones and whole models, and the step of each that is timed."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import swin_mm
from swin_mm.models.swin import SwinPyramid
from swin_mm.ops.attention import KERNELS

ROOT = Path(__file__).parents[1]
Swin = getattr(swin_mm, 'SwinTransformer', SwinPyramid)  # the backbone of configs where there is mmengine
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
INFER, TRAIN = 'inference', 'training'
Size = tuple[int, int]
Step = Callable[[], Sequence[Tensor]]
# A config with Swin-T, and a tiny one.
CONFIGS = {
    'detection': ('mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 'nuclei/mask-rcnn_swin-nano_fpn_nuclei.py'),
    'segmentation': ('upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py', 'nuclei/upernet_swin-nano_nuclei.py'),
}


@dataclass(frozen=True)
class Case:
    """What is timed; ``task`` is backbone, detection or segmentation."""

    what: str
    dtype: str
    size: Size
    batch: int = 1
    task: str = 'backbone'

    def __str__(self) -> str:
        """The name of the case in tables and files."""
        return f'{self.task} {self.what} {self.dtype} {self.size[0]}×{self.size[1]} batch {self.batch}'


def mmdet_swin(arch: dict, size: Size) -> nn.Module:
    """The backbone of mmdet."""
    from mmdet.models.backbones.swin import SwinTransformer

    return SwinTransformer(**arch, drop_path_rate=0.0)


def transformers_swin(arch: dict, size: Size) -> nn.Module:
    """The backbone of transformers, which pads as detectors do."""
    from transformers import SwinBackbone, SwinConfig

    sizes = {'embed_dim': arch['embed_dims'], 'depths': list(arch['depths']), 'num_heads': list(arch['num_heads'])}
    stages = [f'stage{i}' for i in range(1, 5)]
    return SwinBackbone(SwinConfig(image_size=size, **sizes, out_features=stages, drop_path_rate=0.0))


def timm_swin(arch: dict, size: Size) -> nn.Module:
    """The model of timm, with features that have no output norm; it is built for one image size."""
    import timm

    sizes = {'embed_dim': arch['embed_dims'], 'depths': arch['depths'], 'num_heads': arch['num_heads']}
    name = 'swin_tiny_patch4_window7_224'  # all else in it is overridden
    return timm.create_model(name, features_only=True, img_size=size, drop_path_rate=0.0, **sizes)


def our_swin(arch: dict, size: Size, **options: object) -> nn.Module:
    """Our backbone with these options."""
    return Swin(**arch, drop_path_rate=0.0, **options)


def optimized(model: nn.Module) -> nn.Module:
    """What users get from ``swin_mm.optimize_for_inference``."""
    from swin_mm.models.inference import optimize_for_inference

    return optimize_for_inference(model)


# Name -> function that builds the model from an arch and the image size. --kernels NAME times ours/NAME.
RIVALS = {'mmdet': mmdet_swin, 'transformers': transformers_swin, 'timm': timm_swin}
OPTIMIZED = 'ours/optimized'  # inference only; the plain model until it has its weights, see Bench.build
OURS = {'ours': our_swin, OPTIMIZED: our_swin}
OURS |= {f'ours/{kernel}': partial(our_swin, attention=kernel) for kernel in KERNELS}
OURS['ours/fused_norm'] = partial(our_swin, fused_norm=True)  # acts on GPUs
CANDIDATES = RIVALS | OURS
AUTOCAST = ('mmdet', 'stock')  # their masks stay fp32, which rules out weights of another type
TWINS = ('mmdet', 'stock', 'ours')  # get the same weights and are compared


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor that a model holds: parameters, buffers and plain attributes, which optimized models have."""
    found: dict[int, Tensor] = {}
    waiting: list[object] = [model]
    seen = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, nn.Module):
            waiting += vars(value).values()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return list(found.values())


def whole_model(kind: str, case: Case, device: str, quick: bool) -> tuple[nn.Module, dict]:
    """A detector or segmentor with the stock backbone or ours, and a batch of noise with labelled objects in it."""
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    config = Config.fromfile(ROOT / 'configs' / CONFIGS[case.task][quick])
    init_default_scope(config.default_scope)
    scope = 'swin_mm' if kind.startswith('ours') else config.default_scope
    config.model.backbone.update(type=f'{scope}.SwinTransformer', init_cfg=None, drop_path_rate=0.0)
    model = revert_sync_batchnorm(MODELS.build(config.model)).to(device)
    shape = (3, *case.size)
    if case.task == 'detection':
        from mmdet.testing import demo_mm_inputs

        # One class in every proposal, so that there are as many objects as the config keeps, each with a mask.
        nn.init.constant_(model.roi_head.bbox_head.fc_cls.bias[:1], 5.0)
        return model, demo_mm_inputs(case.batch, [shape] * case.batch, [8] * case.batch, with_mask=True, device=device)
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    torch.manual_seed(0)  # the images must not depend on how many random numbers the model took
    sample = SegDataSample(metainfo={'img_shape': case.size, 'ori_shape': case.size})
    sample.gt_sem_seg = PixelData(data=torch.randint(3, (1, *case.size), device=device))
    images = torch.randint(256, (case.batch, *shape), dtype=torch.uint8, device=device)
    return model, {'inputs': list(images), 'data_samples': [sample.clone() for _ in images]}


def whole_step(model: nn.Module, data: dict, training: bool, context: AbstractContextManager) -> Step:
    """A test step, or a training step with learning rate 0; returns the backbone's maps."""
    from mmengine.optim import OptimWrapper

    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=0.0))
    maps: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        maps[:] = [m.detach() for m in outputs]

    def step() -> Sequence[Tensor]:
        with torch.set_grad_enabled(training), context:
            model.train_step(data, optimizer) if training else model.test_step(data)
        return maps

    model.backbone.register_forward_hook(keep)
    return step


def backbone_step(
    model: nn.Module,
    run: Callable,
    images: Iterator[Tensor],
    training: bool,
    context: AbstractContextManager,
) -> Step:
    """Forward, and in training backward from random gradients; returns the maps and the first parameter's gradient."""
    gradients: list[Tensor] = []

    def step() -> Sequence[Tensor]:
        if training:
            model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training), context:
            maps = run(next(images))
        maps = getattr(maps, 'feature_maps', maps)  # transformers wraps them
        if not training:
            return maps
        if not gradients:
            torch.manual_seed(0)
            gradients.extend(torch.randn(m.shape, device=m.device).to(m.dtype) for m in maps)
        torch.autograd.backward(maps, gradients)
        return [*(m.detach() for m in maps), next(model.parameters()).grad]

    return step


class Bench:
    """Builds the candidates of a case, one at a time."""

    def __init__(self, case: Case, device: str, arch: dict, quick: bool) -> None:
        """Take the case, 'cpu' or 'cuda', the arguments that size a backbone, and whether whole models are tiny."""
        self.case, self.device, self.arch, self.quick = case, device, arch, quick
        self.dtype = DTYPES[case.dtype]
        self.training = case.what == TRAIN
        self.weights: dict[str, Tensor] | None = None
        if case.task == 'backbone':
            # More images than fit the cache, so that none is in it when its turn comes.
            cache = torch.cuda.get_device_properties(0).L2_cache_size if device == 'cuda' else 32 << 20
            shape = (case.batch, 3, *case.size)
            pool = torch.randn(1 + 2 * cache // (4 * math.prod(shape)), *shape, device=device)
            self.images = {torch.float32: pool, self.dtype: pool.to(self.dtype)}

    def build(self, name: str) -> tuple[nn.Module, Step]:
        """The model of a candidate, and the step to time."""
        kind, _, mode = name.partition('+')
        whole = self.case.task != 'backbone'
        torch.manual_seed(0)
        if whole:
            model, data = whole_model(kind, self.case, self.device, self.quick)
        else:
            with torch.device(self.device):
                model = CANDIDATES[kind](self.arch, self.case.size)
        if kind.partition('/')[0] in TWINS:
            self.give_weights(model)
        mixed = self.training or whole or kind in AUTOCAST
        own = torch.float32 if mixed else self.dtype
        model.to(own)
        model.train(self.training)
        if kind == OPTIMIZED:
            model = optimized(model)
        context = torch.autocast(self.device, self.dtype) if own != self.dtype else nullcontext()
        if not whole:
            run = self.compile(model) if mode else model
            return model, backbone_step(model, run, itertools.cycle(self.images[own]), self.training, context)
        if not mode:
            return model, whole_step(model, data, self.training, context)
        images = itertools.repeat(model.data_preprocessor(data, self.training)['inputs'])
        return model, backbone_step(model.backbone, model.backbone, images, self.training, context)

    def give_weights(self, model: nn.Module) -> None:
        """Give a model the weights of the first twin; its biases, norms and tables are random so that misuse shows."""
        if self.weights is None:
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or 'bias_table' in name:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            self.weights = {key: value.to('cpu', copy=True) for key, value in model.state_dict().items()}
        else:
            logging.disable(logging.INFO)  # a report of what was loaded
            model.load_state_dict(self.weights)
            logging.disable(logging.NOTSET)

    def compile(self, model: nn.Module) -> Callable:
        """Compile the model; for inference on a GPU into CUDA graphs, since launches would take longest there."""
        if self.quick:
            return torch.compile(model, backend='eager')
        graphs = self.device == 'cuda' and not self.training
        return torch.compile(model, mode='reduce-overhead' if graphs else 'default')

    def start(self, name: str) -> tuple[Step, list[Tensor], int]:
        """The step of a candidate, its first outputs, and its peak memory in bytes."""
        if self.device == 'cuda':
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            _, step = self.build(name)
            outputs = [t.cpu().float() for t in step()]
            for _ in range(3):  # CUDA graphs are recorded by the second call or the third
                step()
            torch.cuda.synchronize()
            return step, outputs, torch.cuda.max_memory_allocated() - before
        model, step = self.build(name)
        first = step() if name.endswith('+compile') else None  # what compiling allocates does not count
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as account:
            second = step()
        events = [event for event in account.profiler.kineto_results.events() if event.name() == '[memory]']
        events.sort(key=lambda event: event.start_ns())
        held = sum(t.numel() * t.element_size() for t in held_tensors(model))
        peak = held + max(itertools.accumulate((event.nbytes() for event in events), initial=0))
        return step, [t.float() for t in first or second], peak
