"""A model and data for mmengine alone, in fp64, so that results of several processes agree to rounding."""

from pathlib import Path

import torch
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import Tensor, nn

# The data set gives three batches of 4 per epoch, in order.
CONFIG = """
_base_ = {bases}
custom_imports = dict(imports=['swin_mm', 'support.dist_fixtures'])
default_scope = 'mmengine'
backbone = dict(
    type='swin_mm.SwinTransformer', embed_dims=4, depths=(2, 1), num_heads=(1, 1), strides=(4, 2), window_size=4,
    out_indices=(0, 1), drop_path_rate=0.0)
model = dict(type='Toy', backbone=backbone)
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(type='ToyData'), sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'))
# SGD, because AdamW would normalise gradients and so hide a wrong scale.
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.5, momentum=0.9), clip_grad=dict(max_norm=0.05),
    paramwise_cfg=dict(custom_keys={{'layers.0.blocks.0.norm1': dict(lr_mult=0.0)}}))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1), checkpoint=dict(type='CheckpointHook', interval=1))
log_processor = dict(window_size=1)
randomness = dict(seed=0)
env_cfg = dict(dist_cfg=dict(backend='nccl'))  # which OpenMMLab's configs name
"""


def write_config(folder: Path, *bases: Path) -> Path:
    """Write the config into a folder."""
    folder.mkdir(exist_ok=True)
    path = folder / 'toy.py'
    path.write_text(CONFIG.format(bases=[str(base) for base in bases]))
    return path


@DATASETS.register_module()
class ToyData(torch.utils.data.Dataset):
    """Twelve images, each with a number to predict."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(index)
        return torch.randn(3, 32, 40, generator=random).double(), torch.tensor(index / 12).double()


@MODELS.register_module()
class Toy(BaseModel):
    """A Swin and one linear layer per map."""

    def __init__(self, backbone: dict, dtype: str = 'float64') -> None:
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in (4, 8))
        self.to(getattr(torch, dtype))

    def forward(self, images: Tensor, numbers: Tensor, mode: str = 'tensor') -> dict[str, Tensor]:
        maps = self.backbone(images.to(self.heads[0].weight.dtype))
        told = sum(head(x).mean((1, 2, 3)) for head, x in zip(self.heads, maps, strict=True))
        return {'loss': (told - numbers).square().mean()}
