"""Equality with the implementations that published weights were trained with or are used in."""

import pytest
import torch
from support.oracles import SMALL, mmdet_twin, relative_error, transformers_twin
from support.reference_models import reference
from torch import Tensor, nn

import swin_mm
from swin_mm.checkpoints import adapt

# In float64 the implementations agree to rounding. In float32 both are compared with mmdet's in float64: our error may
# be a few times theirs, so that the processor's order of additions does not decide.
LIMIT_FLOAT64, TIMES, FLOOR = 1e-10, 4, 4e-6

# Every pair of remainders of the first map modulo the window of 7; H is never W.
REMAINDERS = [(4 * (7 + r), 4 * (14 + s)) for r in range(7) for s in range(7)]
# Not whole patches, smaller than a window, than a patch, tall, wide, and the sizes people train at.
SIZES = [(1, 1), (1, 9), (3, 2), (5, 27), (27, 5), (26, 26), (28, 28), (29, 31), (111, 30), (30, 111), (57, 203)]
SIZES += [(224, 224), (333, 517), (512, 512), (800, 1333)]


def run(model: nn.Module, twin: nn.Module, size: tuple[int, int], dtype: torch.dtype, batch: int) -> dict:
    """The maps, and the gradients of the image and of every parameter by the names that ``twin``, ours, gives them."""
    model.to(dtype).zero_grad()
    generator = torch.Generator().manual_seed(size[0] * 10007 + size[1])
    channels = twin.patch_embed.proj.in_channels
    image = torch.rand(batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    maps = model(image)
    # A weighted sum, so that every position of every map has a gradient of its own.
    weights = torch.Generator().manual_seed(1)
    loss = sum((m * torch.rand(m.shape, generator=weights, dtype=torch.float64).to(m)).sum() for m in maps)
    if loss.requires_grad:
        loss.backward()
    found = {f'map {i}': m.detach() for i, m in enumerate(maps)}
    if image.grad is not None:
        found['image'] = image.grad
    named = gradients(model)
    return found | (named if model is twin else adapt(named, twin)[0])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter, NaN where it has none."""
    return {n: torch.full_like(p, torch.nan) if p.grad is None else p.grad for n, p in model.named_parameters()}


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors; also checks that the same parameters have gradients."""
    assert actual.keys() == exact.keys()
    result = {}
    for name, value in actual.items():
        assert value.isnan().all() == exact[name].isnan().all(), f'only one of the two trains {name}'
        if exact[name].any() and not value.isnan().all():
            result[name] = relative_error([value], [exact[name]])
        elif not value.isnan().all():
            assert not value.any(), f'{name} has a gradient, which should be zero'
    return result


def assert_equal(theirs: nn.Module, ours: nn.Module, size: tuple[int, int], batch: int = 2) -> None:
    exact = run(theirs, ours, size, torch.float64, batch)
    name, error = max(errors(run(ours, ours, size, torch.float64, batch), exact).items(), key=lambda item: item[1])
    assert error <= LIMIT_FLOAT64, f'{name} deviates by {error:.2e} at {size} in float64'
    theirs_worst = max(errors(run(theirs, ours, size, torch.float32, batch), exact).values())
    name, error = max(errors(run(ours, ours, size, torch.float32, batch), exact).items(), key=lambda item: item[1])
    assert error <= TIMES * theirs_worst + FLOOR, (
        f"{name} deviates by {error:.2e} at {size} in float32, mmdet's Swin by {theirs_worst:.2e} at most"
    )


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
        assert relative_error(ours(image)[:3], always_shifted[:3]) <= 1e-5
        padding = swin_mm.SwinTransformer().eval()
        padding.load_state_dict(ours.state_dict())
        assert relative_error(padding(image), always_shifted) <= 1e-5
        if not hasattr(theirs, 'swin'):
            pytest.skip('a backbone of transformers 4 holds no classifier')
        states = theirs.swin(image, output_hidden_states=True, output_hidden_states_before_downsampling=True)
        classifier = [  # its classifier does not
            norm(state.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, state in zip(theirs.hidden_states_norms.values(), states.reshaped_hidden_states[1:], strict=True)
        ]
        assert relative_error(ours(image), classifier) <= 1e-5
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


@pytest.mark.parametrize('library', ['transformers', 'mmpretrain'])
@pytest.mark.parametrize('size', [(224, 448), (448, 224)])
def test_v1_classifiers_decide_by_the_shorter_side_of_a_small_map(library, size):
    """Stage 4 at 224 x 448 is 7 x 14: one window high, two wide, and not shifted along either axis."""
    theirs = reference(library, 1, image_size=size)
    ours = swin_mm.SwinTransformer(out_indices=(3,), pad_small_map=False, drop_path_rate=0.0).eval()
    ours.load_state_dict(theirs.state)
    outputs = []
    (theirs.model.swin.layernorm if library == 'transformers' else theirs.model.backbone.norm3).register_forward_hook(
        lambda _module, _args, output: outputs.append(output)
    )
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs.model(image)
        (ours_map,) = ours(image)
    assert relative_error([ours_map.flatten(2).transpose(1, 2)], [outputs[0].reshape(1, -1, 768)]) < 1e-4
