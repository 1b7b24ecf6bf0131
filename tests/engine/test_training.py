"""Checks before training, and error messages of a run."""

import errno
import http.server
import logging
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

from swin_mm.engine.training import WarmupCheckHook, changed_data, explained, require_init_checkpoints, set_start
from swin_mm.utils.errors import CheckpointError, InputError


def test_changed_training_data_is_reported_without_running_the_old_config(tmp_path):
    old = f"""
open({str(tmp_path / 'exploded')!r}, 'w')
train_dataloader = dict(dataset=dict(ann_file='a.json', data_root='data/old', metainfo=dict(classes=('a', 'b'))))
"""
    new = dict(ann_file='a.json', data_root='data/old', metainfo=dict(classes=['a', 'b']))

    def warnings(**changes):
        return changed_data(old, Config(dict(train_dataloader=dict(dataset=new | changes))))

    assert warnings() == []
    (warning,) = warnings(data_root='data/new')
    assert 'data_root data/old' in warning and 'data/new' in warning
    (warning,) = warnings(metainfo=dict(classes=['a', 'c']))
    assert "('a', 'c')" in warning
    assert changed_data(None, Config(dict(train_dataloader={}))) == changed_data('(', Config({})) == []
    assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize('end, warned', [(200, False), (201, True)])
def test_a_long_warm_up_gives_a_warning(end, warned, caplog):
    cfg = Config(dict(param_scheduler=[dict(type='LinearLR', start_factor=0.001, by_epoch=False, end=end)]))
    runner = SimpleNamespace(cfg=cfg, max_iters=2000, train_dataloader=range(100), logger=logging.getLogger('warmup'))
    with caplog.at_level('WARNING'):
        WarmupCheckHook().before_train(runner)
    assert ('takes 201 of 2000 iterations' in caplog.text) if warned else not caplog.text


WORKER = """Caught InputError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1
swin_mm.utils.errors.InputError: a.jpg cannot be loaded: broken
"""


@pytest.mark.parametrize(
    'error, expected',
    [
        (InputError('a.jpg cannot be loaded: broken'), '^a.jpg cannot be loaded: broken; tools/check_data.py'),
        (InputError(WORKER), '^a.jpg cannot be loaded: broken; tools/check_data.py'),
        (InputError('w/epoch_1.pth cannot be written: No space'), 'GB are free there.*then start again'),
        (OSError(errno.ENOSPC, 'No space left on device', 'scalars.json'), '^scalars.json cannot be written: No space'),
        (InputError('/elsewhere/a.png cannot be written: No space'), 'GB are free there.*choose another folder'),
        (OSError(errno.ENOSPC, 'No space left on device'), 'cannot be written.*choose another --work-dir'),
        (ValueError('Expected more than 1 value per channel when training, got'), 'batch_size=2'),
        (RuntimeError('DataLoader worker (pid 3) is killed by signal: Bus error.'), '--shm-size'),
        (
            RuntimeError('unable to allocate shared memory(shm) for file </torch_3>: No space left on device (28)'),
            'num_workers=0',
        ),
    ],
)
def test_errors_of_a_run_name_the_remedy(error, expected, tmp_path):
    text = str(explained(error, Config(dict(work_dir=str(tmp_path)))))
    assert re.search(expected, text) and '\n' not in text


def test_reason_of_a_workers_exit_is_found():
    error = RuntimeError('DataLoader worker (pid(s) 3) exited unexpectedly')
    error.__cause__ = RuntimeError('DataLoader worker (pid 3) is killed by signal: Bus error.')
    assert '--shm-size' in str(explained(error, Config()))


def test_unknown_errors_are_not_changed(tmp_path):
    for error in (RuntimeError('the loss is infinite'), OSError(errno.ECONNRESET, 'reset')):
        assert explained(error, Config(dict(work_dir=str(tmp_path)))) is error


def test_missing_initial_weights_name_the_setting(tmp_path):
    def model(checkpoint, kind='swin_mm.SwinTransformer'):
        init = dict(type='Pretrained', checkpoint=checkpoint)
        return Config(dict(model=dict(type='X', backbone=dict(type=kind, init_cfg=init))))

    remedy = 'does not exist.*--cfg-options model.backbone.init_cfg.checkpoint=FILE'
    with pytest.raises(CheckpointError, match=remedy):
        require_init_checkpoints(model('absent.pth'))
    with pytest.raises(CheckpointError, match='model.backbone.init_cfg.checkpoint=FILE'):
        require_init_checkpoints(model('http://127.0.0.1:9/absent.pth'))
    require_init_checkpoints(model('torchvision://resnet50', 'mmdet.ResNet'))  # mmengine looks the address up later


def test_weights_that_mmengine_would_download_are_asked_for_before_anything_is_built(tmp_path, monkeypatch):
    """Of modules that are not ours; nothing is downloaded here, so that nothing is downloaded twice."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    init = dict(type='Pretrained', checkpoint='http://127.0.0.1:9/v1/resnet-19c8e357.pth?x=1')
    cfg = Config(dict(model=dict(type='X', heads=[dict(type='Y', init_cfg=init)])))
    with pytest.raises(CheckpointError) as caught:
        require_init_checkpoints(cfg)
    place = tmp_path / 'hub/checkpoints/resnet-19c8e357.pth'
    for part in ('127.0.0.1:9/v1/resnet', f'by hand and save it as {place}', 'model.heads.0.init_cfg.checkpoint=FILE'):
        assert part in str(caught.value)
    place.parent.mkdir(parents=True)
    torch.save({'w': torch.ones(1)}, place)
    require_init_checkpoints(cfg)
    assert CheckpointLoader.load_checkpoint(init['checkpoint'])['w'] == 1, 'mmengine finds it there'

    asked = []

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None:
            """Say nothing."""

    with http.server.HTTPServer(('127.0.0.1', 0), Site) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        init['checkpoint'] = f'http://127.0.0.1:{server.server_port}/resnet.pth'
        require_init_checkpoints(Config(dict(model=dict(type='Y', init_cfg=init))))
    assert asked == ['/resnet.pth'] and len(list(tmp_path.rglob('*.pth'))) == 1


def test_a_missing_start_names_the_option(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), load_from='http://127.0.0.1:9/a.pth', model={}))
    with pytest.raises(CheckpointError, match='get the file a.pth by hand.*--cfg-options load_from=FILE'):
        set_start(cfg, None)
    with pytest.raises(CheckpointError, match='choose another file with --resume FILE'):
        set_start(cfg, 'absent.pth')
