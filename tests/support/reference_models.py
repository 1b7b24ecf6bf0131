"""Swin Transformers of other libraries, with random weights, as references for converting checkpoints.

timm, torchvision and mmpretrain cannot all be imported beside a CPU build of torch: torchvision's wheel brings
compiled operators for another build, timm imports torchvision, and mmpretrain imports packages that the others exclude.
So they are not installed into the environment, where half-importable packages would mislead other libraries, but into
a folder of their own, which is on the path only while they are imported. peft and torchao, which tests apply to our
models, are there as well: mmengine imports transformers, which imports both, and every program would start 2 seconds
later and with warnings::

    pip install --no-deps --target .venv/oracles torchvision==0.28.0 timm==1.0.31 onedl-mmpretrain==1.3.6 \
        peft==0.21.2 accelerate==1.15.0 psutil torchao==0.18.0
"""

import functools
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from mmengine.registry import Registry
from support.oracles import randomise
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from swin_mm.models.swin import ARCHS

FOLDER = Path(sys.prefix) / 'oracles'
CLASSES = 10


@dataclass
class Reference:
    """A model of another library.

    Args:
        model: that library's model in evaluation, its weights from :func:`oracles.randomise`.
        state: its weights as that library's files hold them.
        features: the map of each stage before merging and output norm, image (B, 3, H, W) -> 4 x (B, C, h, w).
        classify: the normed last map, as passed to the head, (B, 3, H, W) -> (B, C, h, w); None where there is no norm.
        pad_small_map: what our backbone needs to do the same on a map no larger than the window.
    """

    model: nn.Module
    state: dict[str, Tensor]
    features: Callable[[Tensor], list[Tensor]]
    classify: Callable[[Tensor], Tensor] | None
    pad_small_map: bool


def reference(library: str, version: int, arch: str = 't', window: int = 7, image_size: int = 224) -> Reference:
    """Build a reference, or skip the test where its library is not installed.

    Args:
        library: 'official', 'mmdet', 'mmseg' (V1), 'mmpretrain', 'timm', 'torchvision', 'transformers' (keys as in its
            files), 'transformers-memory' (keys of its classifier's state_dict()) or 'transformers-backbone'.
        version: 1 or 2.
        arch: 't', 's', 'b' or 'l'.
        window: side of the windows. At 224 (V1, 7), 384 (V1, 12) and 256 (V2, 8) all libraries agree. At 256 with
            window 16 torchvision pads the last stage, where the others shrink the window.
        image_size: side of the images; the model takes no others.
    """
    build = BUILDERS[library]
    with NoRandomStart():
        model, stages, norm, state = build(version, ARCHS[arch], window, image_size)
    randomise(model)
    model.eval()  # returns None in some
    return Reference(
        model=model,
        state=state(),
        features=lambda image: _outputs(model, [stage[-1] for stage in stages], image),
        classify=None if norm is None else lambda image: _outputs(model, [norm], image)[0],
        pad_small_map=library in ('mmdet', 'mmseg') or (library, version) == ('transformers-backbone', 1),
    )


class NoRandomStart(TorchFunctionMode):
    """Zeros instead of random initial values, which are slow to draw and replaced anyway."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__name__', '') in ('normal_', 'uniform_'):
            return (args[0] if args else kwargs['tensor']).detach().zero_()
        return func(*args, **kwargs or {})


def _outputs(model: nn.Module, parts: list[nn.Module], image: Tensor) -> list[Tensor]:
    """The outputs of these parts of the model, as (B, C, h, w)."""
    outputs: list[Any] = []
    hooks = [part.register_forward_hook(lambda _module, _args, output: outputs.append(output)) for part in parts]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return [_as_map(output) for output in outputs]


def _as_map(output: Tensor | tuple) -> Tensor:
    """(B, h * w, C) or (B, h, w, C), alone or first of several, as (B, C, h, w); maps of tokens are square."""
    tokens = output[0] if isinstance(output, tuple) else output
    if tokens.ndim == 3:
        side = int(tokens.shape[1] ** 0.5)
        tokens = tokens.unflatten(1, (side, side))
    return tokens.permute(0, 3, 1, 2)


# Each builder gives the model, the blocks of each stage, the last norm, and what makes the state.
Built = tuple[nn.Module, list[nn.ModuleList], nn.Module | None, Callable[[], dict[str, Tensor]]]


def _openmmlab(library: str, version: int, sizes: dict, window: int, image_size: int) -> Built:
    if version != 1:
        raise ValueError(f'{library} has no Swin V{version}')
    swin = pytest.importorskip(f'{library}.models.backbones.swin')
    model = swin.SwinTransformer(
        **sizes, pretrain_img_size=image_size, window_size=window, mlp_ratio=4, drop_path_rate=0.0
    )
    return model, [stage.blocks for stage in model.stages], model.norm3, model.state_dict


def _mmpretrain(version: int, sizes: dict, window: int, image_size: int) -> Built:
    swin = _import_mmpretrain()[version - 1]
    if version == 2:
        sizes = sizes | {'extra_norm_every_n_blocks': 0}
        # As in its configs: it refuses a map smaller than the window.
        window = [min(window, image_size // 4 // 2**i) for i in range(4)]
    model = nn.Module()  # its classifier has no other parameters
    model.backbone = swin(arch=sizes, img_size=image_size, window_size=window, drop_path_rate=0.0)
    model.head = nn.Module()
    model.head.fc = nn.Linear(8 * sizes['embed_dims'], CLASSES)
    model.forward = model.backbone.forward
    return model, [stage.blocks for stage in model.backbone.stages], model.backbone.norm3, model.state_dict


def _timm(version: int, sizes: dict, window: int, image_size: int) -> Built:
    swin = _import_vision(f'timm.models.swin_transformer{"_v2" * (version - 1)}')
    model = (swin.SwinTransformer if version == 1 else swin.SwinTransformerV2)(
        img_size=image_size,
        window_size=window,
        num_classes=CLASSES,
        embed_dim=sizes['embed_dims'],
        depths=sizes['depths'],
        num_heads=sizes['num_heads'],
        drop_path_rate=0.0,
    )
    return model, [stage.blocks for stage in model.layers], model.norm, model.state_dict


def _official(version: int, sizes: dict, window: int, image_size: int) -> Built:
    """timm's model, which is the official one; the names written out from the official source, masks included."""
    model, stages, norm, state = _timm(version, sizes, window, image_size)

    def renamed() -> dict[str, Tensor]:
        result = {}
        for key, value in state().items():
            stage = re.match(r'layers\.(\d)\.downsample', key)
            key = key.replace(stage[0], f'layers.{int(stage[1]) - 1}.downsample') if stage else key
            result[key.replace('head.fc', 'head')] = value
        for i, depth in enumerate(sizes['depths']):
            side = image_size // 4 >> i
            w = min(window, side)
            for j in range(depth):
                block = f'layers.{i}.blocks.{j}'
                result[f'{block}.attn.relative_position_index'] = torch.zeros(w * w, w * w).long()
                if version == 2:
                    axis = torch.arange(1 - w, w) / (w - 1) * 8
                    axis = axis.sign() * (axis.abs() + 1).log2() / 3
                    table = torch.stack(torch.meshgrid(axis, axis, indexing='ij'), -1)[None]
                    result[f'{block}.attn.relative_coords_table'] = table
                if j % 2 and w < side:
                    result[f'{block}.attn_mask'] = torch.zeros((side // w) ** 2, w * w, w * w)
        return result

    return model, stages, norm, renamed


def _torchvision(version: int, sizes: dict, window: int, image_size: int) -> Built:
    swin = _import_vision('torchvision.models.swin_transformer')
    parts = {'block': swin.SwinTransformerBlockV2, 'downsample_layer': swin.PatchMergingV2} if version == 2 else {}
    model = swin.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=sizes['embed_dims'],
        depths=sizes['depths'],
        num_heads=sizes['num_heads'],
        window_size=[window, window],
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
        **parts,
    )
    return model, [model.features[i] for i in (1, 3, 5, 7)], model.norm, model.state_dict


def _transformers(kind: str, version: int, sizes: dict, window: int, image_size: int) -> Built:
    transformers = pytest.importorskip('transformers')
    name = ('Swin', 'Swinv2')[version - 1]
    config = getattr(transformers, name + 'Config')(
        image_size=image_size,
        window_size=window,
        embed_dim=sizes['embed_dims'],
        depths=list(sizes['depths']),
        num_heads=list(sizes['num_heads']),
        drop_path_rate=0.0,
        num_labels=CLASSES,
        out_features=[f'stage{i}' for i in range(1, 5)],
    )
    model = getattr(transformers, name + ('Backbone' if kind == 'backbone' else 'ForImageClassification'))(config)
    body = getattr(model, name.lower(), model)  # the backbone of V2 is its own body
    norm = body.layernorm if kind != 'backbone' else model.hidden_states_norms['stage4'] if version == 1 else None
    state = functools.partial(_saved, model) if kind == 'published' else model.state_dict
    return model, [stage.blocks for stage in body.encoder.layers], norm, state


def _saved(model: Any) -> dict[str, Tensor]:
    """The state dict that the library saves for a model; its keys differ from those in memory."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / 'model.safetensors')


BUILDERS: dict[str, Callable[[int, dict, int, int], Built]] = {
    'official': _official,
    'mmdet': functools.partial(_openmmlab, 'mmdet'),
    'mmseg': functools.partial(_openmmlab, 'mmseg'),
    'mmpretrain': _mmpretrain,
    'timm': _timm,
    'torchvision': _torchvision,
    'transformers': functools.partial(_transformers, 'published'),
    'transformers-memory': functools.partial(_transformers, 'memory'),
    'transformers-backbone': functools.partial(_transformers, 'backbone'),
}


@contextmanager
def _oracles_on_path() -> Iterator[None]:
    """Find the libraries in the folder of their own, after those of the environment."""
    sys.path.append(str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))


@functools.cache
def import_oracle(module: str) -> ModuleType:
    """A module of a library in the folder, or in the environment; skips the test where it is in neither."""
    with _oracles_on_path():
        return pytest.importorskip(module)


def _import_vision(module: str) -> ModuleType:
    """A module of timm or torchvision. Without compiled operators, torchvision has nothing to describe to torch."""
    with mock.patch('torch.library.register_fake', lambda *_a, **_k: lambda function: function):
        return import_oracle(module)


@functools.cache
def _import_mmpretrain() -> tuple[type[nn.Module], type[nn.Module]]:
    """The V1 and V2 classes, from their own files: packages that run no ``__init__`` lead to them."""
    with _oracles_on_path():
        root = importlib.util.find_spec('mmpretrain')
        if root is None:
            pytest.skip(f'mmpretrain is not in {FOLDER}')
        folder = Path(root.origin).parent
    try:
        for package in ('', '.models', '.models.utils', '.models.backbones'):
            module = ModuleType('mmpretrain' + package)
            module.__path__ = [str(folder.joinpath(*package.split('.')))]
            sys.modules[module.__name__] = module
        utils = sys.modules['mmpretrain.models.utils']
        for name in ('attention', 'embed', 'helpers'):
            vars(utils).update(vars(importlib.import_module(f'mmpretrain.models.utils.{name}')))
        swins = [importlib.import_module(f'mmpretrain.models.backbones.swin_transformer{v}') for v in ('', '_v2')]
        return swins[0].SwinTransformer, swins[1].SwinTransformerV2
    finally:
        for module in [name for name in sys.modules if name.partition('.')[0] == 'mmpretrain']:
            for value in vars(sys.modules.pop(module)).values():
                if isinstance(value, Registry) and value.parent is not None:
                    value.parent.children.pop('mmpretrain', None)
