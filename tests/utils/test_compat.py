"""What differs between versions of torch. `nox` runs this on the lowest and the newest supported one."""

import re
from collections.abc import Sequence

import pytest
import torch
from support.tool_fixtures import ROOT
from torch import Tensor

from swin_mm.models.swin import SwinPyramid, SwinPyramidV2
from swin_mm.utils import compat

TINY = dict(embed_dims=16, depths=(2,), num_heads=(1,), strides=(4,), window_size=4, out_indices=(0,))
BOTH = pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])


class Which(torch.nn.Module):
    def forward(self, x):
        return x + (1 if compat.is_exporting() else 2)


def test_is_exporting():
    torch.compiler.reset()
    x, module = torch.zeros(2), Which()
    assert module(x).eq(2).all()
    for _ in range(2):  # tracing leaves nothing behind
        assert torch.compile(module, fullgraph=True, backend='eager')(x).eq(2).all()
        for strict in (True, False):
            assert torch.export.export(module, (x,), strict=strict).module()(x).eq(1).all()
        assert module(x).eq(2).all()
        torch.compiler.reset()


def one(a: Tensor, b: Tensor | None, c: Sequence[int], d: list[int], e: int, f: float, g: bool) -> Tensor: ...


def several(
    a: Tensor, b: list[Tensor], c: torch.dtype, d: torch.dtype | None
) -> tuple[Tensor, Tensor, list[Tensor]]: ...


@pytest.mark.skipif(compat.TORCH < (2, 8), reason='older versions of torch do not read all of these annotations')
@pytest.mark.parametrize('function', [one, several])
def test_schemas_are_those_that_torch_infers(function):
    assert compat.operator_schema(function) == torch.library.infer_schema(function, mutates_args=())


def operators(graph):
    """The operators of a graph and of the graphs in it."""
    modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for module in modules for node in module.graph.nodes if node.op == 'call_function'}


@BOTH
def test_compiled_graphs_use_the_fused_kernels(pyramid):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(pyramid(**TINY).eval(), fullgraph=True, backend=backend)(torch.rand(1, 3, 32, 32))
    assert any(name.startswith('swin_mm.') for graph in graphs for name in operators(graph))


@BOTH
@pytest.mark.parametrize('strict', [True, False])
def test_exported_graphs_run_without_this_package(pyramid, strict):
    if strict and compat.TORCH < (2, 5):
        pytest.skip('a strict export fails: torch 2.4 expects that a bias is used either by its layer or by itself')
    if strict and pyramid is SwinPyramidV2 and compat.TORCH < (2, 9):
        pytest.skip('a strict export fails: torch 2.8 does not trace torch.amp.is_autocast_available')
    torch.compiler.reset()
    with torch.no_grad():
        program = torch.export.export(pyramid(**TINY).eval(), (torch.rand(1, 3, 32, 32),), strict=strict)
    names = operators(program.graph_module)
    assert names and not any(name.startswith('swin_mm') for name in names)


def test_supported_versions_are_the_same_everywhere():
    lowest = '.'.join(map(str, compat.LOWEST_TORCH))
    assert f'"torch>={lowest}"' in (ROOT / 'pyproject.toml').read_text()
    assert re.search(rf"torch='{lowest}\.\d+'", (ROOT / 'noxfile.py').read_text())
