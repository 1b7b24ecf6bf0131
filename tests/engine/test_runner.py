"""Settings added to the config before a run, without patching mmengine."""

import os

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.registry import LOOPS
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.checkpoint import load_from_local
from support.tool_fixtures import Bomb
from torch import nn

from swin_mm.checkpoints import CheckpointError
from swin_mm.engine.runner import SafeRunner, build_runner, configure_training, load_complete
from swin_mm.openmmlab.loading import read_for_mmengine
from swin_mm.utils.errors import InputError


def config(**settings):
    loader = dict(batch_size=1, num_workers=2, dataset=dict(type='X'))
    return Config(dict(train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1), train_dataloader=loader) | settings)


def test_mmengine_is_not_patched():
    configure_training(config())
    assert LOOPS.get('EpochBasedTrainLoop') is EpochBasedTrainLoop
    assert LOOPS.get('IterBasedTrainLoop') is IterBasedTrainLoop
    assert type(get_file_backend('x.pth')) is LocalBackend
    assert CheckpointLoader._get_checkpoint_loader('x.pth') is load_from_local
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ


@pytest.mark.parametrize(
    'train_cfg, loop',
    [
        (dict(type='EpochBasedTrainLoop', max_epochs=1, _scope_='swin_mm'), 'ResumableEpochLoop'),
        (dict(type='mmengine.IterBasedTrainLoop', max_iters=1), 'ResumableIterLoop'),
        (dict(type=IterBasedTrainLoop, max_iters=1), 'ResumableIterLoop'),
        (dict(by_epoch=True, max_epochs=1), 'ResumableEpochLoop'),
        (dict(by_epoch=False, max_iters=1), 'ResumableIterLoop'),
    ],
)
def test_the_config_names_our_loop(train_cfg, loop):
    cfg = config(train_cfg=train_cfg)
    configure_training(cfg)
    assert cfg.train_cfg.type == f'swin_mm.engine.loops.{loop}' and LOOPS.get(cfg.train_cfg.type).__name__ == loop
    assert cfg.train_cfg.keys() <= {'type', 'max_epochs', 'max_iters'}


def test_settings_are_added_once_and_user_settings_are_kept():
    cfg = config(
        train_cfg=dict(type='mmdet.TheirLoop'),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=3)),
        custom_hooks=[dict(type='EMAHook')],
    )
    configure_training(cfg)
    once = cfg.to_dict()
    assert once['train_cfg'] == dict(type='mmdet.TheirLoop')
    assert once['default_hooks']['checkpoint'] == dict(
        type='CheckpointHook', interval=3, backend_args=dict(backend='swin_mm')
    )
    assert once['custom_hooks'][0] == dict(type='EMAHook') and len(once['custom_hooks']) == 4
    configure_training(cfg)
    assert cfg.to_dict() == once, 'as for a config that a run has dumped'

    theirs = dict(backend='petrel')
    cfg = config(default_hooks=dict(checkpoint=dict(type='CheckpointHook', backend_args=theirs)))
    cfg.train_dataloader.worker_init_fn = dict(type='their_function')
    configure_training(cfg)
    assert cfg.default_hooks.checkpoint.backend_args == theirs
    assert cfg.train_dataloader.worker_init_fn.type == 'their_function'


def test_checkpoints_run_no_code(tmp_path):
    torch.save({'state_dict': Bomb(tmp_path / 'exploded')}, tmp_path / 'bomb.pth')
    with pytest.raises(CheckpointError, match='wants to run code'):
        read_for_mmengine(str(tmp_path / 'bomb.pth'))
    # When mmengine resumes, it runs the config that a checkpoint carries under this name.
    code = f'open({str(tmp_path / "exploded")!r}, "w")'
    torch.save({'state_dict': {}, 'meta': {'config': code, 'iter': 3}}, tmp_path / 'config.pth')
    assert read_for_mmengine(str(tmp_path / 'config.pth'))['meta'] == {'iter': 3}
    assert not (tmp_path / 'exploded').exists()


def test_a_missing_or_mismatched_head_is_an_error():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    state = model.state_dict()
    load_complete(model, {key: value for key, value in state.items() if 'num_batches' not in key}, 'old.pth')
    for wrong in (
        {key: value for key, value in state.items() if not key.startswith('0.')},
        {key.replace('0.', 'head.'): value for key, value in state.items()},
        state | {'0.weight': torch.zeros(3, 2, 1, 1)},
    ):
        with pytest.raises(CheckpointError, match='x.pth.*0.weight'):
            load_complete(model, wrong, 'x.pth')


def test_other_runner_types_are_rejected():
    with pytest.raises(InputError, match='runner_type'):
        build_runner(Config({'runner_type': 'FlexibleRunner', 'strategy': {'type': 'DeepSpeedStrategy'}}))


def test_an_optimizer_of_another_model_is_refused(monkeypatch):
    def resume(self, filename):
        raise ValueError('loaded state dict contains a parameter group that does not match')

    monkeypatch.setattr(Runner, 'resume', resume)
    with pytest.raises(CheckpointError, match='does not fit this run.*parameter group.*load_from=CHECKPOINT'):
        SafeRunner.__new__(SafeRunner).resume('x.pth')


@pytest.mark.parametrize(
    'dataset, message',
    [
        (
            dict(type='mmseg.BaseSegDataset', img_suffix='.tif'),
            r'no images in .*images \(img_suffix: .tif\).*check_data',
        ),
        (dict(type='mmdet.CocoDataset', ann_file='none.json'), 'no images are left of .*/none.json: see its entries'),
    ],
    ids=['folder', 'annotations'],
)
def test_a_data_set_without_images_is_an_error_with_the_place(dataset, message, tmp_path):
    pytest.importorskip(dataset['type'].partition('.')[0])
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images/a.jpg').touch()
    (tmp_path / 'none.json').write_text('{"images": [], "annotations": [], "categories": []}')
    key = 'img_path' if 'mmseg' in dataset['type'] else 'img'
    dataset |= dict(data_root=str(tmp_path), data_prefix={key: 'images'})
    loader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler'))
    with pytest.raises(InputError, match=message):
        SafeRunner.build_dataloader(loader | dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset)))
