"""Linear layers and MLPs: PyTorch's, and on the CPU oneDNN's, which PyTorch itself uses in compiled code only.

oneDNN's products are faster than those behind ``torch.nn.functional.linear``, add the bias and apply GELU while a
result is in the cache, and take weights that were laid out for them beforehand.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from swin_mm.models.derived import derived, evaluating
from swin_mm.ops.windows import tracing

CHUNK = 2048  # tokens whose hidden channels fit the cache


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != 'cpu' or type(x) is not Tensor or tracing() or not torch.backends.mkldnn.is_available():
        return False
    dtype = _product_dtype(x)
    if not x.numel() or (dtype != weight.dtype and not torch.is_autocast_enabled('cpu')):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, then GELU; the weight plain or laid out for oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'gelu' if gelu else 'none', [], 'none')


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer computes in."""
    kind = x.device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if mixed else x.dtype


class Linear(nn.Linear):
    """``nn.Linear``, by oneDNN where that serves."""

    def forward(self, x: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        """(..., in_features) -> (..., out_features).

        Args:
            x: the input.
            bias: in place of the layer's own.
            gelu: apply GELU to the result.
        """
        bias = self.bias if bias is None else bias
        if _onednn_serves(x, self.weight):
            dtype = _product_dtype(x)
            if evaluating(self):
                weight = derived(('packed', dtype), (self.weight,), lambda: self._packed(dtype))
                return _product(x.to(dtype), weight, None if bias is None else bias.to(dtype), gelu)
            if torch.is_grad_enabled() and not gelu and dtype == x.dtype == self.weight.dtype:
                return _LinearFunction.apply(x, self.weight, bias)
        y = F.linear(x, self.weight, bias)
        return F.gelu(y) if gelu else y

    def _packed(self, dtype: torch.dtype) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().to(dtype))


class _LinearFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t().contiguous()) if wanted[0] else None,
            rows.t() @ x.flatten(0, -2) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        dim: C.
        hidden: channels between the layers.
        act: makes the activation.
        drop: dropout behind each layer.
        with_cp: compute the hidden channels again in the backward pass instead of keeping them.
    """

    def __init__(self, dim: int, hidden: int, act: Callable[[], nn.Module], drop: float, with_cp: bool = False) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.fc1 = Linear(dim, hidden)
        self.act = act()
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        layers = self.fc1, self.fc2
        # Whoever has put other layers or an activation in place gets what these do.
        plain = all(type(layer) is Linear for layer in layers) and type(self.act) is nn.GELU
        if plain and self.act.approximate == 'none':
            if evaluating(self):
                return self.fc2(self.fc1(x, gelu=True))
            dropping = self.training and self.drop.p > 0
            mixed = len({_product_dtype(x), x.dtype, self.fc1.weight.dtype}) > 1  # PyTorch's own is faster then
            if torch.is_grad_enabled() and not (dropping or mixed) and _onednn_serves(x, self.fc1.weight):
                weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
                return _MlpFunction.apply(x.flatten(0, -2), *weights).view(x.shape)
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class _MlpFunction(Function):
    """The MLP by chunks of tokens: one hidden tensor is kept instead of two, all others stay in the cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        out, hidden = torch.empty_like(x), []
        for part, result in zip(x.split(CHUNK), out.split(CHUNK), strict=True):
            hidden.append(_product(part, w1, b1))
            result.copy_(_product(F.gelu(hidden[-1]), w2, b2))
        ctx.save_for_backward(x, w1, w2, *hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, w1, w2, *hidden = ctx.saved_tensors
        w1_t, w2_t = w1.t().contiguous(), w2.t().contiguous()
        grad_x = torch.empty_like(x)
        # Sums over chunks, in bfloat16, would lose what later ones add.
        grad_w1, grad_w2, grad_b1 = (torch.zeros_like(t, dtype=torch.float32) for t in (w1, w2, w1[:, 0]))
        parts = (t.split(CHUNK) for t in (x, grad, grad_x))
        for h, part, g, result in zip(hidden, *parts, strict=True):
            _add_product(grad_w2, g.t(), F.gelu(h))
            grad_h = torch.ops.aten.gelu_backward(_product(g, w2_t), h)
            _add_product(grad_w1, grad_h.t(), part)
            grad_b1 += grad_h.sum(0)
            result.copy_(_product(grad_h, w1_t))
        return grad_x, *(t.to(x.dtype) for t in (grad_w1, grad_b1, grad_w2)), grad.sum(0)


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``to``, in place where they are of one type."""
    to.addmm_(a, b) if to.dtype == a.dtype else to.add_(a @ b)
