"""Swin Transformer V1 and V2 in plain PyTorch.

B batch, (H, W) map, (Hw, Ww) window, nW windows per map, N = Hw * Ww tokens per window, C channels.
Maps are (B, H, W, C) inside; NCHW appears only at the image and at the pyramid's output.
Papers: V1 arXiv 2103.14030, V2 arXiv 2111.09883.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swin_mm.models.arguments import (
    MAX_CHANNELS,
    MAX_SIDE,
    check_image,
    reject,
    require_bool,
    require_callable,
    require_choice,
    require_depths,
    require_int,
    require_number,
    require_out_indices,
    require_pair,
    require_per_stage,
    require_pretrained_windows,
    require_rate,
    require_strides,
    require_windows,
    require_with_cp,
    shorten,
)
from swin_mm.models.residual import DropPath, add_branch, add_norm, merge_norm, norm_add, norm_dtype, on_gpu
from swin_mm.models.window_attention import WindowAttention, WindowAttentionV2, has_hooks
from swin_mm.ops.attention import KERNELS
from swin_mm.ops.windows import Size, padded_size, recording, tracing

ARCHS: dict[str, dict[str, Any]] = {
    't': {'embed_dims': 96, 'depths': (2, 2, 6, 2), 'num_heads': (3, 6, 12, 24)},
    's': {'embed_dims': 96, 'depths': (2, 2, 18, 2), 'num_heads': (3, 6, 12, 24)},
    'b': {'embed_dims': 128, 'depths': (2, 2, 18, 2), 'num_heads': (4, 8, 16, 32)},
    'l': {'embed_dims': 192, 'depths': (2, 2, 18, 2), 'num_heads': (6, 12, 24, 48)},
}

Norm = Callable[[int], nn.Module]  # channels -> norm over the last axis
Act = Callable[[], nn.Module]
Chained = tuple[Tensor, Tensor | None, nn.Module | None]  # x, and a branch and its stochastic depth, to be added


class PatchEmbed(nn.Module):
    """Split the image into patches and embed each: (B, in_channels, H, W) -> (B, H / patch, W / patch, C)."""

    def __init__(self, in_channels: int, dim: int, patch: Size, norm: Norm, fused_norm: bool = False) -> None:
        super().__init__()
        self.patch = patch
        self.fused_norm = fused_norm
        self.proj = nn.Conv2d(in_channels, dim, patch, patch)
        self.norm = norm(dim)

    def pad(self, image: Tensor) -> Tensor:
        """Check an image, and zero-pad it at the bottom and right to whole patches."""
        check_image(image, getattr(self.proj, 'in_channels', None))
        H, W = image.shape[2:]
        Hp, Wp = padded_size((H, W), self.patch)
        if tracing() or (Hp, Wp) != (H, W):
            image = F.pad(image, (0, Wp - W, 0, Hp - H))
        return image

    def forward(self, image: Tensor) -> Tensor:
        """Embed an image of any size."""
        x = self.proj(self.pad(image)).permute(0, 2, 3, 1)
        return add_norm(x, None, self.norm, dtype=norm_dtype(x))[1] if self.fused_norm else self.norm(x)


class PatchMerging(nn.Module):
    """Merge 2x2 neighbourhoods: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), 2C)."""

    def __init__(self, dim: int, stride: int, norm: Norm, fused_norm: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.fused_norm = fused_norm
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm(self.norm_dim(dim))

    @staticmethod
    def norm_dim(dim: int) -> int:
        """Number of channels that the norm sees."""
        return 4 * dim

    def gather(self, x: Tensor) -> Tensor:
        """Stack the four neighbours as channels, column by column: (B, H, W, C) -> (B, H / stride, W / stride, 4C)."""
        H, W = x.shape[1:3]
        s = self.stride
        rows, columns = (H + s - 1) // s, (W + s - 1) // s
        # Pad so that the last neighbourhood is whole.
        bottom, right = (rows - 1) * s + max(s, 2) - H, (columns - 1) * s + max(s, 2) - W
        if tracing() or bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        if s == 2:  # neighbourhoods do not overlap: one copy, (B, h, i, w, j, C) -> (B, h, w, j, i, C)
            x = x.reshape(x.shape[0], rows, 2, columns, 2, x.shape[3]).permute(0, 1, 3, 4, 2, 5)
            return x.reshape(x.shape[0], rows, columns, 4 * x.shape[5])
        ends = (rows - 1) * s + 1, (columns - 1) * s + 1  # one past the last top-left corner
        return torch.cat([x[:, i : i + ends[0] : s, j : j + ends[1] : s] for j in (0, 1) for i in (0, 1)], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Halve height and width (for stride 2), and double the channels."""
        return self.reduction(merge_norm(x, self) if self.fused_norm else self.norm(self.gather(x)))


class PatchMergingV2(PatchMerging):
    """Patch merging of V2, which normalises after the reduction."""

    @staticmethod
    def norm_dim(dim: int) -> int:
        """Number of channels that the norm sees."""
        return 2 * dim

    def forward(self, x: Tensor) -> Tensor:
        """Halve height and width (for stride 2), and double the channels."""
        return self.norm(self.reduction(self.gather(x)))


class Mlp(nn.Module):
    """Two linear layers with an activation between them, (..., C) -> (..., C).

    Args:
        dim: C.
        hidden: channels between the layers.
        act: creates the activation.
        drop: dropout rate after each layer.
        with_cp: recompute the hidden channels in the backward pass instead of storing them.
    """

    def __init__(self, dim: int, hidden: int, act: Act, drop: float, with_cp: bool = False) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers."""
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class SwinBlock(nn.Module):
    """Window attention and MLP, each on a residual branch (V1, figure 3b).

    Args:
        attn: attention inside windows of ``attn.window``.
        shift: shift of the windows.
        pad_small_map: on a map no longer than the window along an axis, keep window and shift and pad the map
            (detection); otherwise limit both sides of the window to the map's shorter side and do not shift (official
            classifiers, transformers, mmpretrain; timm decides for each axis by itself).
        dim: C.
        mlp: module (..., C) -> (..., C).
        norm: creates a norm for C channels.
        drop_path: probability of dropping a branch.
    """

    def __init__(
        self,
        attn: WindowAttention,
        shift: Size,
        pad_small_map: bool,
        dim: int,
        mlp: nn.Module,
        norm: Norm,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.shift = shift
        self.pad_small_map = pad_small_map
        self.norm1 = norm(dim)
        self.attn = attn
        self.norm2 = norm(dim)
        self.mlp = mlp
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def effective_window(self, size: Size) -> tuple[Size, Size]:
        """Window and shift on a map of this size."""
        window, shift = self.attn.window, self.shift
        if self.pad_small_map:
            return window, shift
        if size[0] > window[0] and size[1] > window[1]:
            return window, shift
        # As in the official code, the shorter side of the map decides for both axes; timm decides for each axis.
        side = min(size)
        return (min(window[0], side), min(window[1], side)), (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to a map, (B, H, W, C) -> (B, H, W, C)."""
        return self.forward_windows(x, *self.effective_window((x.shape[1], x.shape[2])))

    def forward_windows(self, x: Tensor, window: Size, shift: Size) -> Tensor:
        """Apply the block with this window and shift, (B, H, W, C) -> (B, H, W, C)."""
        x = add_branch(x, self.attn(self.norm1(x), window, shift), self.drop_path1)
        return add_branch(x, self.mlp(self.norm2(x)), self.drop_path2)

    @staticmethod
    def chain(blocks: Iterable[Any], x: Tensor) -> Chained:
        """Apply several blocks, with one kernel for each addition and the norm after it; see :func:`add_norm`.

        A block's last branch is added by the next norm; that of the last block is returned.
        """
        branch = drop_path = None
        for block in blocks:
            x, normalised = add_norm(x, branch, block.norm1, drop_path)
            branch = block.attn(normalised, *block.effective_window((x.shape[1], x.shape[2])))
            x, normalised = add_norm(x, branch, block.norm2, block.drop_path1)
            branch, drop_path = block.mlp(normalised), block.drop_path2
        return x, branch, drop_path


class SwinBlockV2(SwinBlock):
    """The block of V2, which normalises the output of each branch instead of its input (V2, section 3.2)."""

    def forward_windows(self, x: Tensor, window: Size, shift: Size) -> Tensor:
        """Apply the block with this window and shift, (B, H, W, C) -> (B, H, W, C)."""
        x = add_branch(x, self.norm1(self.attn(x, window, shift)), self.drop_path1)
        return add_branch(x, self.norm2(self.mlp(x)), self.drop_path2)

    @staticmethod
    def chain(blocks: Iterable[Any], x: Tensor) -> Chained:
        """Apply several blocks, with one kernel for each norm and the addition after it; see :func:`norm_add`."""
        cast = x  # x in the type of linear layers
        for block in blocks:
            branch = block.attn(cast, *block.effective_window((x.shape[1], x.shape[2])))
            x, cast = norm_add(x, branch, block.norm1, block.drop_path1)
            x, cast = norm_add(x, block.mlp(cast), block.norm2, block.drop_path2)
        return x, None, None


class SwinStage(nn.Module):
    """Blocks on one map, every second one with shifted windows, and the patch merging before the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, with_cp: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks, (B, H, W, C) -> (B, H, W, C); the pyramid calls ``downsample``."""
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def chain(self, x: Tensor) -> Chained:
        """Apply the blocks by their ``chain`` if they are plain, otherwise one by one."""
        for kind in (SwinBlock, SwinBlockV2):
            plain = all(type(block) is kind and not has_hooks(block) for block in self.blocks)
            if plain and not has_hooks(self) and not self.with_cp:
                return kind.chain(self.blocks, x)
        return self(x), None, None


class SwinPyramid(nn.Module):
    """Swin Transformer V1 as a feature pyramid; parameters have the names of the official repository.

    Stages after ``max(out_indices)`` are not instantiated, so that every parameter takes part in the output.

    Args:
        in_channels: channels of the image.
        embed_dims: C of the first stage; it doubles from stage to stage.
        patch_size: side of a patch; equals ``strides[0]``.
        window_size: side of the windows, or (height, width), or one of these per stage. Two plain integers are always
            a height and a width.
        mlp_ratio: hidden channels of the MLP over C.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        strides: strides of the patch embedding and of the patch merging before each further stage.
        out_indices: stages to return, ascending.
        qkv_bias: learn a bias for q, k and v.
        qk_scale: factor on the product of q and k; None for head size ** -0.5.
        patch_norm: norm after the patch embedding and in the mergings.
        drop_rate: dropout after the embedding, of attention outputs and in the MLPs.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        use_abs_pos_embed: add a learned absolute position embedding, resized (bicubic) to the map.
        pretrain_img_size: image size, a side or (height, width), for which the absolute embedding is created.
        act: creates the MLP's activation.
        norm: creates a norm over the last axis, given the number of channels.
        with_cp: recompute in the backward pass instead of keeping intermediate tensors: True for every block,
            one boolean per stage for the blocks of some stages, 'mlp' for the hidden channels of every MLP.
        pad_small_map: see :class:`SwinBlock`.
        attention: name of the attention kernel, see :mod:`swin_mm.ops.attention`.
        fused_norm: on NVIDIA GPUs in eager mode, compute each addition, the LayerNorm next to it and autocast's cast
            by one Triton kernel, where these modules are plain: a faster training step. It is checked against the
            definition at first use. It has no second derivatives.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range or inconsistent with the others; the message says which and why.
    """

    attention_type: ClassVar[type[WindowAttention]] = WindowAttention
    block_type: ClassVar[type[SwinBlock]] = SwinBlock
    merging_type: ClassVar[type[PatchMerging]] = PatchMerging

    def __init__(
        self,
        *,
        in_channels: int = 3,
        embed_dims: int = 96,
        patch_size: int | Size = 4,
        window_size: int | Size | Sequence[int | Size] = 7,
        mlp_ratio: float = 4,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        strides: Sequence[int] = (4, 2, 2, 2),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        use_abs_pos_embed: bool = False,
        pretrain_img_size: int | Size = 224,
        act: Act = nn.GELU,
        norm: Norm = nn.LayerNorm,
        with_cp: bool | Literal['mlp'] | Sequence[bool] = False,
        pad_small_map: bool = True,
        attention: str = 'auto',
        fused_norm: bool = False,
    ) -> None:
        super().__init__()
        depths = require_depths('depths', depths)
        in_channels = require_int('in_channels', in_channels, 1, MAX_CHANNELS)
        embed_dims = require_int('embed_dims', embed_dims, 1, MAX_CHANNELS)
        patch = require_pair('patch_size', patch_size)
        windows = require_windows('window_size', window_size, depths)
        mlp_ratio = require_number('mlp_ratio', mlp_ratio, 0, MAX_SIDE)
        heads = require_per_stage(
            'num_heads', num_heads, depths, lambda n, v: require_int(n, v, 1, MAX_CHANNELS), 'an integer of at least 1'
        )
        patch_stride, merging_strides = require_strides('strides', strides, depths)
        self.out_indices = require_out_indices('out_indices', out_indices, depths)
        qkv_bias = require_bool('qkv_bias', qkv_bias)
        qk_scale = None if qk_scale is None else require_number('qk_scale', qk_scale)
        patch_norm = require_bool('patch_norm', patch_norm)
        drop_rate = require_rate('drop_rate', drop_rate)
        attn_drop_rate = require_rate('attn_drop_rate', attn_drop_rate)
        drop_path_rate = require_rate('drop_path_rate', drop_path_rate)
        use_abs_pos_embed = require_bool('use_abs_pos_embed', use_abs_pos_embed)
        pretrain_size = require_pair('pretrain_img_size', pretrain_img_size, 1, MAX_CHANNELS)
        act = require_callable('act', act, 'a callable that returns an activation module')
        norm = require_callable('norm', norm, 'a callable that takes channels and returns a norm over the last axis')
        checkpointed, checkpoint_mlp = require_with_cp('with_cp', with_cp, len(depths))
        pad_small_map = require_bool('pad_small_map', pad_small_map)
        attention = require_choice('attention', attention, ('auto', *KERNELS))
        fused_norm = require_bool('fused_norm', fused_norm)

        self.fused_norm = fused_norm
        self.num_features = [embed_dims * 2**i for i in range(len(depths))]
        if patch != patch_stride:
            reject('patch_size', patch_size, f'the first of strides={shorten(strides)}, as patches do not overlap')
        if self.num_features[-1] > MAX_CHANNELS:
            reject('depths', depths, f'at most {MAX_CHANNELS} channels in the last stage (embed_dims={embed_dims})')
        if any(channels % n for channels, n in zip(self.num_features, heads, strict=True)):
            expected = f'divisors of the channels {tuple(self.num_features)} (embed_dims={embed_dims})'
            reject('num_heads', num_heads, expected)
        if int(mlp_ratio * embed_dims) < 1:
            reject('mlp_ratio', mlp_ratio, f'at least one hidden channel (embed_dims={embed_dims})')
        if use_abs_pos_embed and (pretrain_size[0] < patch[0] or pretrain_size[1] < patch[1]):
            reject('pretrain_img_size', pretrain_img_size, f'at least a patch of patch_size={patch_size!r}')

        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch, norm if patch_norm else nn.Identity, fused_norm)
        self.absolute_pos_embed = None
        if use_abs_pos_embed:
            grid = [side // p for side, p in zip(pretrain_size, patch, strict=True)]
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, embed_dims, *grid))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)

        drop_path = (drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        last = max(self.out_indices)
        self.layers = nn.ModuleList()
        for i in range(last + 1):
            dim, window = self.num_features[i], windows[i]
            blocks = [
                self.block_type(
                    attn=self.attention_type(
                        dim,
                        window,
                        heads[i],
                        qkv_bias=qkv_bias,
                        qk_scale=qk_scale,
                        attn_drop=attn_drop_rate,
                        proj_drop=drop_rate,
                        kernel=attention,
                        **self._attention_options(i),
                    ),
                    shift=(window[0] // 2, window[1] // 2) if j % 2 else (0, 0),
                    pad_small_map=pad_small_map,
                    dim=dim,
                    mlp=Mlp(dim, int(mlp_ratio * dim), act, drop_rate, checkpoint_mlp),
                    norm=norm,
                    drop_path=next(drop_path),
                )
                for j in range(depths[i])
            ]
            merging_norm = norm if patch_norm else nn.Identity
            merge = self.merging_type(dim, merging_strides[i], merging_norm, fused_norm) if i < last else None
            self.layers.append(SwinStage(blocks, merge, checkpointed[i]))
        for i in self.out_indices:
            self.add_module(f'norm{i}', norm(self.num_features[i]))
        self.apply(_init_linear)

    def _attention_options(self, stage: int) -> dict[str, Any]:
        """Further arguments of a stage's attention, for subclasses to override."""
        return {}

    def embed(self, image: Tensor) -> Tensor:
        """The input of the first stage, (B, in_channels, H, W) -> (B, H / patch, W / patch, C)."""
        x = self.patch_embed(image)
        if self.absolute_pos_embed is not None:
            position: Tensor = self.absolute_pos_embed
            if position.shape[2:] != x.shape[1:3]:
                position = F.interpolate(position, size=x.shape[1:3], mode='bicubic')
            x = x + position.permute(0, 2, 3, 1)
        return self.pos_drop(x)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of an image.

        Args:
            image: (B, in_channels, H, W), any H and W.

        Returns:
            For each stage i in ``out_indices`` its normalised map (B, embed_dims * 2**i, H / s, W / s), where s is the
            product of the strides so far (4, 8, 16, 32); sizes are rounded up at each stage.
        """
        if self.fused_norm and on_gpu(image) and not recording():
            return self.forward_fused(image)
        x = self.embed(image)
        maps = []
        stages: Any = self.layers  # nn.ModuleList does not know the type of its items
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in self.out_indices:
                maps.append(
                    getattr(self, f'norm{i}')(x).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
                )
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(maps)

    def forward_fused(self, image: Tensor) -> tuple[Tensor, ...]:
        """The same, with one kernel for each addition and the norm next to it, also from block to block."""
        x = self.embed(image)
        maps = []
        stages: Any = self.layers
        for i, stage in enumerate(stages):
            x, branch, drop_path = stage.chain(x)
            if i in self.out_indices:
                norm = getattr(self, f'norm{i}')
                x, normalised = add_norm(x, branch, norm, drop_path, norm_dtype(x), nchw=True)
                maps.append(normalised)
            elif branch is not None:
                x = add_branch(x, branch, drop_path)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(maps)


class SwinPyramidV2(SwinPyramid):
    """Swin Transformer V2 as a feature pyramid.

    Args:
        window_size: as in V1.
        pretrained_window_sizes: per stage, the window the weights were pre-trained with where it differs from the one
            in use, else 0; as in :class:`WindowAttentionV2`.
        **options: the other arguments of :class:`SwinPyramid`; ``qk_scale`` is learned in V2 and must be None.
    """

    attention_type = WindowAttentionV2
    block_type = SwinBlockV2
    merging_type = PatchMergingV2

    def __init__(
        self,
        *,
        window_size: int | Size | Sequence[int | Size] = 8,
        pretrained_window_sizes: Sequence[int | Size] = (0, 0, 0, 0),
        depths: Sequence[int] = (2, 2, 6, 2),
        qk_scale: float | None = None,
        **options: Any,
    ) -> None:
        if qk_scale is not None:
            reject('qk_scale', qk_scale, 'None: V2 learns the scale of its attention scores')
        depths = require_depths('depths', depths)
        self._pretrained_windows = require_pretrained_windows(
            'pretrained_window_sizes', pretrained_window_sizes, depths
        )
        super().__init__(window_size=window_size, depths=depths, **options)
        # With the norm at the end of each branch, zero lets training start from the identity, as in the official code.
        for module in self.modules():
            if isinstance(module, SwinBlock):
                for norm in (module.norm1, module.norm2):
                    if isinstance(weight := getattr(norm, 'weight', None), Tensor):
                        nn.init.zeros_(weight)

    def _attention_options(self, stage: int) -> dict[str, Any]:
        return {'pretrained_window': self._pretrained_windows[stage]}


def _init_linear(module: nn.Module) -> None:
    """Initialise linear layers as the official code does; norms and convolutions keep PyTorch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
