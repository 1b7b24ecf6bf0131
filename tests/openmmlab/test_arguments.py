"""Every argument set is mmdet's, an extension of ours that works, or a clear error. mmdet's backbone is the oracle."""

import collections
import copy
import inspect
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from support.oracles import randomise, relative_error
from torch import nn

import swin_mm
from swin_mm.checkpoints import CheckpointError

SMALL = {
    'embed_dims': 4,
    'depths': (1, 2),
    'num_heads': (1, 2),
    'strides': (4, 2),
    'out_indices': (0, 1),
    'window_size': 3,
    'drop_path_rate': 0.0,
    'pretrain_img_size': (20, 24),
}
IMAGE = torch.rand(2, 1, 20, 24, generator=torch.Generator().manual_seed(0))
NAN, INF = float('nan'), float('inf')


class Plain:
    def __repr__(self) -> str:
        return 'Plain()'


# Given to every argument.
ANYTHING = [
    *(None, True, False, 0, 1, -1, 2, 7, 10**12, 0.0, 0.5, 1.0, -0.5, NAN, INF, 1j),
    *('', 'False', 'True', '3', 'auto', b'x', (), [], {}, (1,), (2, 2), (-1, 2), (1.5, 2), ('1', '2'), [None, None]),
    *(np.int64(2), np.float32(0.25), np.bool_(True), np.array([1, 2]), torch.tensor(1), torch.tensor([1.0, 2.0])),
    *({'type': 'ReLU'}, {'type': 'Nothing'}, {'a': 1}, Plain(), Plain, range(2), {0, 1}),
]

# Given to one argument each: what people write, and what comes close to it.
SPECIFIC: dict[str, list[Any]] = {
    'pretrain_img_size': [224, (224,), [224, 224], (20, 24, 28), np.array([20, 24]), 3],
    'in_channels': [3, 4, np.int32(3), 3.0],
    'embed_dims': [3, 8, np.int64(8), 4.0, (4, 8), 'tiny'],
    'patch_size': [4, (4, 4), [4, 4], np.int64(4), (4, 2), (4, 4, 4), 4.0],
    'window_size': [(3, 3), [3, 2], (7, 0), ((3, 2), 4), [(2, 2), (3, 1)], (3, 3, 3), np.array([[2, 3], [4, 5]]), 3.0],
    'mlp_ratio': [4, 4.0, 1.5, np.int64(2), np.float64(2.0), '4', (4, 4)],
    'depths': [(0, 1), (1, 0), [1, 1], np.array([2, 1]), (1, 1, 1), (1, -1), (1, 10**9), (1.0, 1), '11'],
    'num_heads': [(2, 4), [2, 2], (1, 3), (0, 1), (1,), (1, 2, 4), (1, 2, 0), np.array([2, 4]), (1.0, 2.0), '12'],
    'strides': [(4, 1), (4, 3), [4, 2], (4, 2, 2), (4, 0), (0, 2), (2, 2), ((4, 4), 2), (4, (2, 2)), (4, None), '42'],
    'out_indices': [(0,), (1,), [0, 1], (1, 0), (0, 0), (0, 2), (-1,), 0, '01', {1}, np.array([1]), (1.0,)],
    'qkv_bias': [np.bool_(False), 'yes'],
    'qk_scale': [0.1, np.float64(0.1), '0.1'],
    'patch_norm': [np.bool_(False), 'no'],
    'drop_rate': [0.1, 0.999, 1.0001, '0.1', [0.1]],
    'attn_drop_rate': [0.1, 1e-9, -1e-9, np.float64(0.1)],
    'drop_path_rate': [0.1, 0.99, [0.1, 0.2], (0.1, 0.2)],
    'use_abs_pos_embed': [np.bool_(True), 'no'],
    'act_cfg': [
        *('GELU', ['GELU'], {'type': 'GELU'}, {'type': 'PReLU'}, {'type': 'PReLU', 'num_parameters': 16}),
        *({'type': 'GELU', 'approximate': 'tanh'}, {'type': 'GELU', 'approximate': 'no'}, {'type': 'gelu'}),
        *({'type': 'ReLU', 'inplace': True}, {'type': nn.SiLU}, {'type': nn.GELU, 'inplace': True}, {'type': nn.GLU}),
        *({'type': 'LN'}, {'type': 'HSwish'}, {'type': 'LeakyReLU', 'negative_slope': 0.2}, {'type': None}, nn.GELU),
        *({'type': 'Clip', 'min': -1, 'max': 1}, {'type': 'SwinTransformer'}, ConfigDict(type='ELU'), {'type': 3}),
    ],
    'norm_cfg': [
        *('LN', {'type': 'LN'}, {'type': 'LN', 'eps': 1e-3}, {'type': 'LN', 'eps': NAN}, {'type': 'LN', 'eps': '1e-5'}),
        *({'type': 'LN', 'eps': -1}, {'type': 'LN', 'requires_grad': False}, {'type': 'LN', 'requires_grad': 'False'}),
        *({'type': 'BN'}, {'type': 'BN1d'}, {'type': 'SyncBN'}, {'type': 'GN', 'num_groups': 2}, {'type': 'GN'}),
        *({'type': 'IN'}, {'type': 'IN1d'}, {'type': nn.LayerNorm}, {'type': nn.RMSNorm}, {'type': nn.BatchNorm2d}),
        *({'type': 'LN', 'elementwise_affine': False}, {'type': 'LN', 'epsilon': 1}, {'type': 'ln'}, nn.LayerNorm),
        *({'type': nn.Identity}, ConfigDict(type='LN', eps=1e-6), {'type': nn.Linear}, {'type': 'LN', 'bias': False}),
    ],
    'with_cp': [np.bool_(False), 'mlp', (True, False), [0, 1], (True,), ('yes', 'no')],
    'convert_weights': ['yes'],
    'frozen_stages': [-2, 3, np.int64(1), 1.0],
    'pretrained': [123, 'none.pth', Path('none.pth'), ['none.pth']],
    'init_cfg': [
        *('none.pth', {'type': 'Pretrained'}, {'type': 'Pretrained', 'checkpoint': None}, {'checkpoint': ''}),
        *({'type': 'Pretrained', 'checkpoint': 3}, {'type': 'Pretrained', 'checkpoint': ''}, ['none.pth'], [{}]),
        *({'type': 'Pretraind', 'checkpoint': 'none.pth'}, {'type': 'Pretrained', 'checkpoint': 'n.pth', 'prefx': 'a'}),
        *({'type': 'Constant', 'layer': 'Linear', 'val': 0.5}, {'type': 'Constant'}, {'type': 'Kaiming', 'layr': 'C'}),
        *([{'type': 'Constant', 'layer': 'Linear', 'val': 0.5}], {'type': 'TruncNormal', 'layer': 'Linear', 'std': 1}),
        {'type': 'Constant', 'layer': 'Linear', 'val': 1, 'override': {'name': 'norm0', 'val': 2}},
        *({'type': 'Pretrained', 'checkpoint': 'n.pth', 'prefix': 3}, {'type': 'Constant', 'layer': 3, 'val': 0.5}),
    ],
    # ours alone
    'arch': ['t', 's', 'T', 'tiny', ['t']],
    'pad_small_map': [np.bool_(False), 'no'],
    'attention': ['reference', 'sdpa', 'fast', ['auto']],
    'strict': [np.bool_(False), 'no'],
    'compile': [{'mod': 'default'}, {'mode': 'fastest'}, {'backend': 'none'}, 'default'],
    'windowsize': [7],
    'embed_dim': [96],
    'use_checkpoint': [True],
}


UNKNOWN = ('windowsize', 'embed_dim', 'use_checkpoint')

# What mmdet takes, without meaning to, and ours rejects: booleans and strings by their truth, and the following.
REJECTED = {
    'strides': [(4, 0), (4, None)],  # mmdet takes 2
    'out_indices': [{1}, (1, 0)],  # mmdet's maps are ascending, whatever was asked for
    'norm_cfg': [{'type': 'IN'}, {'type': 'IN1d'}],  # mmdet normalises over pixels, or over channels without weights
    'drop_rate': [1],
    'attn_drop_rate': [1],
    'init_cfg': [0, False],
    'pretrained': [],
}
FLAGS = ('qkv_bias', 'patch_norm', 'use_abs_pos_embed', 'with_cp', 'convert_weights')


def cross_product() -> list[dict[str, Any]]:
    """Every argument with every value of ANYTHING."""
    # None is the arch's size, which does not fit the others of SMALL; compiling takes long.
    skipped = {'embed_dims': [None], 'depths': [None], 'num_heads': [None], 'compile': [True, 1, 1.0, np.bool_(True)]}
    return [
        {name: value}
        for name in SPECIFIC
        if name not in UNKNOWN
        for value in ANYTHING
        if not any(value is none for none in skipped.get(name, ()))
        and not (name == 'compile' and isinstance(value, int | float | np.generic | torch.Tensor))
    ]


def specific_sets() -> list[dict[str, Any]]:
    """Every argument with its own values, then random sets of two to four arguments."""
    single = [{name: value} for name, values in SPECIFIC.items() for value in values]
    chance = random.Random(12)
    names = [name for name in SPECIFIC if name not in (*UNKNOWN, 'compile')]
    several = []
    for size in itertools.islice(itertools.cycle((2, 3, 4)), 300):
        options = {
            name: chance.choice(SPECIFIC[name] * 2 + [True, False, 0, 1, -1]) for name in chance.sample(names, size)
        }
        several.append(options)
    return single + several


def channels(model: nn.Module) -> int:
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels


def images(model: nn.Module) -> torch.Tensor:
    return IMAGE.expand(-1, channels(model), -1, -1)


def works(model: nn.Module, outputs: int) -> bool:
    """Whether a model gives finite maps, in training with a backward pass and in evaluation."""
    for training in (True, False):
        model.train(training)
        maps = model(images(model))
        if len(maps) != outputs or not all(m.isfinite().all() for m in maps):
            return False
        loss = sum(m.sum() for m in maps)
        if training and loss.requires_grad:
            loss.backward()
    return True


def mmdet_model(options: dict[str, Any]) -> nn.Module | None:
    """mmdet's backbone in evaluation, if it works with these arguments."""
    if '1000000000' in str(options) or set(options) - set(inspect.signature(MMDetSwin).parameters):
        return None  # larger than the memory, or not mmdet's
    try:
        model = randomise(MMDetSwin(**(SMALL | options)))
        if options.get('init_cfg') or options.get('pretrained'):
            model.init_weights()
        works_ = works(model, len(options.get('out_indices', (0, 1))))
    except Exception:
        return None
    model.eval()  # returns None
    return model if works_ else None


def names_the_argument(message: str, options: dict[str, Any]) -> bool:
    """Whether a message has the name and value of an argument in the form ``name=value``."""
    for name, value in options.items():
        plain = value.item() if isinstance(value, np.generic) else value
        for text in (repr(value), repr(plain)):
            if f'{name}={" ".join(text.split())[:60]}' in message:
                return True
    return False


def outcome(options: dict[str, Any], theirs: nn.Module | None = None) -> tuple[str, str]:
    """What ours does with these arguments: one of CLEAR, or what is wrong with it."""
    try:
        ours = swin_mm.SwinTransformer(**(SMALL | options))
    except (ValueError, TypeError) as error:
        clear = names_the_argument(str(error), options) and (': expected ' in str(error) or 'no such' in str(error))
        return ('rejected' if clear else 'unclear'), f'{type(error).__name__}: {error}'
    except Exception as error:
        return 'unclear', f'{type(error).__name__}: {error}'
    try:
        if theirs is None:
            ours.init_weights()
            return ('works' if works(ours, len(ours.out_indices)) else 'not finite'), ''
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            error = relative_error(ours.eval()(images(ours)), theirs(images(ours)))
        return ('equals mmdet' if error < 1e-5 else 'differs from mmdet'), f'{error:.1e}'
    except CheckpointError as error:
        known = 'No such file' in str(error) or 'not found' in str(error) or 'does not exist' in str(error)
        return ('no such checkpoint' if known else 'fails'), str(error)
    except Exception as error:
        return 'fails', f'{type(error).__name__}: {error}'


CLEAR = ('equals mmdet', 'works', 'rejected', 'no such checkpoint')


def report(results: list[tuple[dict[str, Any], str, str]]) -> tuple[collections.Counter, list[str]]:
    """Counts of outcomes, and the sets whose outcome is not clear."""
    counts = collections.Counter(kind for _, kind, _ in results)
    return counts, [f'{options}: {kind}: {detail[:200]}' for options, kind, detail in results if kind not in CLEAR]


def is_rejected_on_purpose(name: str, value: Any) -> bool:
    truth = isinstance(value, bool | np.bool_)
    if name in FLAGS:
        return not truth and not (isinstance(value, int | float) and value in (0, 1))
    # mmdet does not read the size without a position embedding
    return truth or name == 'pretrain_img_size' or any(value == other for other in REJECTED.get(name, ()))


@pytest.mark.filterwarnings('ignore')
def test_every_argument_with_every_kind_of_value_works_or_is_rejected_by_name():
    sets = cross_product()
    assert len(sets) > 900
    counts, bad = report([(options, *outcome(options)) for options in sets])
    assert not bad, '\n'.join(bad)
    assert counts['rejected'] > 700 and counts['works'] > 100


@pytest.mark.filterwarnings('ignore')
def test_arguments_that_mmdet_accepts_give_equal_outputs_and_others_are_rejected_by_name():
    sets = specific_sets()
    assert len(sets) > 450
    results = []
    for options in sets:
        theirs = mmdet_model(options)
        kind, detail = outcome(options, theirs)
        if kind == 'rejected' and theirs is not None and not any(is_rejected_on_purpose(*o) for o in options.items()):
            kind = 'rejected although mmdet takes it'
        results.append((options, kind, detail))
    counts, bad = report(results)
    assert not bad, '\n'.join(bad)
    assert counts['rejected'] > 250 and counts['equals mmdet'] > 80 and counts['works'] > 30


@pytest.mark.parametrize(
    'options, error, message',
    [
        ({'drop_rate': NAN}, ValueError, 'drop_rate=nan: expected a number from 0 to 1 (1 excluded)'),
        ({'pretrained': 123}, TypeError, 'pretrained=123: expected the path or address of a checkpoint, or None'),
        ({'init_cfg': 'x.pth'}, TypeError, "init_cfg='x.pth': expected None, {'type': 'Pretrained', 'checkpoint'"),
        ({'init_cfg': {'type': 'Pretrained'}}, ValueError, "init_cfg={'type': 'Pretrained'}: expected None"),
        ({'windowsize': 7}, TypeError, 'windowsize=7: SwinTransformer has no such argument; did you mean window_size?'),
        (
            {'norm_cfg': {'type': 'BN'}},
            ValueError,
            "norm_cfg={'type': 'BN'}: expected a dict of a norm over the channels",
        ),
        ({'arch': 'xl'}, ValueError, "arch='xl': expected one of 't', 's', 'b', 'l'"),
        ({'frozen_stages': 5}, ValueError, 'frozen_stages=5: expected an integer from -1 (none) to 4 (all stages)'),
    ],
)
def test_messages_are_kept_when_built_through_the_registry(options, error, message):
    with pytest.raises(error) as caught:
        MODELS.build({'type': 'swin_mm.SwinTransformer', **options})
    assert message in str(caught.value)


def test_pretrained_and_init_cfg_exclude_each_other():
    with pytest.raises(ValueError, match=r"pretrained='a.pth', init_cfg=\{.*\}: expected only init_cfg"):
        swin_mm.SwinTransformer(pretrained='a.pth', init_cfg={'type': 'Pretrained', 'checkpoint': 'b.pth'})


@pytest.mark.parametrize('backbone', [swin_mm.SwinTransformer, swin_mm.SwinTransformerV2])
def test_norms_without_weights(backbone):
    """V2 starts with the weights of its norms at zero, if they have any."""
    model = backbone(**SMALL, norm_cfg={'type': 'LN', 'elementwise_affine': False})
    assert works(model, 2)


def test_the_config_is_not_changed():
    init_cfg = [
        ConfigDict(type='Constant', layer='Linear', val=0.5, override={'type': 'Constant', 'name': 'norm0', 'val': 2})
    ]
    before = copy.deepcopy(init_cfg)
    model = swin_mm.SwinTransformer(**SMALL, init_cfg=init_cfg)
    model.init_weights()
    assert init_cfg == before
    assert (model.layers[0].blocks[0].mlp.fc1.weight == 0.5).all() and (model.norm0.weight == 2).all()


@pytest.mark.parametrize('name', [*FLAGS, 'pad_small_map', 'strict', 'compile'])
@pytest.mark.parametrize('value', ['False', 'no', 2, float('nan'), [], torch.rand(2)])
def test_flags_must_be_booleans(name, value):
    with pytest.raises((ValueError, TypeError), match=f'{name}=.*: expected True'):
        swin_mm.SwinTransformer(**SMALL, **{name: value})
