"""torch.compile: one graph, few recompilations, equal outputs."""

import pytest
import torch
from support.oracles import SMALL, randomise, relative_error
from torch._dynamo.testing import CompileCounterWithBackend

import swin_mm
from swin_mm.models.swin import SwinPyramid, SwinPyramidV2
from swin_mm.ops import attention as kernels
from swin_mm.utils import compat

SIZES = [(64, 64), (96, 131), (100, 61), (57, 200), (128, 96), (33, 47), (224, 64), (75, 75), (81, 160), (90, 122)]


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])
def test_one_graph_serves_ten_sizes_with_two_recompilations(pyramid, training):
    torch._dynamo.reset()
    model = randomise(pyramid(**SMALL | dict(depths=(2, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1))))
    model.double().train(training)
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    weights = list(model.parameters())
    for size in SIZES:
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.set_grad_enabled(training):
            outs = [forward(image) for forward in (compiled, model)]
        for a, e in zip(*outs, strict=True):
            assert relative_error(a, e) < 1e-10
        if training:
            grads = [torch.autograd.grad(sum((m**3).mean() for m in maps), weights) for maps in outs]
            for a, e in zip(*grads, strict=True):
                assert relative_error([a], [e]) < 1e-9
    assert counter.frame_count <= (3 if compat.TORCH >= (2, 5) else 7)  # torch 2.4 generalises later


def test_compile_argument_compiles_the_backbone():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('eager')
    model = swin_mm.SwinTransformer(
        depths=(1,), num_heads=(3,), strides=(4,), out_indices=(0,), compile=dict(backend=counter)
    )
    model.eval()(torch.randn(1, 3, 32, 32))
    assert counter.frame_count == 1


@pytest.mark.parametrize('dynamic', [None, True])
def test_kernel_choice_is_a_constant_in_the_graph(dynamic):
    torch._dynamo.reset()

    class WithKernelCheck(torch.nn.Linear):
        def forward(self, x):
            qkv = super().forward(x)
            return qkv * 0 + 1 if kernels.reason_against('triton', qkv, self.weight[:3], 0.0) else qkv

    module = WithKernelCheck(32, 96, dtype=torch.float64)  # a dtype that the Triton kernel never supports
    compiled = torch.compile(module, fullgraph=True, backend='eager', dynamic=dynamic)
    assert compiled(torch.zeros(1, 4, 4, 32, dtype=torch.float64)).eq(1).all()
