"""The position bias and its gradient equal those of indexing the table."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swin_mm.ops.position_bias import position_bias
from swin_mm.ops.windows import relative_index

CASES = [((7, 7), (7, 7)), ((3, 5), (3, 5)), ((3, 3), (7, 7)), ((2, 5), (4, 6)), ((1, 1), (3, 3))]
HEADS = 3


def make_table(table_window, dtype=torch.float64):
    offsets = (2 * table_window[0] - 1) * (2 * table_window[1] - 1)
    return torch.randn(offsets, HEADS, dtype=dtype, requires_grad=True)


def indexed(table, window, table_window):
    """The definition; its gradient is PyTorch's, by ``index_put``."""
    return table[relative_index(window, table_window, table.device)].permute(2, 0, 1)


def gradient(function, table, window, table_window):
    bias = function(table, window, table_window)
    weight = torch.linspace(-1, 1, bias.numel(), dtype=torch.float64).sin().view_as(bias).to(bias.dtype)
    return torch.autograd.grad((bias * weight).sum(), table)[0]


@pytest.mark.parametrize('window, table_window', CASES)
def test_bias_and_gradient_equal_those_of_indexing(window, table_window):
    table = make_table(table_window)
    assert torch.equal(position_bias(table, window, table_window), indexed(table, window, table_window))
    actual, expected = (gradient(f, table, window, table_window) for f in (position_bias, indexed))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize('dtype, limit', [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_gradient_in_lower_precision(dtype, limit):
    table = make_table((7, 7)).detach().to(dtype).requires_grad_()
    exact = table.detach().double().requires_grad_()
    actual, expected = (gradient(position_bias, t, (7, 7), (7, 7)) for t in (table, exact))
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() < limit * expected.abs().max()


class Recorder(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.removeprefix('aten::'))
        return function(*args, **(kwargs or {}))


FREE = {'t', 'transpose', 'view', '_unsafe_view', 'slice', 'unsqueeze', 'expand', 'detach', 'alias', 'promote_types'}


def test_nothing_is_added_up_by_index():
    """``index_put`` and ``index_add`` sort on GPUs, or use atomics, whose results differ from run to run."""
    table = make_table((7, 7), torch.float32)
    gradient(position_bias, table, (7, 7), (7, 7))  # the indices are cached
    with Recorder() as recorder:
        bias = position_bias(table, (7, 7), (7, 7))
        torch.autograd.grad(bias, table, torch.ones_like(bias))
    names = [name for name in recorder.names if name not in FREE and name != 'ones_like']
    assert names == ['index_select', 'flip', 'col2im']


def test_compiled_code_adds_nothing_up_by_index():
    seen = []

    def record(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(
        lambda table, window: position_bias(table, window, (7, 7)).sin(),
        backend=aot_autograd(fw_compiler=record, bw_compiler=record),
        fullgraph=True,
    )
    table = make_table((7, 7))
    for window in ((7, 7), (3, 5)):
        bias = compiled(table, window)
        assert torch.equal(bias, indexed(table, window, (7, 7)).sin())
        actual = torch.autograd.grad(bias.sum(), table)[0]
        expected = torch.autograd.grad(indexed(table, window, (7, 7)).sin().sum(), table)[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    assert any('bias_table_gradient' in name for name in seen)
    assert not any('index_put' in name or 'index_add' in name or 'scatter' in name for name in seen)


def test_second_derivatives_and_forward_mode():
    table = make_table((2, 3))
    function = lambda t: position_bias(t, (2, 3), (2, 3)).pow(2)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, table)
    assert torch.autograd.gradcheck(function, table, check_forward_ad=True)
    direction = torch.randn_like(table)
    _, tangent = torch.func.jvp(function, (table,), (direction,))
    _, expected = torch.func.jvp(lambda t: indexed(t, (2, 3), (2, 3)).pow(2), (table,), (direction,))
    torch.testing.assert_close(tangent, expected)
    assert torch.func.vmap(function)(torch.stack([table, table])).shape == (2, HEADS, 6, 6)


def test_exported_code_uses_plain_operators():
    class Bias(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(make_table((3, 3)).detach())

        def forward(self, x):
            return x + position_bias(self.table, (2, 3), (3, 3))

    module, x = Bias(), torch.zeros(HEADS, 6, 6, dtype=torch.float64)
    expected = indexed(module.table, (2, 3), (3, 3))
    assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)
    traced = torch.jit.trace(module, x)
    assert torch.equal(traced(x), expected) and 'PythonOp' not in str(traced.graph)
