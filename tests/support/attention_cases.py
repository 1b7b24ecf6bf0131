"""Inputs and comparisons that the tests of all attention kernels share."""

import pytest
import torch
import torch.nn.functional as F

from swin_mm.ops.attention import triton as kernel

HEADS, DIM = 2, 8
# Maps with padding on both sides and none, shifts on both axes, on one and on none, a window larger than the map.
LAYOUTS = [
    ((5, 7), (2, 3), (1, 1)),
    ((4, 6), (2, 3), (0, 2)),
    ((9, 4), (4, 4), (0, 0)),
    ((3, 5), (4, 6), (2, 3)),
    ((40, 61), (3, 4), (1, 2)),
]


def require_triton() -> None:
    """Skip a module or a test where no Triton is installed that compiles the kernels, such as beside torch 2.4."""
    pytest.importorskip('triton')
    if reason := kernel.version_problem():
        pytest.skip(reason, allow_module_level=True)


def inputs(dtype: torch.dtype, size, window, cosine: bool = False) -> list:
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tokens = window[0] * window[1]
    scale = random(HEADS) if cosine else 0.3
    return [random(2, *size, 3 * HEADS * DIM), random(3 * HEADS * DIM), random(HEADS, tokens, tokens), scale]


def by_hand(qkv, pad, bias, window, shift, scale):
    """Attention token by token, in float64, from the positions of tokens on the padded map."""
    qkv, pad, bias = qkv.double(), pad.double(), bias.double()
    B, H, W, _ = qkv.shape
    Hp, Wp = -(-H // window[0]) * window[0], -(-W // window[1]) * window[1]

    def token(b, y, x):
        return (qkv[b, y, x] if y < H and x < W else pad).view(3, HEADS, DIM)

    def region(y, x):  # tokens of a window share a region unless the cyclic shift has wrapped one of them around
        return y < shift[0], x < shift[1]

    images = []
    for b in range(B):
        rows = []
        for y in range(H):
            for x in range(W):
                sy, sx = (y - shift[0]) % Hp, (x - shift[1]) % Wp  # where the token lies on the shifted map
                corner = sy // window[0] * window[0], sx // window[1] * window[1]
                slots = [(corner[0] + i, corner[1] + j) for i in range(window[0]) for j in range(window[1])]
                places = [((i + shift[0]) % Hp, (j + shift[1]) % Wp) for i, j in slots]
                k, v = (torch.stack([token(b, *p)[n] for p in places], 1) for n in (1, 2))  # (h, N, d)
                q = token(b, y, x)[0][:, None]
                factor = scale
                if isinstance(scale, torch.Tensor):
                    q, k, factor = F.normalize(q, dim=-1), F.normalize(k, dim=-1), scale.double().view(-1, 1, 1)
                me = slots.index((sy, sx))
                apart = torch.tensor([region(*p) != region(y, x) for p in places])
                scores = (q @ k.transpose(1, 2)) * factor + bias[:, me : me + 1] - 100.0 * apart
                rows.append((scores.softmax(-1) @ v).flatten())
        images.append(torch.stack(rows).view(H, W, -1))
    return torch.stack(images)


def check(actual, expected, limit):
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e.double()).abs().max() <= limit * max(e.abs().max(), 1e-6)  # behind the mask, nothing


def gradients(out, tensors):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    return torch.autograd.grad((out * weight).sum(), tensors, materialize_grads=True)  # some maps need no padding
