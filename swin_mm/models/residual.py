"""Residual branches: stochastic depth, and additions fused with the norm before or after them.

B batch, C channels.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from swin_mm.models.window_attention import has_hooks, product_dtype
from swin_mm.ops import fused_norm
from swin_mm.ops.windows import recording


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a sample's whole residual branch with probability ``rate``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def draw(self, x: Tensor) -> Tensor | None:
        """The factor of each sample of (B, ...), 0 or a number that preserves the expectation; None for no change."""
        if not self.training or self.rate == 0:
            return None
        keep = x.new_empty(x.shape[:1] + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return keep.div_(1 - self.rate)

    def forward(self, x: Tensor) -> Tensor:
        """Zero some samples of (B, ...), and scale the others so that the expectation is preserved."""
        keep = self.draw(x)
        return x if keep is None else x * keep

    def extra_repr(self) -> str:
        """Extra text in the printed model."""
        return f'rate={self.rate:.3f}'


def add_branch(x: Tensor, branch: Tensor, drop_path: nn.Module | None) -> Tensor:
    """``x + drop_path(branch)``, in one pass where the types are equal and ``drop_path`` is plain; None for none."""
    if drop_path is None:
        return x + branch
    if not _is_plain(drop_path) or x.dtype != branch.dtype:
        return x + drop_path(branch)
    keep = _draw(drop_path, branch)
    return x + branch if keep is None else torch.addcmul(x, branch, keep)


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    norm: Any,
    drop_path: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    nchw: bool = False,
) -> tuple[Tensor, Tensor]:
    """``x + drop_path(branch)`` and its norm, by one kernel on GPUs if the modules are plain.

    Args:
        x: (B, ..., C).
        branch: of the same shape; None for x alone.
        norm: applied to the sum.
        drop_path: applied to the branch.
        dtype: in which the kernel gives the norm, by default that of a linear layer that follows.
        nchw: return the norm as a contiguous (B, C, ...).

    Returns:
        The sum and its norm.
    """
    dtype = dtype or product_dtype(x)
    if _is_fusible(x, norm, drop_path) and fused_norm.is_trusted(
        'nchw' if nchw else 'add', x, branch, norm.weight, dtype
    ):
        keep = None if branch is None else _draw(drop_path, branch)
        return fused_norm.add_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype, keep, nchw)
    if branch is not None:
        x = add_branch(x, branch, drop_path)
    return x, norm(x).movedim(-1, 1).contiguous() if nchw else norm(x)


def norm_add(x: Tensor, branch: Tensor, norm: Any, drop_path: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """``x + drop_path(norm(branch))``, by one kernel on GPUs if the modules are plain.

    Args:
        x: (B, ..., C).
        branch: of the same shape.
        norm: applied to the branch.
        drop_path: applied to the normalised branch.

    Returns:
        The sum; and the same, which the kernel gives in the type of a linear layer that follows.
    """
    dtype = product_dtype(x)
    if _is_fusible(x, norm, drop_path) and fused_norm.is_trusted('post', x, branch, norm.weight, dtype):
        total = torch.promote_types(x.dtype, norm_dtype(branch))
        keep = _draw(drop_path, branch)
        return fused_norm.norm_add(x, branch, norm.weight, norm.bias, norm.eps, total, dtype, keep)
    branch = norm(branch)
    x = add_branch(x, branch, drop_path)
    return x, x


def merge_norm(x: Tensor, merging: Any) -> Tensor:
    """The norm of ``merging.gather(x)``, by one kernel on GPUs if the norm is plain."""
    norm, dtype = merging.norm, product_dtype(x)
    if (
        merging.stride == 2
        and _is_fusible(x, norm, None)
        and fused_norm.is_trusted('merge', x, None, norm.weight, dtype)
    ):
        return fused_norm.merge_norm(x, norm.weight, norm.bias, norm.eps, dtype)
    return norm(merging.gather(x))


def norm_dtype(x: Tensor) -> torch.dtype:
    """The type of LayerNorm's result on a GPU: float32 under autocast, otherwise that of its input."""
    return torch.float32 if torch.is_autocast_enabled('cuda') else x.dtype


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is on a GPU; also on meta tensors, where work for a GPU is counted."""
    return x.is_cuda or x.is_meta


def _is_plain(drop_path: nn.Module) -> bool:
    return type(drop_path) is DropPath and not has_hooks(drop_path)


def _draw(drop_path: nn.Module | None, branch: Tensor) -> Tensor | None:
    return None if drop_path is None else cast(DropPath, drop_path).draw(branch)


def _is_fusible(x: Tensor, norm: Any, drop_path: nn.Module | None) -> bool:
    """Whether the fused kernels compute what the modules do, here and now. Compilers fuse by themselves."""
    if not on_gpu(x) or recording() or forward_ad.unpack_dual(x).tangent is not None:
        return False
    if type(norm) is not nn.LayerNorm or has_hooks(norm) or len(norm.normalized_shape) != 1:
        return False
    return type(norm.weight) is type(norm.bias) is nn.Parameter and (drop_path is None or _is_plain(drop_path))
