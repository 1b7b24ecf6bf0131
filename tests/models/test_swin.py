"""The pyramid: the steps of the paper, independent samples, numerics, export, gradients of all parameters."""

import ast
import itertools
from pathlib import Path

import pytest
import torch
from support.oracles import SMALL, randomise, relative_error
from torch import nn

from swin_mm.models.swin import ARCHS, DropPath, PatchMerging, SwinPyramid, SwinPyramidV2
from swin_mm.ops.attention import reference
from swin_mm.ops.windows import region_mask, relative_index, window_partition, window_reverse

SWIN_MM = Path(__file__).parents[2] / 'swin_mm'
BOTH = pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])


def small(pyramid: type[SwinPyramid], **options) -> SwinPyramid:
    return randomise(pyramid(**(SMALL | options)))


def test_intermediate_shapes_and_scores_follow_the_paper():
    """Figure 3 and section 3.2 for Swin-T and a 224 x 224 image."""
    model = SwinPyramid().eval()
    plain, shifted = model.layers[0].blocks[:2]
    with torch.no_grad():
        x = model.embed(torch.rand(1, 3, 224, 224))
        assert x.shape == (1, 56, 56, 96)
        assert x.flatten(1, 2)[0].shape == (3136, 96)
        windows = window_partition(plain.norm1(x), (7, 7))
        assert windows.shape == (8 * 8, 49, 96)
        q, k, v, _ = reference.split_heads(plain.attn.qkv(windows), 3, plain.attn.scale)
        assert q.shape == k.shape == v.shape == (64, 3, 49, 32)
        bias = plain.attn.position_bias((7, 7))
        assert bias.shape == (3, 49, 49)
        scores = reference.scores(q, k, bias, None, plain.attn.scale)
        assert scores.shape == (64, 3, 49, 49)
        torch.testing.assert_close(
            scores[5, 2, 10, 40],
            q[5, 2, 10] @ k[5, 2, 40] / 32**0.5
            + plain.attn.relative_position_bias_table[relative_index((7, 7), (7, 7), x.device)[10, 40], 2],
        )
        attended = plain.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(windows.shape))
        back = window_reverse(attended, (56, 56), (7, 7))
        assert back[0].shape == (56, 56, 96)
        torch.testing.assert_close(plain.attn(plain.norm1(x), (7, 7)), back)
        assert (shifted.shift, region_mask((56, 56), (7, 7), (3, 3), x.device).shape) == ((3, 3), (64, 49, 49))
        assert model.layers[0](x).shape == (1, 56, 56, 96)
        assert model.layers[0].downsample(x).shape == (1, 28, 28, 192)


@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('size', [(6, 8), (5, 8), (6, 3), (1, 1)])
def test_merging_stacks_the_neighbours_column_by_column(stride, size):
    """Bit for bit, and so does its gradient."""
    x = torch.randn(2, *size, 3, requires_grad=True)
    merging = PatchMerging(3, stride, nn.LayerNorm)
    rows, columns = (-(-side // stride) for side in size)
    expected = torch.zeros(2, rows, columns, 12)
    grad = torch.randn(2, rows, columns, 12)
    expected_grad = torch.zeros(2, *size, 3)
    with torch.no_grad():
        for y, x0, i, j in itertools.product(range(rows), range(columns), (0, 1), (0, 1)):
            source, part = (y * stride + i, x0 * stride + j), slice(3 * (2 * j + i), 3 * (2 * j + i) + 3)
            if source[0] < size[0] and source[1] < size[1]:
                expected[:, y, x0, part] = x[:, source[0], source[1]]
                expected_grad[:, source[0], source[1]] += grad[:, y, x0, part]
    out = merging.gather(x)
    assert torch.equal(out, expected)
    (actual,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(actual, expected_grad)
    assert stride == 1 or torch.equal(actual, expected_grad)


@BOTH
def test_a_token_of_a_shifted_window_attends_to_its_region_only(pyramid):
    """The gradient of one output token of a shifted block reaches the tokens of its region, and no others."""
    model = small(pyramid, window_size=4).double().eval()
    block = model.layers[0].blocks[1]
    x = torch.randn(1, 10, 9, 32, dtype=torch.float64, requires_grad=True)
    for row, column in [(0, 0), (1, 5), (5, 2), (9, 8), (2, 2)]:
        (gradient,) = torch.autograd.grad(block.attn(x, block.attn.window, block.shift)[0, row, column].sum(), x)
        seen = gradient[0].abs().sum(-1) > 1e-30  # a masked score of -100 leaves e^-100
        # Windows lie two up and left of the grid of fours; the map's edges cut them.
        top, left = (row - 2) // 4 * 4 + 2, (column - 2) // 4 * 4 + 2
        expected = torch.zeros(10, 9, dtype=torch.bool)
        expected[max(top, 0) : top + 4, max(left, 0) : left + 4] = True
        assert torch.equal(seen, expected), (row, column)


@BOTH
def test_samples_are_independent_and_runs_repeat(pyramid):
    model = small(pyramid).eval()
    images = torch.rand(3, 3, 75, 110)
    with torch.no_grad():
        together = model(images)
        assert all(torch.equal(a, b) for a, b in zip(model(images), together, strict=True))
        for i in range(3):
            assert relative_error(model(images[i : i + 1]), [m[i : i + 1] for m in together]) < 1e-5


@BOTH
def test_kernels_agree_in_the_whole_model(pyramid):
    images = torch.rand(2, 3, 75, 110)
    with torch.no_grad():
        expected, actual = (small(pyramid, attention=name).eval()(images) for name in ('reference', 'sdpa'))
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('attention', ['reference', 'sdpa'])
@BOTH
def test_autocast_is_finite_at_large_activations(pyramid, attention, dtype):
    model = small(pyramid, attention=attention).train()
    with torch.no_grad():
        model.patch_embed.norm.weight.fill_(3e3)  # V2 squares projections of this stream: beyond fp16's 65504
        if pyramid is SwinPyramid:
            for block in model.layers[0].blocks:
                block.attn.qkv.weight[:64].mul_(300)  # scores of 1e6; V2's cosines cannot grow
    with torch.autocast('cpu', dtype):
        maps = model(torch.rand(2, 3, 64, 96))
        loss = sum(m.float().mean() for m in maps) * 1e-3  # a scale that a gradient scaler would settle on
    loss.backward()
    assert all(m.isfinite().all() for m in maps)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@BOTH
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2, 3), (0, 2), (0,), (3,)])
@pytest.mark.parametrize('with_cp', [False, True])
def test_every_parameter_gets_a_gradient(pyramid, out_indices, with_cp):
    model = small(pyramid, out_indices=out_indices, with_cp=with_cp, use_abs_pos_embed=True).train()
    maps = model(torch.rand(1, 3, 64, 96))
    assert len(maps) == len(out_indices)
    sum((m * torch.rand_like(m)).sum() for m in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@BOTH
def test_output_does_not_depend_on_earlier_calls(pyramid):
    """The output depends on the image only, and stage sizes are rounded up."""
    model = small(pyramid).eval()
    sizes = [(1, 1), (64, 64), (30, 97), (97, 30), (7, 224)]
    images = [torch.rand(1, 3, *size) for size in sizes]
    with torch.no_grad():
        first = [model(image) for image in images]
        for image, expected in reversed(list(zip(images, first, strict=True))):
            maps = model(image)
            assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
            for i, m in enumerate(maps):
                assert m.shape[1:] == (32 * 2**i, *(-(-side // 2 ** (i + 2)) for side in image.shape[2:]))


@BOTH
def test_state_dict_holds_parameters_only(pyramid):
    model = small(pyramid).eval()
    model(torch.rand(1, 3, 64, 64))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@BOTH
def test_exported_graph_takes_any_batch(pyramid):
    model = small(pyramid).eval()  # at a new size: nothing from tracing may remain in the caches
    batch = torch.export.Dim('batch', min=1, max=64)
    images = torch.rand(2, 3, 72, 104)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False).module()
    with torch.no_grad():
        for n in (1, 2, 5):
            images = torch.rand(n, 3, 72, 104)
            assert relative_error(exported(images), model(images)) < 1e-5


@BOTH
@pytest.mark.parametrize(
    'window_size, windows',
    [
        (7, [(7, 7)] * 4),
        ((5, 9), [(5, 9)] * 4),
        ((8, 7, 6, 5), [(8, 8), (7, 7), (6, 6), (5, 5)]),
        ([(8, 4), 7, (3, 6), 2], [(8, 4), (7, 7), (3, 6), (2, 2)]),
    ],
)
def test_windows_per_stage_and_per_axis(pyramid, window_size, windows):
    model = small(pyramid, window_size=window_size).eval()
    assert [stage.blocks[0].attn.window for stage in model.layers] == windows
    assert model.layers[2].blocks[1].shift == (windows[2][0] // 2, windows[2][1] // 2)
    with torch.no_grad():
        assert all(m.isfinite().all() for m in model(torch.rand(1, 3, 61, 90)))


@BOTH
def test_height_and_width_are_not_swapped(pyramid):
    """A transposed image through the transposed model gives transposed maps."""
    upright = small(pyramid, window_size=(5, 3)).eval()
    lying = small(pyramid, window_size=(3, 5)).eval()
    state = upright.state_dict()
    for key, value in state.items():
        if key == 'patch_embed.proj.weight':
            state[key] = value.transpose(2, 3)
        elif key.endswith('relative_position_bias_table'):
            state[key] = value.unflatten(0, (9, 5)).transpose(0, 1).flatten(0, 1)
        elif 'cpb_mlp.0.weight' in key:
            state[key] = value.flip(1)
        elif '.downsample.' in key and value.shape[-1] % 4 == 0 and (pyramid is SwinPyramid or 'reduction' in key):
            state[key] = value.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)
    lying.load_state_dict(state)
    image = torch.rand(1, 3, 61, 90)
    with torch.no_grad():
        maps = [m.transpose(2, 3) for m in lying(image.transpose(2, 3))]
        assert relative_error(maps, upright(image)) < 1e-5


def test_absolute_embedding_is_resized_to_the_map():
    model = small(SwinPyramid, use_abs_pos_embed=True, pretrain_img_size=64).eval()
    with torch.no_grad():
        model.patch_embed.norm.weight.zero_()
        model.patch_embed.norm.bias.zero_()
        embedded = model.embed(torch.rand(1, 3, 96, 128)).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(model.absolute_pos_embed, (24, 32), mode='bicubic')
        assert torch.equal(embedded, expected)
        assert torch.equal(model.embed(torch.rand(1, 3, 64, 64)).permute(0, 3, 1, 2), model.absolute_pos_embed)


def test_small_maps_of_a_classifier_shrink_the_window():
    block = small(SwinPyramid, pad_small_map=False).layers[0].blocks[1]
    assert block.effective_window((20, 20)) == ((7, 7), (3, 3))
    assert block.effective_window((7, 20)) == ((7, 7), (0, 0))
    assert block.effective_window((4, 5)) == ((4, 4), (0, 0))
    tall = small(SwinPyramid, pad_small_map=False, window_size=(8, 4)).layers[0].blocks[1]
    assert tall.effective_window((20, 5)) == ((8, 4), (4, 2))
    assert tall.effective_window((6, 20)) == ((6, 4), (0, 0))
    assert tall.effective_window((20, 3)) == ((3, 3), (0, 0))
    assert small(SwinPyramid).layers[0].blocks[1].effective_window((4, 5)) == ((7, 7), (3, 3))


@BOTH
def test_a_shrunk_window_equals_a_model_with_that_window(pyramid):
    """V1 reads the central part of its tables, V2 the coordinates of the shrunken window."""
    model = small(pyramid, window_size=7, pad_small_map=False, depths=(2,), num_heads=(2,), out_indices=(0,)).eval()
    other = small(pyramid, window_size=5, pad_small_map=False, depths=(2,), num_heads=(2,), out_indices=(0,)).eval()
    state = model.state_dict()
    for key, table in state.items():
        if key.endswith('relative_position_bias_table'):
            state[key] = table.view(13, 13, 2)[2:-2, 2:-2].reshape(81, 2)
    other.load_state_dict(state)
    image = torch.rand(1, 3, 20, 20)  # a map of 5 x 5
    with torch.no_grad():
        assert relative_error(model(image), other(image)) < 1e-6


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 3, 5, 2)).flatten(1)
    assert (out == out[:, :1]).all()
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    x = torch.rand(2, 3)
    assert drop.eval()(x) is x


def test_drop_path_grows_linearly_over_all_stages_even_unbuilt_ones():
    rates = [
        m.rate
        for n, m in SwinPyramid(drop_path_rate=0.2, out_indices=(0, 1)).named_modules()
        if n.endswith('drop_path1')
    ]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(4)])


def test_v2_blocks_are_the_identity_at_initialisation():
    model = SwinPyramidV2().eval()
    x = torch.rand(1, 8, 8, 96)
    assert torch.equal(model.layers[0](x), x)


def test_archs_have_head_size_32():
    for sizes in ARCHS.values():
        assert {sizes['embed_dims'] * 2**i // heads for i, heads in enumerate(sizes['num_heads'])} == {32}


def test_model_files_are_plain_torch():
    """The model can be read, tested and reused without OpenMMLab."""
    files = [file for folder in ('ops', 'models', 'checkpoints') for file in (SWIN_MM / folder).rglob('*.py')]
    assert len(files) >= 15
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not any(name.split('.')[0].startswith('mm') for name in names), file


def test_initialisation_is_that_of_the_official_code():
    torch.manual_seed(0)
    model = SwinPyramid(use_abs_pos_embed=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert 0.015 < module.weight.std() < 0.025, name
            assert module.bias is None or not module.bias.any()
    assert 0.015 < model.layers[0].blocks[0].attn.relative_position_bias_table.std() < 0.025
    assert 0.015 < model.absolute_pos_embed.std() < 0.025


def test_checkpointing_saves_memory_and_gives_the_same_gradients():
    def kept_and_gradients(with_cp):
        model = small(SwinPyramid, with_cp=with_cp, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(1,))
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            loss = (model(torch.ones(1, 3, 64, 72))[0] ** 3).mean()
        return sum(storages.values()), torch.autograd.grad(loss, list(model.parameters()))

    everything, expected = kept_and_gradients(False)
    kept = {with_cp: kept_and_gradients(with_cp) for with_cp in (True, (True, False), 'mlp')}
    assert kept[True][0] < kept[True, False][0] < everything and kept[True][0] < kept['mlp'][0] < everything
    for _, gradients in kept.values():
        for a, e in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-7)


@BOTH
@pytest.mark.parametrize('attention', ['auto', 'reference'])
def test_runs_on_the_meta_device(pyramid, attention):
    with torch.device('meta'):
        model = pyramid(**SMALL, attention=attention)
        for mode in (True, False):
            maps = model.train(mode)(torch.empty(2, 3, 60, 90))
            assert [tuple(m.shape) for m in maps] == [(2, 32, 15, 23), (2, 64, 8, 12), (2, 128, 4, 6), (2, 256, 2, 3)]
            with torch.no_grad():
                assert model(torch.empty(2, 3, 60, 90))[0].shape == maps[0].shape
