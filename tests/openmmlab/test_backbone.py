"""The registered backbones: presets, counts, freezing, initialisation, and their place in OpenMMLab."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS as ROOT
from mmengine.runner import load_checkpoint
from support.oracles import SMALL, mmdet_twin, randomise, relative_error
from torch import nn

import swin_mm
from swin_mm.checkpoints import CheckpointError
from swin_mm.openmmlab.loading import require_complete_backbones

BOTH = pytest.mark.parametrize('backbone', [swin_mm.SwinTransformer, swin_mm.SwinTransformerV2])

# arch, window, version: parameters without output norms, with norm0..3, with norm1..3
COUNTS = {
    ('t', 7, 1): (27_517_818, 27_520_698, 27_520_506),
    ('s', 7, 1): (48_835_722, 48_838_602, 48_838_410),
    ('b', 7, 1): (86_741_176, 86_745_016, 86_744_760),
    ('b', 12, 1): (86_876_536, 86_880_376, 86_880_120),
    ('l', 7, 1): (194_992_404, 194_998_164, 194_997_780),
    ('l', 12, 1): (195_195_444, 195_201_204, 195_200_820),
    ('t', 8, 2): (27_576_618, 27_579_498, 27_579_306),
    ('s', 16, 2): (48_957_882, 48_960_762, 48_960_570),
    ('b', 8, 2): (86_891_768, 86_895_608, 86_895_352),
    ('l', 24, 2): (195_199_860, 195_205_620, 195_205_236),
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('arch, window, version', COUNTS)
def test_parameter_counts_are_the_published_ones(arch, window, version):
    backbone = (swin_mm.SwinTransformer, swin_mm.SwinTransformerV2)[version - 1]
    bare, four, three = COUNTS[arch, window, version]
    with torch.device('meta'):
        model = backbone(arch=arch, window_size=window)
        assert count(model) == four
        assert count(model) - sum(count(getattr(model, f'norm{i}')) for i in range(4)) == bare
        assert count(backbone(arch=arch, window_size=window, out_indices=(1, 2, 3))) == three


@BOTH
def test_maps_of_a_224_image(backbone):
    with torch.no_grad():
        maps = backbone().eval()(torch.rand(1, 3, 224, 224))
    assert isinstance(maps, tuple)
    assert [m.shape[1:] for m in maps] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]
    assert all(m.is_contiguous() for m in maps)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', None])
@BOTH
def test_builds_by_scoped_name_from_every_library(backbone, scope):
    registry = {'mmdet': 'mmdet.registry', 'mmseg': 'mmseg.registry'}.get(scope)
    models = __import__(registry, fromlist=['MODELS']).MODELS if registry else ROOT
    model = models.build({'type': f'swin_mm.{backbone.__name__}', **SMALL})
    assert type(model) is backbone


def test_builds_from_a_new_style_config(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("from swin_mm import SwinTransformer\nbackbone = dict(type=SwinTransformer, arch='s')\n")
    model = ROOT.build(Config.fromfile(config).backbone)
    assert type(model) is swin_mm.SwinTransformer
    assert len(model.layers[2].blocks) == 18


def test_explicit_sizes_override_the_arch():
    model = swin_mm.SwinTransformer(arch='b', depths=(1, 1, 1, 1))
    assert (model.num_features, len(model.layers[2].blocks)) == ([128, 256, 512, 1024], 1)


@pytest.mark.parametrize('size', [224, (224,), (224, 224), [224, 224]])
def test_pretrain_img_size_in_every_spelling(size):
    model = swin_mm.SwinTransformer(**SMALL, use_abs_pos_embed=True, pretrain_img_size=size)
    assert model.absolute_pos_embed.shape == (1, 32, 56, 56)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
@pytest.mark.parametrize('with_cp', [False, True])
@BOTH
def test_stages_are_frozen_at_construction_and_stay_frozen(backbone, frozen_stages, with_cp):
    model = backbone(
        **(SMALL | {'drop_path_rate': 0.5, 'drop_rate': 0.5}),
        frozen_stages=frozen_stages,
        out_indices=(0, 2, 3),
        with_cp=with_cp,
        use_abs_pos_embed=True,
    )
    prefixes = {0: ('patch_embed.', 'absolute_pos_embed'), 1: ('layers.0.', 'norm0.'), 2: ('layers.1.', 'norm1.')}
    prefixes |= {3: ('layers.2.', 'norm2.'), 4: ('layers.3.', 'norm3.')}
    frozen = tuple(p for stage in range(frozen_stages + 1) for p in prefixes[stage]) or ('none',)

    def check():
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (not name.startswith(frozen)), name

    check()
    assert model.train() is model
    assert model.eval() is model
    model.train()
    check()
    for name, module in model.named_modules():
        if name and name not in ('layers', 'pos_drop'):
            assert module.training == (not (name + '.').startswith(frozen)), name
    if frozen_stages < 4:
        randomise(model)
        sum((m * torch.rand_like(m)).sum() for m in model(torch.rand(8, 3, 32, 64))).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == name.startswith(frozen), name


@BOTH
def test_checkpointing_changes_nothing_but_memory(backbone):
    images = torch.rand(2, 3, 64, 96)
    gradients, kept = [], []
    for with_cp in (False, True):
        model = randomise(backbone(**(SMALL | {'drop_path_rate': 0.3}), with_cp=with_cp, frozen_stages=1)).train()
        torch.manual_seed(3)  # the same samples are dropped, in the recomputation too
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.nbytes) or t, lambda t: t):
            maps = model(images)
        sum((m * m).sum() for m in maps).backward()
        kept.append(sum(saved))
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert relative_error(gradients[1], gradients[0]) < 1e-6
    assert kept[1] < kept[0] / 3


def save(path, content):
    torch.save(content, path)
    return {'type': 'Pretrained', 'checkpoint': str(path)}


def test_init_cfg_loads_mmdet_weights_exactly(tmp_path):
    theirs, _ = mmdet_twin(**SMALL)
    init_cfg = save(tmp_path / 'det.pth', {'state_dict': {f'backbone.{k}': v for k, v in theirs.state_dict().items()}})
    image = torch.rand(1, 3, 50, 61)
    for options in ({'init_cfg': init_cfg}, {'pretrained': init_cfg['checkpoint']}, {'init_cfg': [init_cfg]}):
        ours = swin_mm.SwinTransformer(**SMALL, **options).eval()
        ours.init_weights()
        with torch.no_grad():
            assert relative_error(ours(image), theirs(image)) < 1e-5
    assert ours.is_init


def test_bias_tables_of_another_window_are_resized_as_mmdet_does(tmp_path):
    source, _ = mmdet_twin(**SMALL)
    state = {f'backbone.{name}': p.detach() for name, p in source.named_parameters()}
    file = save(tmp_path / 'w7.pth', {'state_dict': state})
    theirs, _ = mmdet_twin(**SMALL, window_size=12)
    theirs.init_cfg = Config(file)
    theirs.init_weights()
    ours = swin_mm.SwinTransformer(**SMALL, window_size=12, init_cfg=file)
    ours.init_weights()
    image = torch.rand(1, 3, 100, 61)
    with torch.no_grad():
        assert relative_error(ours.eval()(image), theirs(image)) < 1e-5


def test_init_cfg_that_fails_never_leaves_random_weights(tmp_path):
    files = {
        'resnet.pth': ({'conv1.weight': torch.rand(3)}, 'nothing in the checkpoint fits.*conv1.weight'),
        'text.pth': (None, 'is not a checkpoint: it begins with'),
        'empty.pth': ({}, 'no state dict'),
        'base.pth': (
            swin_mm.SwinTransformer(**(SMALL | {'embed_dims': 64})).state_dict(),
            'embed_dims=64.*embed_dims=32',
        ),
        'part.pth': ({'patch_embed.proj.weight': torch.rand(32, 3, 4, 4)}, 'patch_embed.proj.bias is missing'),
        'deep.pth': (
            swin_mm.SwinTransformer(**(SMALL | {'depths': (2, 2, 4, 2)})).state_dict(),
            'depths=.2, 2, 4, 2.*blocks.2.norm1.weight is not in the model',
        ),
    }
    for name, (content, message) in files.items():
        if content is None:
            (tmp_path / name).write_text('not a checkpoint')
            init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / name)}
        else:
            init_cfg = save(tmp_path / name, content)
        model = swin_mm.SwinTransformer(**SMALL, init_cfg=init_cfg)
        with pytest.raises(CheckpointError, match=f'(?s){name}.*{message}'):
            model.init_weights()
        assert not model.is_init


def test_init_cfg_prefix_picks_one_of_several_backbones(tmp_path):
    states = {name: swin_mm.SwinTransformer(**SMALL).state_dict() for name in ('teacher', 'student')}
    file = save(tmp_path / 'two.pth', {f'{n}.backbone.{k}': v for n, state in states.items() for k, v in state.items()})
    with pytest.raises(CheckpointError, match='several backbones.*prefix'):
        swin_mm.SwinTransformer(**SMALL, init_cfg=file).init_weights()
    model = swin_mm.SwinTransformer(**SMALL, init_cfg=file | {'prefix': 'student.backbone'})
    model.init_weights()
    assert all(torch.equal(v, states['student'][k]) for k, v in model.state_dict().items())


def test_other_initialisers_still_work():
    model = swin_mm.SwinTransformer(**SMALL, init_cfg={'type': 'Constant', 'layer': 'Linear', 'val': 0.5})
    model.init_weights()
    assert (model.layers[1].blocks[0].mlp.fc1.weight == 0.5).all()
    assert model.init_cfg['type'] == 'Constant'


class Detector(nn.Module):
    """A backbone with something after it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = swin_mm.SwinTransformer(**SMALL)
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize('loader', ['torch', 'mmengine'])
def test_detector_checkpoints_load_with_the_backbone_inside(tmp_path, loader):
    theirs, _ = mmdet_twin(**SMALL)
    model = Detector()
    state = {f'backbone.{k}': v for k, v in theirs.state_dict().items()} | {'head.weight': torch.eye(2)}
    state |= {'head.bias': torch.ones(2)}
    before = dict(state)
    if loader == 'torch':
        model.load_state_dict(state)
    else:
        torch.save({'state_dict': state}, tmp_path / 'd.pth')
        load_checkpoint(model, str(tmp_path / 'd.pth'), strict=True)
    image = torch.rand(1, 3, 50, 61)
    with torch.no_grad():
        assert relative_error(model.backbone.eval()(image), theirs(image)) < 1e-5
    assert torch.equal(model.head.weight, torch.eye(2))
    assert state.keys() == before.keys()


def test_partial_backbone_checkpoints_are_reported(tmp_path):
    """torch raises, and mmengine's loader, which lets anything pass, leaves a report for CompleteBackboneHook."""
    whole = {k: v for k, v in Detector().state_dict().items() if k != 'backbone.layers.2.blocks.1.mlp.fc1.bias'}
    backbone = {k.removeprefix('backbone.'): v for k, v in whole.items()}
    for state, message in ((whole, 'fc1.bias is missing'), (backbone, "begins with 'backbone.'")):
        model = Detector()
        with pytest.raises(RuntimeError, match=r'Missing key.*"backbone.layers.2.blocks.1.mlp.fc1.bias"'):
            model.load_state_dict(state)
        result = model.load_state_dict(state, strict=False)
        assert 'backbone.layers.2.blocks.1.mlp.fc1.bias' in result.missing_keys
        model = Detector()
        load_checkpoint(model, state_file(state, tmp_path))
        assert message in model.backbone.load_report.problem
        with pytest.raises(CheckpointError, match=message):
            require_complete_backbones(model)
        model.backbone.strict = False
        require_complete_backbones(model)
    assert torch.equal(model.head.bias, whole['head.bias'])


def state_file(state: dict, tmp_path) -> str:
    torch.save({'state_dict': state}, tmp_path / 'd.pth')
    return str(tmp_path / 'd.pth')


@BOTH
def test_init_cfg_loads_part_of_a_backbone_with_strict_false(backbone, tmp_path):
    state = randomise(backbone(**SMALL)).state_dict()
    del state['layers.0.blocks.0.norm1.weight']
    file = save(tmp_path / 'part.pth', state)
    with pytest.raises(CheckpointError, match='part.pth: .*norm1.weight is missing.*strict=False'):
        backbone(**SMALL, init_cfg=file).init_weights()
    model = backbone(**SMALL, init_cfg=file, strict=False)
    model.init_weights()
    assert model.load_report.missing == ['layers.0.blocks.0.norm1.weight']
    assert torch.equal(model.patch_embed.proj.weight, state['patch_embed.proj.weight'])


@BOTH
def test_copies_load_independently(backbone):
    """Copies, as moving averages make them, convert and keep their own weights."""
    model = randomise(backbone(**SMALL))
    average = ExponentialMovingAverage(model)
    average.load_state_dict(average.state_dict())
    twin = copy.deepcopy(model)
    other = randomise(backbone(**SMALL), seed=5)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin.patch_embed.proj.weight, other.patch_embed.proj.weight)
    assert not torch.equal(model.patch_embed.proj.weight, other.patch_embed.proj.weight)
