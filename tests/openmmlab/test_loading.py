"""A checkpoint must cover the whole model, and a resumed run needs a whole training checkpoint."""

import copy

import pytest
import torch
from support.oracles import SMALL, mmdet_twin, randomise
from torch import nn

import swin_mm
from swin_mm.checkpoints import CheckpointError
from swin_mm.openmmlab.loading import (
    require_complete,
    require_complete_backbones,
    require_training_checkpoint,
)


class Segmentor(nn.Module):
    """A backbone with a head that has a BatchNorm."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.backbone = swin_mm.SwinTransformer(**(SMALL | options))
        self.decode_head = nn.Sequential(nn.Conv2d(256, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))


@pytest.fixture(scope='module')
def model() -> Segmentor:
    return Segmentor()


def state(model: nn.Module) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def renamed(old: str, new: str, state: dict) -> dict:
    return {key.replace(old, new): value for key, value in state.items()}


def test_whole_checkpoints_pass_and_the_model_is_not_changed(model):
    before = state(model)
    other = state(randomise(Segmentor()))
    require_complete(model, other, 'a.pth')
    require_complete(model, {f'module.{key}': value for key, value in other.items()}, 'a.pth')
    require_complete(nn.parallel.DataParallel(model), other, 'a.pth')
    # mmdet's naming, another window, no counters of batches, parts that the model does not have.
    theirs = mmdet_twin(**SMALL, window_size=12)[0].state_dict()
    mixed = {f'backbone.{key}': value for key, value in theirs.items()}
    mixed |= {key: value for key, value in other.items() if key.startswith('decode_head')}
    mixed = {key: value for key, value in mixed.items() if 'num_batches' not in key} | {
        'auxiliary_head.w': torch.ones(1)
    }
    require_complete(model, mixed, 'a.pth')
    assert model.backbone.load_report is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not parameter.is_meta for parameter in model.parameters())


BAD = {
    'no head': (
        lambda s: {key: value for key, value in s.items() if 'decode_head' not in key},
        r'decode_head.0.weight, decode_head.0.bias, decode_head.1.weight \(and 5 more\) missing',
    ),
    'renamed head': (
        lambda s: renamed('decode_head', 'segmentation_head', s),
        r'decode_head.0.weight.* missing; segmentation_head.0.weight.* not in the model',
    ),
    'head of other classes': (
        lambda s: s | {'decode_head.2.weight': torch.ones(5, 8, 1, 1), 'decode_head.2.bias': torch.ones(5)},
        r'decode_head.2.weight is \(5, 8, 1, 1\), the model has \(2, 8, 1, 1\), decode_head.2.bias is \(5\)',
    ),
    'shape and key': (
        lambda s: {k: v for k, v in s.items() if k != 'decode_head.1.bias'} | {'decode_head.2.bias': torch.ones(5)},
        r'decode_head.1.bias missing; decode_head.2.bias is \(5\)',
    ),
    'no statistics': (
        lambda s: {key: value for key, value in s.items() if 'running_var' not in key},
        'decode_head.1.running_var missing',
    ),
    'part of the backbone': (
        lambda s: {key: value for key, value in s.items() if key != 'backbone.norm2.weight'},
        'does not fit backbone: .* norm2.weight is missing',
    ),
    'backbone at the top': (
        lambda s: renamed('backbone.', '', s),
        "does not fit backbone: no key of the checkpoint begins with 'backbone.'",
    ),
    'no backbone': (
        lambda s: {key: value for key, value in s.items() if 'decode_head' in key},
        "does not fit backbone: no key of the checkpoint begins with 'backbone.'",
    ),
    'another backbone': (lambda s: renamed('layers', 'stem', s), 'nothing in the checkpoint fits'),
    'a wider backbone': (
        lambda s: (
            s
            | {
                f'backbone.{k}': v
                for k, v in swin_mm.SwinTransformer(**(SMALL | {'embed_dims': 64})).state_dict().items()
            }
        ),
        'is of a Swin V1 with embed_dims=64',
    ),
    'a deeper backbone': (
        lambda s: s | {k: v for k, v in Segmentor(depths=(2, 2, 4, 2)).state_dict().items() if 'backbone' in k},
        r'is of a Swin V1 with .*depths=\(2, 2, 4, 2\).* layers.2.blocks.2.norm1.weight is not in the model',
    ),
    'backbone shapes': (
        lambda s: s | {'backbone.layers.1.blocks.0.mlp.fc2.bias': torch.ones(3)},
        r'layers.1.blocks.0.mlp.fc2.bias is \(3,\), the model has \(64,\)',
    ),
}


@pytest.mark.parametrize('kind', BAD)
def test_what_a_checkpoint_lacks_is_named(model, kind):
    change, message = BAD[kind]
    with pytest.raises(CheckpointError, match=message) as caught:
        require_complete(model, change(state(model)), 'a.pth')
    text = str(caught.value)
    assert text.startswith('checkpoint a.pth ') and '\n' not in text and len(text) < 1000


def training_checkpoint() -> dict:
    """As mmengine's Runner saves it."""
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        'meta': {'epoch': 1, 'iter': 10, 'seed': 3, 'experiment_name': 'x', 'dataset_meta': {'classes': ('a',)}},
        'state_dict': net.state_dict(),
        'message_hub': {'log_scalars': {}, 'runtime_info': {}, 'resumed_keys': {}},
        'optimizer': optimizer.state_dict(),
        'param_schedulers': [{'last_step': 10, '_global_step': 11}],
    }


def test_training_checkpoints_pass():
    content = training_checkpoint()
    require_training_checkpoint(content, 'a.pth')
    content['meta']['seed'] = None
    content['optimizer'] = {'generator': content['optimizer'], 'critic': content['optimizer']}
    content['param_schedulers'] = {'generator': content['param_schedulers'], 'critic': []}
    require_training_checkpoint(content, 'a.pth')
    del content['param_schedulers']
    require_training_checkpoint(content, 'a.pth')


MALFORMED = {
    'expected a dictionary, found list': lambda c: [c],
    'it has no meta, optimizer': lambda c: {k: v for k, v in c.items() if k not in ('meta', 'optimizer')},
    'meta is of type list': lambda c: c | {'meta': []},
    'meta is missing': lambda c: c | {'meta': None},
    'meta has no iter': lambda c: c | {'meta': {'epoch': 1}},
    "meta.iter is 'ten', expected a whole number": lambda c: c | {'meta': {'epoch': 1, 'iter': 'ten'}},
    'meta.epoch is -1': lambda c: c | {'meta': {'epoch': -1, 'iter': 1}},
    'meta.epoch is True': lambda c: c | {'meta': {'epoch': True, 'iter': 1}},
    'meta.seed is 0.5': lambda c: c | {'meta': c['meta'] | {'seed': 0.5}},
    'message_hub is of type str': lambda c: c | {'message_hub': 'hub'},
    'message_hub.resumed_keys is missing': lambda c: c | {'message_hub': {'log_scalars': {}, 'runtime_info': {}}},
    'message_hub.log_scalars is of type list': lambda c: c | {'message_hub': c['message_hub'] | {'log_scalars': []}},
    'state_dict is of type Tensor': lambda c: c | {'state_dict': torch.ones(2)},
    'state_dict holds no tensors': lambda c: c | {'state_dict': {'a': 1}},
    'state_dict has keys that are not strings': lambda c: c | {'state_dict': {1: torch.ones(1)}},
    'optimizer is of type list': lambda c: c | {'optimizer': []},
    'optimizer.state is missing': lambda c: c | {'optimizer': {'param_groups': [{'params': [0]}]}},
    'optimizer is empty': lambda c: c | {'optimizer': {}},
    'optimizer.param_groups is of type dict': lambda c: c | {'optimizer': c['optimizer'] | {'param_groups': {}}},
    'a group without its list of params': lambda c: c | {'optimizer': c['optimizer'] | {'param_groups': [{'lr': 1}]}},
    'optimizer.state has entries': lambda c: c | {'optimizer': c['optimizer'] | {'state': {0: 1}}},
    'optimizer.critic.state is missing': lambda c: c | {'optimizer': {'critic': {}}},
    'param_schedulers is of type int': lambda c: c | {'param_schedulers': 3},
    r'param_schedulers\[0\].last_step is None': lambda c: c | {'param_schedulers': [{}]},
}


@pytest.mark.parametrize('message', MALFORMED)
def test_malformed_training_checkpoints_are_named(message):
    with pytest.raises(CheckpointError, match=message) as caught:
        require_training_checkpoint(MALFORMED[message](training_checkpoint()), 'a.pth')
    text = str(caught.value)
    assert text.startswith('checkpoint a.pth cannot be resumed: ')
    assert 'load_from=CHECKPOINT' in text and '\n' not in text


def test_a_backbone_that_was_loaded_in_part_stops_the_run(model):
    model = copy.deepcopy(model)
    require_complete_backbones(model)  # from random weights
    part = {key: value for key, value in state(model).items() if key != 'backbone.layers.1.blocks.0.norm1.bias'}
    model.load_state_dict(part, strict=False)
    with pytest.raises(CheckpointError, match='backbone was not loaded completely: .*norm1.bias is missing'):
        require_complete_backbones(model)
    model.backbone.strict = False
    require_complete_backbones(model)
    model.backbone.strict = True
    model.load_state_dict(state(model))
    require_complete_backbones(model)
    model.load_state_dict({key: value for key, value in part.items() if 'head' in key}, strict=False)
    with pytest.raises(CheckpointError, match="no key of the checkpoint begins with 'backbone.'.*init_cfg"):
        require_complete_backbones(model)
