"""The reference implementations, with the same random weights as ours."""

import math
from collections.abc import Iterable

import torch
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from torch import Tensor, nn

import swin_mm

SMALL = {'embed_dims': 32, 'depths': (2, 2, 2, 2), 'num_heads': (1, 2, 4, 8), 'drop_path_rate': 0.0}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value that affects the output: no zero biases, unit norms or zero tables."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + name.endswith('weight'))  # weights of norms are close to one
            elif 'logit_scale' in name:
                parameter.copy_(math.log(10) + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.5 if 'table' in name or 'pos_embed' in name else 0.05))
    return model


def mmdet_twin(**options) -> tuple[nn.Module, nn.Module]:
    """mmdet's Swin and ours with its weights."""
    theirs = randomise(MMDetSwin(**options))
    ours = swin_mm.SwinTransformer(**options)
    ours.load_state_dict(theirs.state_dict())
    theirs.eval()  # its eval() returns None
    return theirs, ours.eval()


def transformers_twin(
    version: int, image_size: int | tuple[int, int], window: int, arch: str = 't', **options
) -> tuple[nn.Module, nn.Module]:
    """transformers' backbone and ours with its weights; V2's has no output norms, so ours get none either."""
    from transformers import SwinBackbone, SwinConfig, Swinv2Backbone, Swinv2Config

    sizes = swin_mm.models.swin.ARCHS[arch]
    config, backbone = ((SwinConfig, SwinBackbone), (Swinv2Config, Swinv2Backbone))[version - 1]
    extra = (
        {'pretrained_window_sizes': options['pretrained_window_sizes']} if 'pretrained_window_sizes' in options else {}
    )
    theirs = backbone(
        config(
            image_size=image_size,
            window_size=window,
            embed_dim=sizes['embed_dims'],
            depths=list(sizes['depths']),
            num_heads=list(sizes['num_heads']),
            out_features=[f'stage{i}' for i in range(1, 5)],
            drop_path_rate=0.0,
            layer_norm_eps=1e-5,
            **extra,
        )
    )
    randomise(theirs)
    ours = (swin_mm.SwinTransformer, swin_mm.SwinTransformerV2)[version - 1](arch=arch, window_size=window, **options)
    missing, unexpected = ours.load_state_dict(_from_transformers(theirs.state_dict()), strict=False)
    assert not unexpected and all(version == 2 and name.startswith('norm') for name in missing), (missing, unexpected)
    if version == 2:
        for i in range(4):
            setattr(ours, f'norm{i}', nn.Identity())
    return theirs.eval(), ours.eval()


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of versions 4 and 5 in ours, written by hand for these tests."""
    renamed = (
        ('swin.', ''),
        ('embeddings.patch_embeddings.projection', 'patch_embed.proj'),
        ('embeddings.norm', 'patch_embed.norm'),
        ('encoder.', ''),
        ('attention.relative_position_bias.relative_position_bias_table', 'attn.relative_position_bias_table'),
        ('attention.self.relative_position_bias_table', 'attn.relative_position_bias_table'),
        ('attention.self.continuous_position_bias_mlp', 'attn.cpb_mlp'),
        ('attention.self.logit_scale', 'attn.logit_scale'),
        ('attention.o_proj', 'attn.proj'),
        ('attention.output.dense', 'attn.proj'),
        ('layernorm_before', 'norm1'),
        ('layernorm_after', 'norm2'),
        ('intermediate.dense', 'mlp.fc1'),
        ('output.dense', 'mlp.fc2'),
        ('hidden_states_norms.stage1', 'norm0'),
        ('hidden_states_norms.stage2', 'norm1'),
        ('hidden_states_norms.stage3', 'norm2'),
        ('hidden_states_norms.stage4', 'norm3'),
    )
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if 'relative_position_index' in key or 'relative_coords_table' in key or key.startswith('swin.layernorm.'):
            continue
        for theirs, mine in renamed:
            key = key.replace(theirs, mine)
        block, _, rest = key.partition('.attention.')
        if rest:
            role, kind = rest.removeprefix('self.').replace('_proj', '').replace('query', 'q').rsplit('.', 1)
            role = {'key': 'k', 'value': 'v'}.get(role, role)
            parts.setdefault(block, {})[f'{role}.{kind}'] = value
        else:
            ours[key] = value
    for block, part in parts.items():
        ours[f'{block}.attn.qkv.weight'] = torch.cat([part[f'{role}.weight'] for role in 'qkv'])
        if 'k.bias' in part:
            ours[f'{block}.attn.qkv.bias'] = torch.cat([part[f'{role}.bias'] for role in 'qkv'])
        else:
            ours[f'{block}.attn.q_bias'], ours[f'{block}.attn.v_bias'] = part['q.bias'], part['v.bias']
    return ours


def relative_error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest deviation of any tensor in units of the largest value expected in it."""
    pairs = list(zip(actual, expected, strict=True))
    assert all(a.shape == e.shape for a, e in pairs), [(a.shape, e.shape) for a, e in pairs]
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)


def scale_parameters(model: nn.Module) -> None:
    """Multiply all parameters by 1.5, in place. A spawned process can import this module, but not a test module."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
