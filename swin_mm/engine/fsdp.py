"""Fully sharded data parallel training, sharded by Swin block."""

import re
from typing import Any

from mmengine._strategy import FSDPStrategy as _FSDPStrategy
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from swin_mm.models.swin import SwinBlock


def by_block(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDP's ``auto_wrap_policy``: every Swin block, V1 or V2, is gathered and freed by itself."""
    return recurse or isinstance(module, SwinBlock)


class FSDPStrategy(_FSDPStrategy):
    """mmengine's strategy for FSDP where gradients are clipped, runs resume and single parameters have settings.

    Its own clips every shard by the norm of that shard, passes arguments to PyTorch in an order of before 2.1, and
    does not find ``custom_keys`` that name parameters inside of what is wrapped.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.distributed:
            raise ValueError('FSDP shares a model out over processes; start them with tools/dist_train.sh')

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if get_device() == 'cpu':
            self.model_wrapper['device_id'] = 'cpu'
            self.state_dict_config.offload_to_cpu = False  # not a copy here, and the gathered weights are freed
        return super()._wrap_model(model)

    def build_optim_wrapper(self, optim_wrapper: dict, model: FullyShardedDataParallel) -> OptimWrapper:
        """Build the optimizer over the shards."""
        keys = (optim_wrapper.get('paramwise_cfg') or {}).get('custom_keys', {})
        keys.update({re.sub(r'(blocks\.\d+\.)', r'\1_fsdp_wrapped_module.', key): keys[key] for key in list(keys)})
        result = super().build_optim_wrapper(optim_wrapper, model)
        if result.clip_grad_kwargs and result.grad_name == 'grad_norm':
            result.clip_func = lambda _, **options: model.clip_grad_norm_(**options)
        return result

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``optim_state_dict`` gave."""
        optimizer = self.optim_wrapper.optimizer
        self.optim_wrapper.load_state_dict(self.model.optim_state_dict_to_load(self.model, optimizer, state_dict))
