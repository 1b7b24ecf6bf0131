"""tools/plug.py and tools/train.py --plug: output, options, bad input."""

import pytest
from mmengine.config import Config
from support.processes import run_forked
from support.tool_fixtures import CLASSES

STOCK = 'mmdet::atss/atss_r50_fpn_1x_coco.py'

# A stock ResNet config on the tiny data.
FCN = """
_base_ = 'mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py'
metainfo = dict(classes={classes}, palette=[[255, 0, 0], [0, 255, 0]])
dataset = dict(type='BaseSegDataset', reduce_zero_label=True, data_root=r'{data}/ade', metainfo=metainfo)
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (96, 64)
train_pipeline[3].crop_size = (64, 64)
model = dict(data_preprocessor=dict(size=(64, 64)))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    pipeline=train_pipeline, **dataset))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=1, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


def call(tool, monkeypatch, *arguments):
    """Run the tool in this process; its exit code."""
    module = tool('plug')
    monkeypatch.setattr('sys.argv', ['plug', *map(str, arguments)])
    return module.cli.run(module.main, module.parse_args())


def test_writes_what_it_shows(tool, monkeypatch, tmp_path, capsys):
    arguments = [STOCK, '--arch', 's', '--v2', '--checkpoint', 'mine.pth', '--out', tmp_path / 'out.py']
    assert call(tool, monkeypatch, *arguments) == 0
    assert "+ model.backbone.type = 'swin_mm.SwinTransformerV2'" in capsys.readouterr().out.splitlines()
    backbone = Config.fromfile(tmp_path / 'out.py').model.backbone
    assert (backbone.type, backbone.arch) == ('swin_mm.SwinTransformerV2', 's')
    assert backbone.init_cfg.checkpoint == 'mine.pth'


def test_notes_are_printed(tool, monkeypatch, capsys):
    assert call(tool, monkeypatch, 'mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-80k_ade20k-512x512.py') == 0
    lines = capsys.readouterr().out.splitlines()
    note = (
        'check: decode_head (ASPPHead) reads maps of stride 32, before 8; dilations (1, 12, 24, 36) became (1, 3, 6, 9)'
    )
    assert note in lines
    assert '+ model.decode_head.dilations = (1, 3, 6, 9)' in lines


def test_flat_output_in_a_new_folder(tool, monkeypatch, tmp_path):
    out = tmp_path / 'new/folder/out.py'
    assert call(tool, monkeypatch, STOCK, '--out', out, '--flat') == 0
    assert '_base_ = ' not in out.read_text()
    assert Config.fromfile(out).model.backbone.out_indices == (1, 2, 3)


def test_replaces_a_file_only_by_force(tool, monkeypatch, refuse, tmp_path):
    out = tmp_path / 'out.py'
    out.write_text('precious = 1')
    assert 'exists; give another --out, or --force' in refuse('plug', STOCK, '--out', out)
    assert out.read_text() == 'precious = 1'
    assert call(tool, monkeypatch, STOCK, '--out', out, '--force') == 0
    assert Config.fromfile(out).model.backbone.type == 'swin_mm.SwinTransformer'


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['nowhere.py'], 'config nowhere.py does not exist'),
        (['mmdet::nowhere.py'], 'config mmdet::nowhere.py cannot be read'),
        (['mmdet::ssd/ssd300_coco.py', '--out', 'out.py'], 'cannot be plugged: SSDVGG is part of the method'),
        ([STOCK, '--out', '/proc/missing/out.py'], '/proc/missing/out.py cannot be written: No such file or directory'),
        ([STOCK, '--flat'], '--flat writes a file; name it with --out'),
    ],
)
def test_refuses(refuse, arguments, message):
    assert message in refuse('plug', *arguments)


def test_train_plugs_and_trains(data, tmp_path):
    pytest.importorskip('mmseg')
    (tmp_path / 'fcn.py').write_text(FCN.format(data=data, classes=CLASSES))
    options = ['--plug', 't', '--work-dir', 'run', '--cfg-options', 'model.backbone.init_cfg=None']
    options += ['model.backbone.drop_path_rate=0.0']  # of the Swin: options come after plugging
    log = run_forked('train', 'fcn.py', *options, cwd=tmp_path)
    assert 'Iter(train) [1/1]' in log
    used = Config.fromfile(tmp_path / 'run/fcn.py')
    assert used.model.backbone.type == 'swin_mm.SwinTransformer' and used.model.backbone.drop_path_rate == 0
    assert used.model.decode_head.in_channels == 768 and used.optim_wrapper.optimizer.type == 'AdamW'
