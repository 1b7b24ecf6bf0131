"""Arguments and input of the plain pyramid: converted, or rejected by name before anything is built."""

import re
from unittest import mock

import numpy as np
import pytest
import torch
from support.oracles import SMALL
from torch import nn

from swin_mm.models.arguments import (
    require_bool,
    require_int,
    require_number,
    require_pair,
    require_rate,
    require_windows,
    require_with_cp,
)
from swin_mm.models.swin import SwinPyramid, SwinPyramidV2

BOTH = pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])


@pytest.mark.parametrize('value', [np.int64(3), np.uint8(3), torch.tensor(3), 3])
def test_integers_become_python_ints(value):
    assert type(require_int('depth', value)) is int
    assert require_pair('patch_size', value) == (3, 3)
    assert require_windows('window_size', [value, value], (1, 1, 1)) == ((3, 3),) * 3


@pytest.mark.parametrize('value', [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), 0.5])
def test_rates_become_python_floats(value):
    assert require_rate('drop_rate', value) == require_number('qk_scale', value) == 0.5
    assert type(require_rate('drop_rate', value)) is float


@pytest.mark.parametrize('value', [True, 1, np.bool_(True), np.int64(1)])
def test_flags_become_python_bools(value):
    assert require_bool('with_cp', value) is True
    assert require_with_cp('with_cp', value, 2) == ((True, True), False)
    assert require_with_cp('with_cp', [value, None], 2) == ((True, False), False)


@pytest.mark.parametrize('value', [False, 0, None, np.bool_(False)])
def test_false_values_become_false(value):
    assert require_bool('with_cp', value) is False


@pytest.mark.parametrize(
    'options, message',
    [
        ({'drop_rate': float('nan')}, 'drop_rate=nan: expected a number from 0 to 1 (1 excluded)'),
        ({'drop_rate': 10**400}, 'drop_rate=1000000'),
        ({'mlp_ratio': 10**400}, 'mlp_ratio=1000000'),
        ({'drop_path_rate': 1}, 'drop_path_rate=1: expected a number from 0 to 1 (1 excluded)'),
        ({'qkv_bias': 'False'}, "qkv_bias='False': expected True or False"),
        ({'embed_dims': -96}, 'embed_dims=-96: expected an integer from 1 to 65536'),
        ({'in_channels': True}, 'in_channels=True: expected an integer from 1'),
        ({'depths': (2, 10**9)}, 'depths=(2, 1000000000): expected a sequence of integers from 0 to 1000'),
        ({'strides': (4, 0, 2, 2)}, 'strides=(4, 0, 2, 2): expected an integer from 1 to 1024 for each of 4 stages'),
        ({'strides': (4, (2, 1), 2, 2)}, 'strides=(4, (2, 1), 2, 2): expected the same stride for both axes in all'),
        ({'out_indices': (0, 0)}, 'out_indices=(0, 0): expected ascending stages from 0 to 3, each once'),
        ({'embed_dims': 100}, 'num_heads=(1, 2, 4, 8): expected divisors of the channels (100, 200, 400, 800)'),
        ({'patch_size': 2}, 'patch_size=2: expected the first of strides=(4, 2, 2, 2)'),
        ({'mlp_ratio': 0}, 'mlp_ratio=0: expected at least one hidden channel (embed_dims=32)'),
        ({'use_abs_pos_embed': True, 'pretrain_img_size': 3}, 'pretrain_img_size=3: expected at least a patch'),
        ({'with_cp': (True,) * 5}, 'with_cp=(True, True, True, True, True): expected True or False, one of these for'),
        ({'act': 'gelu'}, "act='gelu': expected a callable"),
        ({'attention': ['auto']}, "attention=['auto']: expected one of 'auto', 'reference'"),
        ({'depths': (1,) * 30, 'num_heads': (1,) * 30, 'strides': (4,) + (1,) * 29}, 'depths=(1, 1, '),
    ],
)
@BOTH
def test_messages_have_name_value_and_expectation(pyramid, options, message):
    options = SMALL | options
    if 'num_heads' in message:
        options['num_heads'] = (3, 6, 12, 24)
        message = message.replace('(1, 2, 4, 8)', '(3, 6, 12, 24)')
    with (
        mock.patch.object(nn, 'Linear', side_effect=AssertionError('built before it was checked')),
        mock.patch.object(nn, 'Conv2d', side_effect=AssertionError('built before it was checked')),
        pytest.raises((ValueError, TypeError), match=re.escape(message)) as error,
    ):
        pyramid(**options)
    assert '\n' not in str(error.value)


def test_long_values_are_cut():
    with pytest.raises(TypeError) as error:
        SwinPyramid(depths=torch.rand(100, 100))
    assert len(str(error.value)) < 400


def test_v2_arguments():
    assert SwinPyramidV2(**SMALL, pretrained_window_sizes=(0,)).layers[0].blocks[0].attn.pretrained_window == (0, 0)
    with pytest.raises(ValueError, match=r'pretrained_window_sizes=\(12, 12\): expected an integer from 0'):
        SwinPyramidV2(pretrained_window_sizes=(12, 12))
    with pytest.raises(TypeError, match=r'pretrained_window_sizes=12: expected'):
        SwinPyramidV2(pretrained_window_sizes=12)
    with pytest.raises(ValueError, match=r'qk_scale=0.1: expected None'):
        SwinPyramidV2(qk_scale=0.1)


@BOTH
def test_stages_without_blocks(pyramid):
    model = pyramid(**(SMALL | {'depths': (0, 1, 0, 0)}))
    maps = model(torch.rand(1, 3, 64, 64))
    assert [m.shape[1:] for m in maps] == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]


def test_rectangular_patches():
    model = SwinPyramid(**SMALL, patch_size=(4, 2), strides=((4, 2), 2, 2, 2))
    assert model(torch.rand(1, 3, 64, 32))[0].shape == (1, 32, 16, 16)


@pytest.mark.parametrize(
    'image, error, message',
    [
        (torch.rand(3, 32, 32), ValueError, '(3, 32, 32): expected shape (B, 3, H, W); add the batch dimension'),
        (torch.rand(1, 1, 3, 32, 32), ValueError, '(1, 1, 3, 32, 32): expected shape (B, 3, H, W)'),
        (torch.rand(1, 4, 32, 32), ValueError, '(1, 4, 32, 32): expected shape (B, 3, H, W)'),
        (torch.rand(1, 32, 32, 3), ValueError, '(1, 32, 32, 3): expected shape (B, 3, H, W); channels come first'),
        (torch.rand(1, 3, 0, 32), ValueError, 'H and W of at least 1'),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            TypeError,
            'dtype torch.uint8: expected a floating-point tensor',
        ),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.complex64),
            TypeError,
            'dtype torch.complex64: expected a floating-point',
        ),
        (
            np.zeros((1, 3, 32, 32), np.float32),
            TypeError,
            'type ndarray: expected a floating-point tensor of shape (B, 3',
        ),
    ],
)
@BOTH
def test_images_that_do_not_fit_name_the_expected_shape(pyramid, image, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pyramid(**SMALL)(image)


def test_replaced_patch_embeddings_may_take_other_channels():
    model = SwinPyramid(**SMALL)
    model.patch_embed.proj = nn.Conv2d(6, 32, 4, 4)
    assert model(torch.rand(1, 6, 32, 32))[0].shape == (1, 32, 8, 8)
    model.patch_embed.proj = nn.Sequential(nn.Conv2d(2, 32, 4, 4))
    assert model(torch.rand(1, 2, 32, 32))[0].shape == (1, 32, 8, 8)
