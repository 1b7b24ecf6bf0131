"""Configs: they build, equal the stock configs except for the backbone, or follow the published recipes."""

import functools
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmengine.utils import get_installed_path
from support.reference_models import FOLDER
from support.tool_fixtures import ROOT

import swin_mm
from swin_mm.analysis import complexity
from swin_mm.checkpoints.files import MOVED_HOSTS
from swin_mm.checkpoints.namings import MMDET
from swin_mm.models.swin import ARCHS
from swin_mm.openmmlab.config import use_current_addresses
from swin_mm.openmmlab.layer_decay import NO_DECAY
from swin_mm.ops.windows import padded_size
from swin_mm.utils.environment import openmmlab_line

CONFIGS = ROOT / 'configs'
LEAVES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob('[!_]*/*.py'))
NOT_PUBLISHED = ('nuclei', 'custom')  # folders
MMPRETRAIN = importlib.util.find_spec('mmpretrain')
needs_mmpretrain = pytest.mark.skipif(
    MMPRETRAIN is None and not (FOLDER / 'mmpretrain').is_dir(), reason='mmpretrain is not installed'
)


@pytest.fixture(autouse=True, scope='module')
def find_mmpretrain(tmp_path_factory) -> Iterator[None]:
    """Read mmpretrain's configs from the folder of reference libraries if mmpretrain is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        if MMPRETRAIN is None and (FOLDER / 'mmpretrain').is_dir():
            folder = tmp_path_factory.mktemp('libraries')
            (folder / 'mmpretrain').symlink_to(FOLDER / 'mmpretrain')
            patch.syspath_prepend(folder)
            patch.setitem(MODULE2PACKAGE, 'mmpretrain', 'mmpretrain')
        yield


def leaves(pattern: str, but: str = '$^') -> list:
    """Return the leaves whose name matches, for ``parametrize``; classification configs need mmpretrain."""
    return [
        pytest.param(leaf, marks=needs_mmpretrain) if leaf.startswith('classification') else leaf
        for leaf in LEAVES
        if re.search(pattern, leaf) and not re.search(but, leaf)
    ]


OFFICIAL = 'https://github.com/SwinTransformer/storage/releases/download/'

# Stock configs that ours correspond to under another name.
RENAMED = {
    'mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py': (
        'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
    ),
} | {
    f'upernet/upernet_swin-{ours}_8xb2-160k_ade20k-512x512.py': (
        f'mmseg::swin/swin-{stock}-pre_upernet_8xb2-160k_ade20k-512x512.py'
    )
    for ours, stock in (
        ('t-p4-w7', 'tiny-patch4-window7-in1k'),
        ('s-p4-w7', 'small-patch4-window7-in1k'),
        ('b-p4-w7', 'base-patch4-window7-in1k'),
        ('b-p4-w7_in22k', 'base-patch4-window7-in22k'),
        ('b-p4-w12', 'base-patch4-window12-in1k-384x384'),
        ('b-p4-w12_in22k', 'base-patch4-window12-in22k-384x384'),
        ('l-p4-w7_in22k', 'large-patch4-window7-in22k'),
        ('l-p4-w12_in22k', 'large-patch4-window12-in22k-384x384'),
    )
}


def find_stock() -> dict[str, str]:
    """Return {our config: the stock config that it corresponds to}, most of the same name."""
    same = {
        leaf: f'{library}::{leaf}'
        for leaf in LEAVES
        for library in ('mmdet', 'mmseg')
        if Path(get_installed_path(library), '.mim/configs', leaf).exists()
    }
    return RENAMED | same


STOCK = find_stock()

# Parameters and 10^9 multiply-adds as published, by size: T, S, B, L.
PUBLISHED = {
    ('mask_rcnn/mask-rcnn_swin-{}_fpn_1x_coco.py', 1280, 800): (
        (47_794_602, 69_112_506, 107_141_800, 215_640_708),
        (266.55, 358.60, 503.04, 913.31),
    ),
    ('cascade_mask_rcnn/cascade-mask-rcnn_swin-{}_fpn_4conv1fc-giou_ms-crop-3x_coco.py', 1280, 800): (
        (85_629_804, 106_947_708, 144_977_002, 253_475_910),
        (744.80, 836.85, 981.29, 1391.56),
    ),
    ('upernet/upernet_swin-{}_8xb2-160k_ade20k-512x512.py', 2048, 512): (
        (59_941_862, 81_259_766, 121_279_716, 233_759_936),
        (944.39, 1037.42, 1187.35, 1611.47),
    ),
    ('upernet/upernet_swin-{}_8xb2-160k_ade20k-512x512.py', 512, 512): (
        (59_941_862, 81_259_766, 121_279_716, 233_759_936),
        (236.86, 260.58, 298.98, 407.61),
    ),
    ('upernet/upernet_swin-{}_8xb2-160k_ade20k-640x640.py', 2560, 640): (
        (None, None, 121_279_716, 233_759_936),
        (None, None, 1839.18, 2482.34),
    ),
}
SIZES = [
    (pattern.format(size), width, height, parameters, gmac)
    for (pattern, width, height), figures in PUBLISHED.items()
    for options, parameters, gmac in zip(
        (['t-p4-w7'], ['s-p4-w7'], ['b-p4-w7', 'b-p4-w7_in22k'], ['l-p4-w7_in22k']), *figures, strict=True
    )
    for size in options
    if parameters and pattern.format(size) in LEAVES
]
V2 = 'swinv2-t-p4-w8', 'swinv2-t-p4-w16', 'swinv2-s-p4-w16', 'swinv2-b-p4-w16', 'swinv2-l-p4-w16_in22k'


@functools.cache
def load(name: str) -> Config:
    """Read a config of ours by its path under configs/, or a stock config by its ``library::`` name."""
    folder = None
    if '::' in name:
        library, _, name = name.partition('::')
        folder = Path(get_installed_path(library), '.mim/configs')
    return Config.fromfile((folder or CONFIGS) / name, import_custom_modules=False)


def plain(node):
    """Return a config without the ``_scope_`` marks of mmengine."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key != '_scope_'}
    return [plain(value) for value in node] if isinstance(node, (list, tuple)) else node


def settings(name: str) -> dict:
    """Return the entries of a config that have an effect; the others are variables."""
    effective = {*inspect.signature(Runner.__init__).parameters, 'auto_scale_lr', 'tta_model', 'tta_pipeline'}
    return {key: plain(value) for key, value in load(name).to_dict().items() if key in effective}


def backbone_arguments(backbone: dict) -> dict:
    """Return all arguments of a Swin backbone including defaults, except for the weights."""
    from mmdet.models import SwinTransformer

    defaults = {name: p.default for name, p in inspect.signature(SwinTransformer.__init__).parameters.items()}
    given = defaults | ARCHS.get(backbone.get('arch'), {}) | backbone
    for name in ('self', 'type', 'arch', 'init_cfg', 'pretrained', 'convert_weights'):
        given.pop(name, None)
    if not given['use_abs_pos_embed']:
        del given['pretrain_img_size']  # of that embedding
    return plain(given)


@pytest.mark.parametrize('ours', STOCK)
def test_equals_the_stock_config_except_for_the_backbone(ours):
    config, expected = settings(ours), settings(STOCK[ours])
    model, stock_model = config['model'], expected['model']
    model.pop('pretrained', None), stock_model.pop('pretrained', None)
    backbone, replaced = model.pop('backbone'), stock_model.pop('backbone')
    assert (backbone['type'], replaced['type']) == ('swin_mm.SwinTransformer', 'SwinTransformer')
    assert backbone_arguments(backbone) == backbone_arguments(replaced)
    options = expected['optim_wrapper'].get('paramwise_cfg', {})
    if 'custom_keys' in options:  # names of mmdet's Swin; the next test checks their effect
        options['custom_keys'] = {k.replace('.stages.', '.layers.'): v for k, v in options['custom_keys'].items()}
    assert config == expected
    imported = load(STOCK[ours]).get('custom_imports', {}).get('imports', [])
    imported = [imported] if isinstance(imported, str) else imported
    assert load(ours).custom_imports.imports == [*imported, 'swin_mm']


def learning(name: str) -> dict[str, tuple[float, float]]:
    """Return {our parameter name: (learning rate, weight decay)} as the optimizer of training has them."""
    config = load(name)
    # mmdet's Swin reads the numbers of a linspace, which meta tensors do not have.
    with mock.patch('torch.linspace', functools.partial(torch.linspace, device='cpu')):
        model = complexity.build(config)
    options = config.optim_wrapper.to_dict() | dict(type='OptimWrapper')
    for name in ('dtype', 'loss_scale'):
        options.pop(name, None)
    optimizer = build_optim_wrapper(model, options).optimizer
    found = {id(p): (g['lr'], g['weight_decay']) for g in optimizer.param_groups for p in g['params']}
    return {
        MMDET.ours(name.removeprefix('backbone.')) if name.startswith('backbone.') else f'/{name}': found[id(p)]
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize('ours', [ours for ours in STOCK if re.search('swin-t.*(coco|ade20k)|dino.*12e|rtmdet', ours)])
def test_every_parameter_learns_as_with_the_stock_config(ours):
    found, expected = learning(ours), learning(STOCK[ours])
    assert found == expected
    assert len(set(found.values())) > 1


def test_the_stock_configs_are_found():
    assert len(STOCK) == 34, sorted(STOCK)


@pytest.mark.parametrize('ours', leaves('mask_rcnn/mask.*swin-[sbl].*_fpn_(1x|ms-crop-3x)'))
def test_mask_rcnn_of_other_sizes_is_trained_like_the_stock_one(ours):
    schedule = re.search('_fpn_(.*)_coco', ours)[1]
    config, expected = settings(ours), settings(f'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_{schedule}_coco.py')
    for options in (config, expected):
        options['model'].pop('backbone'), options['model']['neck'].pop('in_channels')
    assert config == expected


COCO_STEPS = {'1x': (12, [8, 11]), '3x': (36, [27, 33]), '6x': (72, [63, 69])}


@pytest.mark.parametrize('ours', leaves('^(cascade|retinanet|atss|reppoints|sparse|htc)|ms-crop-1x'))
def test_recipe_on_coco(ours):
    """Recipes of the official repository that mmdet has no config for."""
    config, reference = load(ours), load('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py')
    assert plain(config.optim_wrapper.optimizer) == plain(reference.optim_wrapper.optimizer)
    keys = {key: value['decay_mult'] for key, value in config.optim_wrapper.paramwise_cfg.custom_keys.items()}
    assert keys == {'norm': 0, 'relative_position_bias_table': 0, 'absolute_pos_embed': 0}
    layer_decay = config.optim_wrapper.get('constructor'), config.optim_wrapper.paramwise_cfg.get('decay_rate')
    assert layer_decay == (('swin_mm.LayerDecayOptimWrapperConstructor', 0.95) if 'v2' in ours else (None, None))

    epochs, milestones = COCO_STEPS[re.search(r'([136]x)_coco', ours)[1]]
    warmup, steps = config.param_scheduler
    assert config.train_cfg.max_epochs == steps.end == epochs
    assert (list(steps.milestones), steps.gamma, steps.by_epoch) == (milestones, 0.1, True)
    # mmdet's Mask R-CNN warms up for 1000 iterations, the official repository for 500.
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 500, False)
    assert config.auto_scale_lr.base_batch_size == 8 * config.train_dataloader.batch_size == 16

    pipeline, expected = plain(config.train_dataloader.dataset.pipeline), plain(reference.train_pipeline)
    boxes_only = config.model.roi_head.get('mask_head') is None if 'roi_head' in config.model else True
    if 'htc' in ours:
        stock = load('mmdet::htc/htc_x101-64x4d-dconv-c3-c5_fpn_ms-400-1400-16xb1-20e_coco.py')
        expected = plain(stock.train_pipeline)
    elif 'retinanet' in ours:
        expected = plain(load('mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py').train_pipeline)
    elif boxes_only:
        expected[1].pop('with_mask')
    for step in (*pipeline, *expected):
        step.pop('backend_args', None)
    assert pipeline == expected


@pytest.mark.parametrize('ours', leaves('^(mask_rcnn|cascade|retinanet|atss|reppoints|sparse|htc)'))
def test_drop_path_on_coco(ours):
    size = re.search(r'swin(?:v2)?-(\w)', ours)[1]
    exceptions = {
        'mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-1x_coco.py': 0.1,
        'cascade_mask_rcnn/cascade-mask-rcnn_swin-t-p4-w7_fpn_4conv1fc-giou_ms-crop-1x_coco.py': 0.0,
    }
    assert load(ours).model.backbone.drop_path_rate == exceptions.get(ours, {'b': 0.3, 'l': 0.3}.get(size, 0.2))


@pytest.mark.parametrize('name', ['b-p4-w12-384-in21k_8xb2-lsj-50e_coco', 'l-p4-w12-384-in21k_16xb1-lsj-100e_coco'])
def test_instance_mask2former_is_trained_like_the_panoptic_one(name):
    """mmdet has these sizes for panoptic segmentation only."""
    ours, stock = f'mask2former/mask2former_swin-{name}.py', f'mmdet::mask2former/mask2former_swin-{name}-panoptic.py'
    config, expected = settings(ours), settings(stock)
    for key in ('param_scheduler', 'train_cfg'):
        assert config[key] == expected[key]
    assert config['train_dataloader']['batch_size'] == expected['train_dataloader']['batch_size']
    assert config['model']['panoptic_head']['num_queries'] == expected['model']['panoptic_head']['num_queries']
    assert backbone_arguments(config['model']['backbone']) == backbone_arguments(expected['model']['backbone'])
    assert learning(ours) == learning(stock)


@pytest.mark.parametrize('ours', leaves('^cascade'))
def test_cascade_has_the_official_heads(ours):
    """mmdet's ConvNeXt configs use the same heads."""
    expected = settings('mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py')
    config = settings(ours)
    for options in (config, expected):
        options['model'].pop('backbone'), options['model']['neck'].pop('in_channels')
    assert config['model'] == expected['model']
    assert config['val_dataloader'] == expected['val_dataloader']


@pytest.mark.parametrize('ours', leaves('upernet/.*(640x640|swinv2|cityscapes)'))
def test_recipe_on_ade20k_and_cityscapes(ours):
    config, reference = load(ours), load(next(stock for stock in STOCK.values() if 'tiny-patch4-window7' in stock))
    optimizer, expected = plain(config.optim_wrapper.optimizer), plain(reference.optim_wrapper.optimizer)
    if 'v2' in ours:
        expected |= dict(lr=4e-5, weight_decay=0.05)
        assert config.optim_wrapper.constructor == 'swin_mm.LayerDecayOptimWrapperConstructor'
        assert config.optim_wrapper.paramwise_cfg.decay_rate == 0.95
    assert optimizer == expected
    keys = config.optim_wrapper.paramwise_cfg.custom_keys
    assert plain(keys) == plain(reference.optim_wrapper.paramwise_cfg.custom_keys)
    iterations = 80_000 if '80k' in ours else 160_000
    warmup, poly = plain(config.param_scheduler)
    assert [warmup, dict(poly, end=160_000)] == plain(reference.param_scheduler)
    assert config.train_cfg.max_iters == poly['end'] == iterations
    assert config.train_dataloader.batch_size == 2 and config.val_dataloader.batch_size == 1

    data = {'640': 'ade20k_640x640', '512': 'ade20k'}[ours[-6:-3]] if 'ade20k' in ours else 'cityscapes'
    stock = load(f'mmseg::_base_/datasets/{data}.py')
    for part in ('train', 'val'):
        assert plain(config[f'{part}_dataloader'].dataset) == plain(stock[f'{part}_dataloader'].dataset)
    assert tuple(config.model.data_preprocessor.size) == stock.crop_size
    assert config.model.test_cfg.mode == 'whole'
    assert config.model.backbone.drop_path_rate == 0.3


@pytest.mark.parametrize('size', ['t', 's'])
def test_amp_makes_the_mixed_precision_config_of_mmdet(size):
    """There are no configs for mixed precision: tools/train.py --amp changes the type of the optim wrapper."""
    config = settings(f'mask_rcnn/mask-rcnn_swin-{size}-p4-w7_fpn_ms-crop-3x_coco.py')
    expected = settings(f'mmdet::swin/mask-rcnn_swin-{size}-p4-w7_fpn_amp-ms-crop-3x_coco.py')
    config['optim_wrapper']['type'] = 'AmpOptimWrapper'
    assert expected['optim_wrapper'].pop('loss_scale', 'dynamic') == 'dynamic'
    for options in (config, expected):
        options['model'].pop('backbone')
        options['model'].pop('pretrained', None)
    assert config == expected
    assert not [leaf for leaf in LEAVES if re.search(r'[_-]amp[_-]', leaf)]


@pytest.mark.parametrize('ours', LEAVES)
def test_leaves_are_short(ours):
    lines = 30 if ours.startswith('custom/') else 10  # templates explain themselves
    assert len((CONFIGS / ours).read_text().splitlines()) <= lines


@pytest.mark.parametrize('ours', leaves('', but='classification'))
def test_leaves_build_and_channels_match(ours):
    config = load(ours)
    model = complexity.build(config)
    row = re.search(
        rf'^\|.*\({re.escape(Path(ours).name)}\).*', (CONFIGS / ours).with_name('README.md').read_text(), re.M
    )
    parameters = sum(p.numel() for p in model.parameters())
    if ours.startswith('dino/') and openmmlab_line() == 'original':
        parameters += 512 * 256  # onedl's decoder is wider than the published one, as configs/dino/README.md says
    assert row is None or f'| {parameters:,} |' in row[0]
    backbone = model.backbone
    assert type(backbone) is (swin_mm.SwinTransformerV2 if 'swinv2' in ours else swin_mm.SwinTransformer)
    outputs = [backbone.num_features[i] for i in backbone.out_indices]
    stated = config.model
    if 'neck' in stated:
        assert list(stated.neck.in_channels) == outputs
    else:
        head = stated.get('panoptic_head') or stated.decode_head
        assert list(head.get('kernel_generate_head', head).in_channels) == outputs
        if aux := stated.get('auxiliary_head'):
            assert aux.in_channels == outputs[aux.in_index]


@pytest.mark.parametrize('ours', leaves('', but='nuclei|nano'))
def test_weights_are_official_and_match_the_size(ours):
    backbone = load(ours).model.backbone
    found = backbone_arguments(backbone.to_dict())
    address = backbone.init_cfg.checkpoint
    assert backbone.init_cfg.type == 'Pretrained' and address.startswith(OFFICIAL)
    version, size, window = re.search(r'(swinv?2?)_(\w+?)_patch4_window(?:12to)?(\d+)_', address).groups()
    sizes = ARCHS[dict(tiny='t', small='s', base='b', large='l')[size]]
    assert {key: found[key] for key in sizes} == plain(sizes)
    assert (version == 'swinv2') == ('V2' in backbone.type) == ('swinv2' in ours)
    assert int(window) == backbone.get('window_size', 7)
    if backbone.type.endswith('V2') and int(window) == 16:
        # In pre-training the last map was smaller than the window, so the window was too.
        trained = (12, 12, 12, 6) if '22k' in address else (16, 16, 16, 8)
        assert tuple(backbone.pretrained_window_sizes) == trained
    if re.search('in2[12]k', ours):
        assert '22k' in address
    elif re.search(r'_swin(v2)?-\w-p4-w\d+_(fpn|8xb2)', ours):
        assert '22k' not in address


@pytest.mark.parametrize('ours', leaves(''))
def test_no_setting_inherited_or_not_names_a_host_that_is_gone(ours):
    """As the tools read it: the original libraries' bases name such a host."""
    config = Config(load(ours).to_dict())
    use_current_addresses(config)
    hosts = {urlsplit(text).hostname for text in texts(config.to_dict()) if text.startswith(('http://', 'https://'))}
    assert hosts <= {'github.com', 'mmassets.onedl.ai'}
    assert not set(MOVED_HOSTS) & hosts


def texts(node) -> Iterator[str]:
    """All strings in a config."""
    if isinstance(node, str):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        yield from texts(child)


def projections_of_padding(backbone, width, height):
    """Return the multiply-adds of projecting padded tokens, which published Swins compute and ours does not."""
    total, size = 0, (height, width)
    for i, stage in enumerate(backbone.layers):
        size = tuple(-(-side // (2 if i else 4)) for side in size)
        whole = padded_size(size, stage.blocks[0].attn.window)
        total += (whole[0] * whole[1] - size[0] * size[1]) * len(stage.blocks) * 4 * backbone.num_features[i] ** 2
    return total


@pytest.mark.parametrize('ours, width, height, parameters, gmac', SIZES)
def test_models_have_the_published_size(ours, width, height, parameters, gmac):
    config = load(ours)
    assert sum(p.numel() for p in complexity.build(config).parameters()) == parameters
    macs = sum(complexity.multiply_adds(config, width, height).values())
    macs += projections_of_padding(complexity.build(config).backbone, width, height)
    assert macs / 1e9 == pytest.approx(gmac, rel=0.003)


@pytest.mark.parametrize('name', V2)
@pytest.mark.parametrize('method', ['cascade_mask_rcnn/cascade-mask-rcnn', 'upernet/upernet'])
def test_v2_models_differ_from_v1_by_the_backbone(method, name):
    """Whole models with V2 have no published size, but their backbones have."""
    arch = name[7]
    backbones = dict(t=27_579_498 - 27_520_698, s=48_960_762 - 48_838_602, b=86_895_608 - 86_745_016)
    backbones['l'] = 195_205_620 - 194_998_164
    v1 = next(row for row in SIZES if row[0].startswith(method) and f'swin-{arch}-' in row[0])
    leaf = next(leaf for leaf in LEAVES if leaf.startswith(f'{method}_{name}'))
    assert sum(p.numel() for p in complexity.build(load(leaf)).parameters()) == v1[3] + backbones[arch]


def test_no_decay_keys_are_those_of_the_library():
    no_decay = load('_base_/schedules/no_decay.py').no_decay
    assert tuple(no_decay) == NO_DECAY
    assert all(options == {'decay_mult': 0.0} for options in no_decay.values())


def test_configs_are_found_by_library_name(tmp_path):
    ours = next(iter(STOCK))
    wrapper = tmp_path / 'child.py'
    wrapper.write_text(f"_base_ = 'swin_mm::{ours}'\n")
    assert Config.fromfile(wrapper).model == load(ours).model


def test_checkpoint_can_be_a_local_file():
    config = Config.fromfile(CONFIGS / 'mask_rcnn/mask-rcnn_swin-s-p4-w7_fpn_1x_coco.py')
    config.merge_from_dict({'model.backbone.init_cfg.checkpoint': 'swin_small.pth'})
    assert complexity.build(config).backbone.init_cfg == {'type': 'Pretrained', 'checkpoint': 'swin_small.pth'}


@needs_mmpretrain
@pytest.mark.parametrize(
    'arch, drop_path, parameters', [('t', 0.1, 28_288_354), ('s', 0.2, 49_606_258), ('b', 0.2, 87_768_224)]
)
def test_recipe_of_classification(arch, drop_path, parameters):
    """The official fine-tuning from ImageNet-22k: 30 epochs, 5 of them to warm up, lr 2e-5 per 512 images."""
    config = load(f'classification/swin-{arch}-p4-w7_in22k_16xb64-30e_in1k.py')
    stock = load('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py')
    assert plain(config.train_dataloader) == plain(stock.train_dataloader)
    assert config.auto_scale_lr.base_batch_size == 16 * config.train_dataloader.batch_size == 1024
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', pytest.approx(4e-5), 1e-8)
    warmup, cosine = config.param_scheduler
    assert (warmup.start_factor, warmup.end, cosine.begin, config.train_cfg.max_epochs) == (1e-3, 5, 5, 30)
    assert cosine.eta_min == pytest.approx(4e-7)

    arguments = config.model.backbone.to_dict()
    assert arguments.pop('type') == 'swin_mm.SwinTransformer' and arguments['drop_path_rate'] == drop_path
    backbone, head = swin_mm.SwinTransformer(**arguments), config.model.head
    assert backbone.num_features[-1] == head.in_channels and not backbone.layers[3].blocks[1].pad_small_map
    classifier = (head.in_channels + 1) * head.num_classes
    assert sum(p.numel() for p in backbone.parameters()) + classifier == parameters


@pytest.mark.parametrize('folder', sorted({leaf.split('/')[0] for leaf in LEAVES}))
def test_readme_and_metafile_name_every_config(folder):
    readme = (CONFIGS / folder / 'README.md').read_text()
    here = {leaf for leaf in LEAVES if leaf.startswith(f'{folder}/')}
    assert set(re.findall(r'\(([^()/]+\.py)\)', readme)) == {Path(leaf).name for leaf in here}
    if folder in NOT_PUBLISHED:
        return
    assert 'Not trained by us' in readme
    models = yaml.safe_load((CONFIGS / folder / 'metafile.yml').read_text())['Models']
    assert {model['Config'] for model in models} == {f'configs/{leaf}' for leaf in here}
    assert f'configs/{folder}/metafile.yml' in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
