import io

import pytest
import torch
from mmengine.config import Config
from rich.console import Console
from torch import nn

from swin_mm.models.swin import SwinPyramid, SwinPyramidV2
from swin_mm.ops.attention import reference
from swin_mm.ops.windows import window_partition

WIDTH, HEIGHT = 90, 62  # 16 × 23 tokens, of which 21 × 28 in windows


@pytest.fixture(scope='module')
def config(tiny):
    return Config.fromfile(tiny.config)


def test_parameters_and_multiply_adds_are_those_of_the_parts(tool, config):
    info = tool('model_info')
    model, macs = info.build(config), info.macs(config, WIDTH, HEIGHT)
    C, tokens, windows, N = 16, 16 * 23, 3 * 4, 49
    assert macs['backbone.patch_embed'] == tokens * C * 3 * 4 * 4
    block = tokens * (3 + 1 + 4 + 4) * C * C + 2 * windows * N * N * C
    assert macs['backbone.layers.0'] == block + 8 * 12 * 4 * C * 2 * C
    heads = {'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head'} if hasattr(model, 'neck') else {'decode_head'}
    assert heads < set(+macs)
    assert not macs[info.ELSEWHERE], 'work that no part owns up to'

    text = printed(info.table_of_parts(model, macs, {}))
    cells = {row[0]: row[1:] for row in text}
    assert cells['total'] == [f'{sum(p.numel() for p in model.parameters()):,}', f'{sum(macs.values()) / 1e9:.2f}']
    assert cells['backbone.norm*'] == ['480'] and info.ELSEWHERE not in cells  # 2 (16 + 32 + 64 + 128)
    if heads == {'decode_head'}:
        assert len(cells['auxiliary_head']) == 1, 'it works in training only'


def printed(table):
    """The cells of a table's rows."""
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines() if line.strip()]


def test_what_looks_at_numbers_is_counted_on_the_cpu(tool, config, monkeypatch):
    info = tool('model_info')
    expected, forward = info.macs(config, WIDTH, HEIGHT), nn.Conv2d.forward

    def looking(self, x):
        if self.kernel_size == (3, 3):
            bool(x.sum() > 0)  # which the device meta refuses
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, 'forward', looking)
    assert info.macs(config, WIDTH, HEIGHT) == expected


class Whole(nn.Module):
    """A model that is a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


@pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])
@pytest.mark.parametrize('with_cp', [False, True])
def test_bytes_kept_are_those_of_a_real_training_step(tool, monkeypatch, pyramid, with_cp):
    monkeypatch.setattr('swin_mm.models.dense._onednn_serves', lambda *_: False)  # it keeps less
    options = dict(embed_dims=16, depths=(2, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1), with_cp=with_cp)
    model = Whole(pyramid(**options, drop_path_rate=0.2, attention='reference'))
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train().backbone(torch.rand(2, 3, HEIGHT, WIDTH))
    expected = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)

    info = tool('model_info')
    with torch.device('meta'):
        shapes = Whole(pyramid(**options, drop_path_rate=0.2, attention='reference'))
    found = info.saved_bytes(shapes, torch.empty(2, 3, HEIGHT, WIDTH, device='meta'))
    assert sum(found.values()) == expected > 2**18
    assert found[info.ELSEWHERE] == 0
    assert found['backbone.patch_embed'] >= 2 * 3 * HEIGHT * WIDTH * 4, 'the image is kept'


def test_fused_attention_keeps_no_scores(tool, config):
    info = tool('model_info')
    kept = {name: info.kept(config, WIDTH, HEIGHT, 2, kernel) for name, kernel in info.KERNELS.items()}
    scores = 2 * 3 * 4 * 1 * 49 * 49 * 4  # bytes of stage 0: images, windows, heads, pairs
    assert kept['reference']['backbone.layers.0'] - kept['Triton']['backbone.layers.0'] > scores
    one = info.kept(config, WIDTH, HEIGHT, 1, info.KERNELS['Triton'])
    assert 1.9 < sum(kept['Triton'].values()) / sum(one.values()) <= 2  # what does not grow is small


def test_stages_are_what_attention_gets(tool, config):
    backbone = tool('model_info').build(config, 'cpu').backbone
    found = []

    def attention_fn(qkv, pad, bias, window, shift, scale, dropout=0.0):
        size = tuple(qkv.shape[1:3])
        windows = window_partition(qkv, window, shift, pad).shape[0]
        found.append([size, window, windows, bias.shape[0]])
        return reference.attention(qkv, pad, bias, window, shift, scale, dropout)

    for stage in backbone.layers:
        stage.blocks[-1].attn.attention_fn = attention_fn
    backbone(torch.rand(1, 3, HEIGHT, WIDTH))
    meta = tool('model_info').build(config).backbone
    rows = printed(tool('model_info').table_of_stages(meta, WIDTH, HEIGHT))
    rows = [row for row in rows if row[0].isdigit()]
    expected = [[f'{h}×{w}', f'{a}×{b}', str(n), str(heads)] for (h, w), (a, b), n, heads in found]
    assert [[row[4], row[5], row[8], row[3]] for row in rows] == expected
    assert rows[0][7] == '21×28'


def test_command(tool, tiny, monkeypatch, capsys):
    info = tool('model_info')
    monkeypatch.setattr('sys.argv', ['model_info', str(tiny.config), '--size', '96x64', '--batch', '2'])
    assert info.cli.run(info.main, info.parse_args()) == 0
    text = capsys.readouterr().out
    assert 'image of 96 × 64' in text and 'batch of 2' in text and 'backbone.layers.3' in text and '4×6' in text

    monkeypatch.setattr('sys.argv', ['model_info', str(tiny.config), str(tiny.config), '--size', '96x64', '--markdown'])
    assert info.cli.run(info.main, info.parse_args()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2] == lines[3]
    total = sum(p.numel() for p in info.build(Config.fromfile(tiny.config)).parameters())
    assert lines[3].startswith(f'| tiny | {total:,} | ') and lines[3].endswith(' | 96 × 64 |')


def test_bad_input_is_named(refuse, tiny, tmp_path):
    assert '--batch 0' in refuse('model_info', tiny.config, '--batch', '0')
    (tmp_path / 'none.py').write_text('model = dict()')
    assert 'not a detector or a segmentor' in refuse('model_info', 'none.py', '--size', '64x64')
    assert 'give the size' in refuse('model_info', 'none.py')
    assert 'cannot be built' in refuse('model_info', tiny.config, '--cfg-options', 'model.backbone.depths=[1,1]')
    assert "--size 64: expected two whole numbers with 'x'" in refuse('model_info', tiny.config, '--size', '64')
