"""mmengine's Runner, set up as our tools need it."""

import os

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner
from torch.distributed import init_process_group

from swin_mm.openmmlab.config import config_errors
from swin_mm.openmmlab.loading import CompleteBackboneHook, read_for_mmengine


def build_runner(cfg: Config) -> Runner:
    """Build mmengine's Runner, or the one that ``runner_type`` names. On CPUs join the other ranks, if any, first.

    Raises:
        InputError: something in the config cannot be built.
    """
    if cfg.get('launcher') == 'pytorch' and get_device() == 'cpu':
        join_on_cpu(cfg)
    with config_errors(cfg):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(CompleteBackboneHook())
    return runner


def use_safe_reader() -> None:
    """Have mmengine read checkpoints without executing what they contain.

    Its own reader tries that first and then falls back to executing.
    """
    schemes = ['', 'http://', 'https://', 'hf://']
    CheckpointLoader.register_scheme(prefixes=schemes, loader=read_for_mmengine, force=True)
    # The remaining schemes (model zoos, object stores) end in torch.load, which obeys this.
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'


def join_on_cpu(cfg: Config) -> None:
    """Join the ranks that torchrun started and change ``cfg`` to suit; mmengine would look for a GPU of this rank."""
    if not is_distributed():
        init_process_group('gloo')
    unused = cfg.get('find_unused_parameters', False)
    cfg.setdefault('model_wrapper_cfg', dict(broadcast_buffers=False, find_unused_parameters=unused))
    cfg.model_wrapper_cfg.device_ids = None
