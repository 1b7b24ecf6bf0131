"""Weights of every library, as its files hold them, give its features in our backbone."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.oracles import SMALL, randomise, relative_error
from support.reference_models import NoRandomStart, Reference, reference
from torch import Tensor, nn

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
def test_the_feature_comparison_detects_wrong_conversions(published, corrupt):
    theirs, version, window, size = published
    other = Reference(**vars(theirs) | {'state': corrupt(theirs.state)})
    assert other.state.keys() == theirs.state.keys()
    assert differ(ours(other, version, 't', window), other, size) > 1e-3


def test_mmpretrain_files_of_old_versions_load():
    """They named the last norm as classifiers do and stored the masks."""
    theirs = reference('mmpretrain', 1, 't', 7, 224)
    state = {k.replace('backbone.norm3.', 'backbone.norm.'): v for k, v in theirs.state.items()}
    state['backbone.stages.0.blocks.1.attn.attn_mask'] = torch.zeros(64, 49, 49)
    model = ours(Reference(**vars(theirs) | {'state': state}), 1, 't', 7)
    assert model.load_report.dropped['backbone.norm.weight'] == "classifier's last norm"
    assert differ(model, theirs, 224) < 1e-5


@pytest.mark.parametrize('kind', ['upernet', 'upernet in memory', 'maskformer', 'masked images', 'version 4'])
def test_models_of_transformers_that_hold_a_swin_load(kind, tmp_path):
    transformers = pytest.importorskip('transformers')
    sizes = {'embed_dim': 32, 'depths': [2, 2, 2, 2], 'num_heads': [1, 2, 4, 8], 'drop_path_rate': 0.0}
    stages = {'out_features': [f'stage{i}' for i in range(1, 5)]}
    config = transformers.SwinConfig(**sizes, **stages, layer_norm_eps=1e-5)
    if kind.startswith('upernet'):
        config = transformers.UperNetConfig(backbone_config=config, hidden_size=16, auxiliary_in_channels=128)
        model = transformers.UperNetForSemanticSegmentation(config)
        nested = 'memory' in kind and hasattr(model.backbone, 'swin')  # from version 5 on
        swin, prefix = model.backbone, 'backbone.swin.' if nested else 'backbone.'
    elif kind == 'maskformer':
        config = transformers.MaskFormerSwinConfig(**sizes, **stages, layer_norm_eps=1e-5)
        model = transformers.MaskFormerSwinBackbone(config)
        swin, prefix = model, 'model.'
    else:
        cls = transformers.SwinForMaskedImageModeling if kind == 'masked images' else transformers.SwinModel
        model = cls(config, use_mask_token=True) if kind == 'version 4' else cls(config)
        swin, prefix = None, '' if kind == 'version 4' else 'swin.'
    randomise(model).eval()
    if 'memory' in kind:
        state = model.state_dict()
    else:
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / 'model.safetensors')
    if kind == 'version 4':  # its files stored this
        state['encoder.layers.0.blocks.0.attention.self.relative_position_index'] = torch.zeros(49, 49).long()
    mine = swin_mm.SwinTransformer(**SMALL)
    mine.load_state_dict(state)
    report = mine.load_report
    assert report.complete and report.naming.startswith('transformers') and report.prefix == prefix
    assert bool(report.new) == (swin is None)  # only those with a backbone's norms bring them
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        if swin is not None:
            assert relative_error(mine.eval()(image), swin(image).feature_maps) < 1e-5
        else:  # the last two stages are normed or shifted otherwise
            body = getattr(model, 'swin', model)
            states = body(image, output_hidden_states=True).reshaped_hidden_states
            mine.norm0 = mine.norm1 = nn.Identity()
            merged = mine.layers[0].downsample(mine.eval()(image)[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            assert relative_error([merged], [states[1]]) < 1e-5
