"""Equality with the implementations that published weights were trained with or are used in."""

import pytest
import torch
from support.oracles import SMALL, mmdet_twin, relative_error, transformers_twin
from torch import Tensor, nn

import swin_mm
from swin_mm.checkpoints import adapt

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}

# Every pair of remainders of the first map modulo the window of 7; H is never W.
REMAINDERS = [(4 * (7 + r), 4 * (14 + s)) for r in range(7) for s in range(7)]
# Not whole patches, smaller than a window, than a patch, tall, wide, and the sizes people train at.
SIZES = [(1, 1), (1, 9), (3, 2), (5, 27), (27, 5), (26, 26), (28, 28), (29, 31), (111, 30), (30, 111), (57, 203)]
SIZES += [(224, 224), (333, 517), (512, 512), (800, 1333)]


def errors(theirs: nn.Module, ours: nn.Module, size: tuple[int, int], dtype: torch.dtype, batch: int = 2) -> dict:
    """Relative error of the maps and of the gradients of the image and of every parameter."""
    theirs.to(dtype)
    ours.to(dtype)
    generator = torch.Generator().manual_seed(size[0] * 10007 + size[1])
    channels = ours.patch_embed.proj.in_channels
    image = torch.rand(batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype)
    maps, images = [], []
    for model in (theirs, ours):
        model.zero_grad()
        images.append(image.clone().requires_grad_())
        maps.append(model(images[-1]))
        # A weighted sum, so that every position of every map has a gradient of its own.
        weights = torch.Generator().manual_seed(1)
        loss = sum((m * torch.rand(m.shape, generator=weights, dtype=torch.float64).to(m)).sum() for m in maps[-1])
        if loss.requires_grad:
            loss.backward()
    result = {'maps': relative_error(maps[1], maps[0])}
    if images[0].grad is not None:
        result['image'] = relative_error([images[1].grad], [images[0].grad])
    expected, _ = adapt(gradients(theirs), ours)
    for name, gradient in gradients(ours).items():
        assert gradient.isnan().all() == expected[name].isnan().all(), f'only one of the two trains {name}'
        if not gradient.isnan().all():
            result[name] = relative_error([gradient], [expected[name]])
    return result


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter, NaN where it has none."""
    return {n: torch.full_like(p, torch.nan) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_equal(theirs: nn.Module, ours: nn.Module, size: tuple[int, int], batch: int = 2) -> None:
    for dtype, limit in LIMITS.items():
        worst = max(errors(theirs, ours, size, dtype, batch).items(), key=lambda item: item[1])
        assert worst[1] <= limit, f'{worst[0]} deviates by {worst[1]:.2e} at {size} in {dtype}'


@pytest.fixture(scope='module')
def small() -> tuple[nn.Module, nn.Module]:
    return mmdet_twin(**SMALL)


@pytest.mark.parametrize('size', REMAINDERS + SIZES, ids=str)
def test_equals_mmdet_at_every_size(small, size):
    assert_equal(*small, size, batch=1 if size[0] > 300 else 2)


@pytest.mark.parametrize(
    'options, size',
    [
        ({}, (224, 224)),
        ({'window_size': 12, 'pretrain_img_size': 384}, (230, 333)),
        (SMALL | {'window_size': 12}, (384, 384)),
        (SMALL | {'window_size': 12}, (145, 94)),
        (SMALL | {'window_size': 1}, (40, 61)),
        (SMALL | {'use_abs_pos_embed': True, 'pretrain_img_size': 96}, (96, 96)),
        (SMALL | {'use_abs_pos_embed': True, 'pretrain_img_size': (64, 112)}, (64, 112)),
        (SMALL | {'out_indices': (0, 2)}, (90, 123)),
        (SMALL | {'out_indices': (1, 2, 3)}, (90, 123)),
        (SMALL | {'out_indices': (3,)}, (90, 123)),
        (SMALL | {'out_indices': (0,)}, (90, 123)),
        (SMALL | {'frozen_stages': 0}, (90, 123)),
        (SMALL | {'frozen_stages': 2}, (90, 123)),
        (SMALL | {'frozen_stages': 4}, (90, 123)),
        (SMALL | {'with_cp': True}, (90, 123)),
        (SMALL | {'patch_norm': False}, (90, 123)),
        (SMALL | {'qkv_bias': False, 'qk_scale': 0.3}, (90, 123)),
        (SMALL | {'mlp_ratio': 2, 'act_cfg': {'type': 'ReLU'}, 'norm_cfg': {'type': 'LN', 'eps': 1e-3}}, (90, 123)),
        (SMALL | {'in_channels': 5}, (90, 123)),
        (SMALL | {'patch_size': 2, 'strides': (2, 2, 1, 2)}, (47, 61)),
        (SMALL | {'strides': (4, 3, 2, 2)}, (95, 150)),
        (
            {
                'embed_dims': 32,
                'depths': (2, 2, 2, 2, 1),
                'num_heads': (1, 2, 4, 8, 16),
                'strides': (4, 2, 2, 2, 2),
                'out_indices': (1, 2, 3, 4),
                'drop_path_rate': 0.0,
            },
            (130, 210),
        ),
    ],
    ids=str,
)
def test_equals_mmdet_in_every_variant(options, size):
    theirs, ours = mmdet_twin(**({'drop_path_rate': 0.0} | options))
    theirs.train()  # mmdet freezes only there
    ours.train()
    assert_equal(theirs, ours, size)


def test_v1_equals_transformers():
    theirs, ours = transformers_twin(1, 224, 7, pad_small_map=False)
    image = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        always_shifted = theirs(image).feature_maps  # transformers' backbone keeps the shift on small maps
        states = theirs.swin(image, output_hidden_states=True, output_hidden_states_before_downsampling=True)
        classifier = [  # its classifier does not
            norm(state.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, state in zip(theirs.hidden_states_norms.values(), states.reshaped_hidden_states[1:], strict=True)
        ]
        assert relative_error(ours(image), classifier) <= 1e-5
        assert relative_error(ours(image)[:3], always_shifted[:3]) <= 1e-5
        padding = swin_mm.SwinTransformer().eval()
        padding.load_state_dict(ours.state_dict())
        assert relative_error(padding(image), always_shifted) <= 1e-5
        assert relative_error(always_shifted[3:], classifier[3:]) > 1e-3  # the shift does matter there


@pytest.mark.parametrize(
    'window, size, options',
    [
        (8, 256, {'pad_small_map': False}),
        (16, 256, {'pad_small_map': False}),
        (16, 256, {'pad_small_map': False, 'pretrained_window_sizes': (12, 12, 12, 6)}),
        (8, (296, 360), {}),
        (8, (333, 517), {}),
    ],
)
def test_v2_equals_transformers(window, size, options):
    theirs, ours = transformers_twin(2, size, window, **options)
    image = torch.rand(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    with torch.no_grad():
        assert relative_error(ours(image), theirs(image).feature_maps) <= 1e-5
