"""mmdet's and mmseg's own tools and functions with our configs, where nothing has imported swin_mm beforehand.

The one line that makes it work is in the config: ``_base_ = __import__('swin_mm').config_path(...)``.
"""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.tool_fixtures import ROOT

import swin_mm
from swin_mm.utils.errors import InputError

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
TOOLS = {name: Path(find_spec(name).origin).parent / '.mim/tools' for name in ('mmdet', 'mmseg')}

SMALLER = """
model = dict(backbone=dict(embed_dims=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)), {heads})
train_dataloader = dict(batch_size=2, dataset=dict({dataset}indices=2))
val_dataloader = dict(dataset=dict({dataset}indices=2))
test_dataloader = val_dataloader
visualizer = dict(vis_backends=[dict(type='LocalVisBackend')])
"""
CONFIGS = {
    'mmdet': "_base_ = __import__('swin_mm').config_path('nuclei/mask-rcnn_swin-nano_fpn_nuclei.py')"
    + SMALLER.format(heads='neck=dict(in_channels=[24, 48, 96, 192])', dataset='')
    + 'train_cfg = dict(max_epochs=1, val_interval=1)\n',
    # mmseg's confusion_matrix takes the classes from the type of the dataset: background and something, in this one.
    'mmseg': "_base_ = __import__('swin_mm').config_path('nuclei/upernet_swin-nano_nuclei.py')"
    + SMALLER.format(
        heads='decode_head=dict(in_channels=[24, 48, 96, 192]), auxiliary_head=dict(in_channels=96)',
        dataset="type='DRIVEDataset', metainfo=None, img_suffix='.jpg', seg_map_suffix='.png', ",
    )
    + 'train_cfg = dict(max_iters=1, val_interval=1)\ndefault_hooks = dict(checkpoint=dict(interval=1))\n',
}
FUNCTIONS = {
    'mmdet': """
import sys
from mmdet.apis import DetInferencer, inference_detector, init_detector
model = init_detector('mmdet.py', 'mmdet/epoch_1.pth', device='cpu')
assert 'swin_mm' in type(model.backbone).__module__, model.backbone
result = inference_detector(model, sys.argv[1])
assert result.pred_instances.masks.shape[1:] == (256, 256), result.pred_instances
inferencer = DetInferencer(model='mmdet.py', weights='mmdet/epoch_1.pth', device='cpu', show_progress=False)
(predicted,) = inferencer(sys.argv[1], no_save_vis=True)['predictions']
assert len(predicted['scores']) == len(result.pred_instances)
""",
    'mmseg': """
import sys
from mmseg.apis import MMSegInferencer, inference_model, init_model
model = init_model('mmseg.py', 'mmseg/iter_1.pth', device='cpu')
assert 'swin_mm' in type(model.backbone).__module__, model.backbone
result = inference_model(model, sys.argv[1]).pred_sem_seg.data
assert result.shape == (1, 256, 256), result
inferencer = MMSegInferencer(model='mmseg.py', weights='mmseg/iter_1.pth', device='cpu')
predicted = inferencer(sys.argv[1], return_datasamples=True).pred_sem_seg.data
assert (predicted == result).all()
""",
}


def programs() -> dict[str, list[str]]:
    """The command line of every program, in an order in which each finds what it reads."""
    image = str(next((ROOT / 'data/nuclei/val').glob('*.jpg')))

    def tool(library: str, name: str, *arguments: str) -> list[str]:
        return [f'{library}_{Path(name).stem}', str(TOOLS[library] / name), f'{library}.py', *arguments]

    commands = [
        tool('mmdet', 'train.py', '--work-dir', 'mmdet'),
        tool('mmdet', 'test.py', 'mmdet/epoch_1.pth', '--work-dir', 'mmdet/test', '--out', 'results.pkl'),
        tool('mmdet', 'analysis_tools/get_flops.py', '--num-images', '1'),
        tool('mmdet', 'analysis_tools/browse_dataset.py', '--not-show', '--output-dir', 'browsed'),
        tool('mmdet', 'analysis_tools/analyze_results.py', 'results.pkl', 'analyzed', '--topk', '1'),
        tool('mmdet', 'analysis_tools/confusion_matrix.py', 'results.pkl', 'confused'),
        ['mmdet_functions', 'mmdet_functions.py', image],
        tool('mmseg', 'train.py', '--work-dir', 'mmseg'),
        tool('mmseg', 'test.py', 'mmseg/iter_1.pth', '--work-dir', 'mmseg/test', '--out', 'maps'),
        tool('mmseg', 'analysis_tools/get_flops.py', '--shape', '256', '256'),
        tool('mmseg', 'analysis_tools/browse_dataset.py', '--not-show', '--output-dir', 'browsed_maps'),
        tool('mmseg', 'analysis_tools/confusion_matrix.py', 'maps', 'confused_maps'),
        ['mmseg_functions', 'mmseg_functions.py', image],
    ]
    return {name: command for name, *command in commands}


QUICK = [f'{library}_{name}' for library in CONFIGS for name in ('train', 'functions')]
SLOW = [name for name in programs() if name not in QUICK]
# What each program prints or writes if it has done its work with our model.
PRINTED = {
    'mmdet_train': r'Saving checkpoint at 1 epochs[\s\S]*coco/segm_mAP: ',
    'mmdet_test': r'coco/bbox_mAP: ',
    'mmdet_get_flops': r'Params: [\d.]+M',
    'mmseg_train': r'Saving checkpoint at 1 iterations[\s\S]*mIoU: ',
    'mmseg_test': r'mIoU: ',
    'mmseg_get_flops': r'Params: [\d.]+M',
}
WRITTEN = {
    'mmdet_test': 'results.pkl',
    'mmdet_browse_dataset': 'browsed/*.jpg',
    'mmdet_analyze_results': 'analyzed/good/*.jpg',
    'mmdet_confusion_matrix': 'confused/confusion_matrix.png',
    'mmseg_test': 'maps/*.png',
    'mmseg_browse_dataset': 'browsed_maps/*.jpg',
    'mmseg_confusion_matrix': 'confused_maps/confusion_matrix.png',
}


def run(folder: Path, names: list[str]) -> dict[str, int]:
    """Run programs in a folder; returns their exit codes."""
    commands = programs()
    process = subprocess.run(
        [sys.executable, str(ROOT / 'tests/support/openmmlab_programs.py')],
        input=json.dumps([[name, *commands[name]] for name in names]),
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def quick(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """The folder in which the quick programs have run, and their exit codes."""
    folder = tmp_path_factory.mktemp('openmmlab_tools')
    (folder / 'data').symlink_to(ROOT / 'data')
    for library, text in CONFIGS.items():
        (folder / f'{library}.py').write_text(text)
        (folder / f'{library}_functions.py').write_text(FUNCTIONS[library])
    return folder, run(folder, QUICK)


@pytest.fixture(scope='module')
def slow(quick) -> tuple[Path, dict[str, int]]:
    """The same folder after the other programs, which read what the quick ones have written."""
    return quick[0], run(quick[0], SLOW)


@pytest.mark.parametrize('name', QUICK)
def test_training_and_functions_of_openmmlab_take_our_configs(name, quick):
    check(name, *quick)


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW)
def test_other_tools_of_openmmlab_take_our_configs(name, slow):
    check(name, *slow)


def check(name: str, folder: Path, codes: dict[str, int]) -> None:
    printed = (folder / f'{name}.txt').read_text()
    assert codes[name] == 0, printed[-3000:]
    assert re.search(PRINTED.get(name, ''), printed), printed[-3000:]
    assert name not in WRITTEN or any(folder.glob(WRITTEN[name])), printed[-3000:]
    assert 'swin_mm is not installed' not in printed and 'registry with scope "swin_mm"' not in printed


def test_unknown_names_suggest_known_ones():
    assert Path(swin_mm.config_path('nuclei/upernet_swin-nano_nuclei.py')).samefile(
        ROOT / 'configs/nuclei/upernet_swin-nano_nuclei.py'
    )
    with pytest.raises(InputError, match='did you mean nuclei/upernet_swin-nano_nuclei.py'):
        swin_mm.config_path('nuclei/upernet_swin-nano_nucleus.py')
    with pytest.raises(InputError, match='the configs are in'):
        swin_mm.config_path('x')
