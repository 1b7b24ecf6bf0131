"""Weights of every library, as its files hold them, give its features in our backbone."""

import numpy as np
import pytest
import torch
from oracles import relative_error
from torch import Tensor, nn
from zoo import NoRandomStart, Reference, reference

import swin_mm

V1 = ('official', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'torchvision', 'transformers', 'transformers-memory')
V2 = ('official', 'mmpretrain', 'timm', 'torchvision', 'transformers')
BACKBONES = (('transformers-backbone', 1), ('transformers-backbone', 2))
LIBRARIES = [*((name, 1) for name in V1), *((name, 2) for name in V2), *BACKBONES]
WINDOWS = {1: ((7, 224), (12, 384)), 2: ((8, 256), (16, 256))}


def ours(theirs: Reference, version: int, arch: str, window: int) -> nn.Module:
    """Our backbone with the reference's weights and its stages' maps unnormed."""
    with NoRandomStart():
        model = (swin_mm.SwinTransformer, swin_mm.SwinTransformerV2)[version - 1](
            arch=arch, window_size=window, drop_path_rate=0.0, pad_small_map=theirs.pad_small_map
        )
    model.load_state_dict(theirs.state)
    assert model.load_report.complete
    for i in range(4):
        setattr(model, f'norm{i}', nn.Identity())
    return model.eval()


def differ(model: nn.Module, theirs: Reference, size: int) -> float:
    image = torch.rand(1, 3, size, size)
    with torch.no_grad():
        return relative_error(model(image), theirs.features(image))


@pytest.mark.parametrize('arch', ['t', 'b'])
@pytest.mark.parametrize('which', [0, 1], ids=['small-window', 'large-window'])
@pytest.mark.parametrize('library, version', LIBRARIES)
def test_weights_of_every_library_give_its_features(library, version, which, arch):
    window, size = WINDOWS[version][which]
    if (library, window) == ('torchvision', 16):
        size = 512  # on smaller images it keeps the window in the last stage where the others shrink it
    theirs = reference(library, version, arch, window, size)
    assert differ(ours(theirs, version, arch, window), theirs, size) < 1e-5


@pytest.fixture(scope='module', params=[1, 2], ids=['v1', 'v2'])
def published(request) -> tuple[Reference, int, int, int]:
    """A classifier in the official naming, its version, window and image size."""
    version = request.param
    window, size = WINDOWS[version][0]
    return reference('official', version, 't', window, size), version, window, size


RELATED = {
    'official detection': lambda s: {f'backbone.{k}': v for k, v in s.items() if 'head' not in k and k[:5] != 'norm.'},
    'official in DDP': lambda s: {f'module.{k}': v for k, v in s.items()},
    'detectron2 FPN': lambda s: {f'backbone.bottom_up.{k}': v for k, v in s.items()},
    'Mask2Former': lambda s: {f'backbone.{k}': v.numpy() for k, v in s.items()} | {'sem_seg_head.x': np.ones(2)},
    'SimMIM': lambda s: (
        {f'encoder.{k}': v for k, v in s.items()}
        | {'encoder.mask_token': torch.ones(1), 'decoder.0.bias': torch.ones(1)}
    ),
    'MoBY': lambda s: (
        {f'{part}.{k}': v + i for i, part in enumerate(('encoder', 'encoder_k')) for k, v in s.items()}
        | {'projector.linear1.weight': torch.ones(1), 'queue1': torch.ones(1), 'queue_ptr': torch.ones(1)}
    ),
    'moving average beside': lambda s: s | {f'ema_{k}': v + 1 for k, v in s.items()},
    'moving average alone': lambda s: {f'ema_{k}': v for k, v in s.items()},
    'timm, old': lambda s: {k: v for k, v in s.items() if 'mask' not in k},
}


@pytest.mark.parametrize('relative', RELATED)
def test_official_names_load_under_every_prefix(published, relative):
    theirs, version, window, size = published
    state = swin_mm.checkpoints.unwrap({'model': RELATED[relative](theirs.state)})
    other = Reference(**vars(theirs) | {'state': state})
    assert differ(ours(other, version, 't', window), other, size) < 1e-5


def swapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries where keys belong."""
    return {
        k: torch.cat([v.chunk(3)[i] for i in (1, 0, 2)]) if k.endswith('qkv.weight') else v for k, v in state.items()
    }


def transposed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bias tables with rows and columns exchanged; V2's network with its two coordinates."""
    result = {}
    for k, v in state.items():
        if k.endswith('bias_table'):
            v = v.unflatten(0, (13, 13)).transpose(0, 1).flatten(0, 1)
        result[k] = v.flip(1) if k.endswith('cpb_mlp.0.weight') else v
    return result


def merged_otherwise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Neighbours joined row by row instead of column by column."""
    return {k: v.unflatten(1, (4, -1))[:, [0, 2, 1, 3]].flatten(1) if 'reduction' in k else v for k, v in state.items()}


@pytest.mark.parametrize('corrupt', [swapped, transposed, merged_otherwise], ids=lambda f: f.__name__)
def test_wrong_conversions_would_be_seen(published, corrupt):
    theirs, version, window, size = published
    other = Reference(**vars(theirs) | {'state': corrupt(theirs.state)})
    assert other.state.keys() == theirs.state.keys()
    assert differ(ours(other, version, 't', window), other, size) > 1e-3
