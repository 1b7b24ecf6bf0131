"""Windows: partition and reverse, indices, and the mask."""

import pytest
import torch

from swin_mm.ops import windows as windows_module
from swin_mm.ops.windows import (
    MASKED,
    gather_windows,
    padded_size,
    region_mask,
    relative_index,
    scatter_windows,
    window_partition,
    window_reverse,
)

CPU = torch.device('cpu')
SIZES = [(56, 56), (7, 7), (1, 1), (5, 20), (20, 5), (13, 84), (14, 7)]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('window, shift', [((7, 7), (0, 0)), ((7, 7), (3, 3)), ((4, 6), (2, 3)), ((4, 6), (0, 5))])
def test_window_reverse_undoes_window_partition(size, window, shift):
    x = torch.randn(3, *size, 2)
    windows = window_partition(x, window, shift)
    Hp, Wp = padded_size(size, window)
    assert windows.shape == (3 * Hp // window[0] * Wp // window[1], window[0] * window[1], 2)
    assert torch.equal(window_reverse(windows, size, window, shift), x)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('window, shift', [((7, 7), (0, 0)), ((7, 7), (3, 3)), ((4, 6), (2, 3)), ((4, 6), (0, 5))])
@pytest.mark.parametrize('traced', [False, True])
def test_gather_and_scatter_equal_partition_and_reverse_with_gradients(size, window, shift, traced, monkeypatch):
    monkeypatch.setattr(windows_module, 'tracing', lambda: traced)
    x, pad = torch.randn(3, *size, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    expected = window_partition(x, window, shift, pad)
    windows = gather_windows(x, window, shift, pad)
    assert torch.equal(windows, expected)
    weight = torch.randn_like(windows)
    for a, e in zip(
        *(torch.autograd.grad((w * weight).sum(), (x, pad), materialize_grads=True) for w in (windows, expected)),
        strict=True,
    ):
        torch.testing.assert_close(a, e)
    windows = windows.detach().requires_grad_()
    back, expected = scatter_windows(windows, size, window, shift), window_reverse(windows, size, window, shift)
    assert torch.equal(back, expected)
    weight = torch.randn_like(back)
    assert torch.equal(*(torch.autograd.grad((b * weight).sum(), windows)[0] for b in (back, expected)))


def test_windows_are_cut_in_reading_order_after_shift_and_padding():
    x = torch.arange(1, 4 * 5 + 1).view(1, 4, 5, 1)
    windows = window_partition(x, (2, 3), (1, 1)).view(4, 2, 3)
    # The map padded to 4 x 6, moved up and left by one, in four windows.
    assert windows[0].tolist() == [[7, 8, 9], [12, 13, 14]]
    assert windows[1].tolist() == [[10, 0, 6], [15, 0, 11]]
    assert windows[2].tolist() == [[17, 18, 19], [2, 3, 4]]
    assert windows[3].tolist() == [[20, 0, 16], [5, 0, 1]]


@pytest.mark.parametrize(
    'size, window, shift', [((14, 21), (7, 7), (3, 3)), ((9, 5), (4, 4), (2, 2)), ((6, 6), (3, 2), (1, 0))]
)
def test_mask_separates_the_regions_of_a_window(size, window, shift):
    """By the definition: two tokens of a shifted window belong together if they are neighbours on the padded map."""
    Hp, Wp = padded_size(size, window)
    y, x = torch.meshgrid(torch.arange(Hp), torch.arange(Wp), indexing='ij')
    positions = window_partition(torch.stack([y, x], -1)[None], window, shift)  # (nW, N, 2)
    apart = (positions[:, :, None] - positions[:, None]).abs()  # (nW, N, N, 2)
    together = ((apart[..., 0] < window[0]) & (apart[..., 1] < window[1])).float()
    mask = region_mask(size, window, shift, CPU)
    assert torch.equal(mask, (1 - together) * MASKED)


def test_mask_is_cached_and_usable_after_inference_mode():
    with torch.inference_mode():
        first = region_mask((9, 10), (4, 4), (2, 2), CPU)
    assert region_mask((9, 10), (4, 4), (2, 2), CPU) is first
    assert not first.is_inference()


def test_relative_index_lists_offsets_and_small_windows_read_the_centre():
    window, small = (3, 4), (2, 3)
    table = [(dy, dx) for dy in range(-2, 3) for dx in range(-3, 4)]
    for side in (window, small):
        tokens = [(y, x) for y in range(side[0]) for x in range(side[1])]
        index = relative_index(side, window, CPU)
        for i, a in enumerate(tokens):
            for j, b in enumerate(tokens):
                assert table[index[i, j]] == (a[0] - b[0], a[1] - b[1])
