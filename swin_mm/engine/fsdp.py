"""Fully sharded data parallel training, sharded by Swin block."""

import copy
import io
import re
import time
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.fileio import get_file_backend
from mmengine.optim import OptimWrapper
from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

from swin_mm.models.swin import SwinBlock
from swin_mm.openmmlab.loading import read_for_mmengine, require_complete
from swin_mm.utils.errors import DependencyError, InputError

try:
    from mmengine._strategy import FSDPStrategy as _FSDPStrategy  # private; tests/engine/test_fsdp.py guards it
except ImportError as error:
    raise DependencyError(
        'FSDP needs mmengine._strategy.FSDPStrategy, which this mmengine does not have; install the version that is '
        "tested: pip install -c constraints.txt onedl-mmengine, or train with DDP (leave out the config's strategy)"
    ) from error


def by_block(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDP's ``auto_wrap_policy``: every Swin block, V1 or V2, is gathered and freed by itself."""
    return recurse or isinstance(module, SwinBlock)


class FSDPStrategy(_FSDPStrategy):
    """mmengine's strategy for FSDP, with gradient clipping, resuming and settings for single parameters.

    mmengine's own strategy clips every shard by the norm of that shard, passes arguments in the order of PyTorch before
    2.1, does not apply ``custom_keys`` to parameters inside wrapped modules, and does not write checkpoints atomically.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.distributed:
            raise ValueError('FSDP shards a model over several processes; start them with tools/dist_train.sh')

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Build the model, and remember its shapes, which the wrapped model no longer has."""
        result = super().build_model(model)
        self._shapes = copy.deepcopy(result).to('meta')
        return result

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
        """Load a state dict of the optimizer from ``optim_state_dict``."""
        optimizer = self.optim_wrapper.optimizer
        self.optim_wrapper.load_state_dict(self.model.optim_state_dict_to_load(self.model, optimizer, state_dict))

    def load_checkpoint(
        self, filename: str, *, map_location: Any = 'cpu', strict: bool = True, callback: Any = None, **_: Any
    ) -> dict:
        """Load the weights of a checkpoint without running code from it, and return the checkpoint.

        Args:
            filename: the checkpoint.
            map_location: where tensors go.
            strict: the checkpoint must give the whole model, as it must when a run is resumed.
            callback: called with the checkpoint first.

        Raises:
            CheckpointError: it cannot be read, or does not fit.
        """
        self._require_full_state()
        checkpoint = read_for_mmengine(filename, 'cpu' if map_location == 'default' else map_location)
        if callback is not None:
            callback(checkpoint)
        state = checkpoint.pop('state_dict')
        if strict:
            require_complete(self._shapes, state, filename)
        # Backbones compare a checkpoint with their own state, which gathers it: all ranks must take part.
        gathered = FullStateDictConfig(rank0_only=False, offload_to_cpu=self.state_dict_config.offload_to_cpu)
        with FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, gathered):
            self.load_model_state_dict(state)
        return checkpoint

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Any = None,
    ) -> None:
        """Gather the whole state and write it atomically, as one file."""
        self._require_full_state()
        checkpoint = {'state_dict': self.model_state_dict()}  # gathers: every rank takes part
        if save_optimizer and hasattr(self, 'optim_wrapper'):
            checkpoint['optimizer'] = self.optim_state_dict()
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            checkpoint['param_schedulers'] = self.scheduler_state_dict()
        extra = dict(extra_ckpt or {})
        now = time.strftime('%Y%m%d_%H%M%S')
        checkpoint.update(extra, meta={**extra.get('meta', {}), 'seed': self.seed, 'time': now})
        if callback is not None:
            callback(checkpoint)
        if is_main_process():
            buffer = io.BytesIO()
            torch.save(checkpoint, buffer)
            get_file_backend(filename, backend_args={'backend': 'swin_mm'}).put(buffer.getvalue(), filename)

    def _require_full_state(self) -> None:
        if self.state_dict_type is not StateDictType.FULL_STATE_DICT:
            raise InputError("FSDP: set strategy.state_dict_cfg='full'; other checkpoints cannot be resumed or tested")
