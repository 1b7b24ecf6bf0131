"""Every kernel equals the definition, forward and backward."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from swin_mm.kernels import KERNELS, get_kernel, reference

HEADS, DIM = 2, 8
# Maps with padding on both sides and none, shifts on both axes, on one and on none, a window larger than the map.
LAYOUTS = [
    ((5, 7), (2, 3), (1, 1)),
    ((4, 6), (2, 3), (0, 2)),
    ((9, 4), (4, 4), (0, 0)),
    ((3, 5), (4, 6), (2, 3)),
    ((40, 61), (3, 4), (1, 2)),
]


def inputs(dtype: torch.dtype, size, window, cosine: bool = False) -> list:
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tokens = window[0] * window[1]
    scale = random(HEADS) if cosine else 0.3
    return [random(2, *size, 3 * HEADS * DIM), random(3 * HEADS * DIM), random(HEADS, tokens, tokens), scale]


def by_hand(qkv, pad, bias, window, shift, scale):
    """One token after the other, in float64, by where tokens lie on the padded map."""
    qkv, pad, bias = qkv.double(), pad.double(), bias.double()
    B, H, W, _ = qkv.shape
    Hp, Wp = -(-H // window[0]) * window[0], -(-W // window[1]) * window[1]

    def token(b, y, x):
        return (qkv[b, y, x] if y < H and x < W else pad).view(3, HEADS, DIM)

    def region(y, x):  # tokens of a window belong together if the shift has not brought them round the edge
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
    return torch.autograd.grad((out * weight).sum(), tensors, materialize_grads=True)  # a map may need no padding


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('size, window, shift', LAYOUTS[:4])
def test_the_definition_by_hand(size, window, shift, cosine):
    qkv, pad, bias, scale = inputs(torch.float64, size, window, cosine)
    out = reference.attention(qkv, pad, bias, window, shift, scale)
    check([out], [by_hand(qkv, pad, bias, window, shift, scale)], 1e-12)


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('size, window, shift', LAYOUTS)
@pytest.mark.parametrize('name', ['auto', 'sdpa'])
@pytest.mark.parametrize(
    'dtype, limit', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)]
)
def test_kernel_equals_the_definition_forward_and_backward(name, dtype, limit, size, window, shift, cosine):
    tensors = inputs(dtype, size, window, cosine)
    exact = [t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]
    out = get_kernel(name)(*tensors[:3], window, shift, tensors[3])
    expected = reference.attention(*exact[:3], window, shift, exact[3])
    assert out.dtype == dtype
    check([out], [expected], limit)
    check(gradients(out, tensors), gradients(expected, exact), limit)


@pytest.mark.parametrize('name', ['reference', 'sdpa'])
def test_scores_beyond_fp16_stay_finite(name):
    qkv, pad, bias, scale = inputs(torch.float16, (5, 7), (2, 3))
    qkv = qkv.detach() * torch.tensor([300.0, 300.0, 1.0]).repeat_interleave(HEADS * DIM).half()
    q, k, _ = qkv.float().chunk(3, -1)
    assert ((q * k).sum(-1) * scale).abs().max() > 65504
    assert get_kernel(name)(qkv, pad, bias, (2, 3), (1, 1), scale).isfinite().all()


@pytest.mark.parametrize('name', ['reference', 'sdpa'])
def test_dropout_drops_weights_and_keeps_the_expectation(name):
    torch.manual_seed(0)
    qkv, pad, bias, scale = inputs(torch.float32, (4, 6), (2, 3))
    arguments = qkv, pad, bias, (2, 3), (0, 0), scale
    kernel = get_kernel(name)
    with torch.no_grad():
        mean = torch.stack([kernel(*arguments, 0.5) for _ in range(2000)]).mean(0)
        assert not torch.equal(kernel(*arguments, 0.5), kernel(*arguments, 0.5))
        assert (mean - kernel(*arguments)).abs().max() < 0.2
    assert not torch.equal(kernel(*arguments, 0.5), kernel(*arguments, 0.5))


@pytest.mark.parametrize('name', ['auto', *KERNELS])
def test_models_that_hold_a_kernel_can_be_copied_and_pickled(name):
    layer = torch.nn.Identity()
    layer.attend = get_kernel(name)
    tensors = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs(torch.float32, (4, 6), (2, 3))]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        if name != 'triton':
            arguments = *tensors[:3], (2, 3), (0, 0), tensors[3]
            assert torch.equal(twin.attend(*arguments), layer.attend(*arguments))


def test_unknown_kernel_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'flash'.*auto, reference, sdpa, cpu, triton"):
        get_kernel('flash')
