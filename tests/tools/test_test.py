import copy
import json
import pickle

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from support.processes import in_processes, run_main, run_on_a_full_disk
from support.tool_fixtures import Bomb, last_checkpoint, run_tool

from swin_mm.engine.tta import apply_tta
from swin_mm.utils.errors import InputError


def metrics(work_dir):
    """The metrics that the run has written."""
    (path,) = work_dir.glob('*/*.json')
    return json.loads(path.read_text())


def test_metrics_predictions_and_pictures(tiny, trained, tmp_path):
    checkpoint = last_checkpoint(trained[0])
    out = 'new/predictions.pkl' if tiny.task == 'detection' else 'new/masks'
    options = ('--work-dir', 'tested', '--out', out, '--show-dir', 'drawn')
    output = run_tool('test', tiny.config, checkpoint, *options, cwd=tmp_path)
    measured = metrics(tmp_path / 'tested')
    assert f'{tiny.metric}: {measured[tiny.metric]:.4f}' in output
    # The model is that of the checkpoint: training has tested it, too.
    assert f'{tiny.metric}: {measured[tiny.metric]:.4f}' in trained[1]
    # Folders are where the shell's user means them, one picture for each image, under its name.
    assert sorted(path.name for path in (tmp_path / 'drawn').iterdir()) == ['1.png', '2.png']
    drawn = np.asarray(Image.open(tmp_path / 'drawn/1.png'))
    assert drawn.shape == (64, 192, 3), 'the ground truth stands beside the prediction'

    if tiny.task == 'detection':
        predictions = pickle.loads((tmp_path / out).read_bytes())
        assert sorted(prediction['img_path'][-5:] for prediction in predictions) == ['1.jpg', '2.jpg']
        assert all('masks' in prediction['pred_instances'] for prediction in predictions)
    else:
        for name in ('1.png', '2.png'):
            mask = np.asarray(Image.open(tmp_path / out / name))
            # Class numbers from 0, as tools/predict.py writes them; mmseg's own would be 1 and 2 here.
            assert mask.shape == (64, 96) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}


def test_time_augmentation(tiny, trained, tmp_path):
    # Segmentation has a pipeline of its own in the stock config: both are to take the default.
    own = ('--cfg-options', 'tta_pipeline=None') if tiny.task == 'segmentation' else ()
    output = run_tool(
        'test',
        tiny.config,
        last_checkpoint(trained[0]),
        '--work-dir',
        'x',
        '--tta',
        '--dtype',
        'bf16',
        *own,
        cwd=tmp_path,
    )
    assert tiny.metric in metrics(tmp_path / 'x')
    if tiny.task == 'detection':
        assert 'masks are left out' in output and 'coco/segm_mAP' not in metrics(tmp_path / 'x')


def test_augmented_views(tiny, tool):
    cfg = Config.fromfile(tiny.config)
    cfg.pop('tta_pipeline', None)
    plain = build(cfg)[0]
    apply_tta(cfg)
    views = build(cfg)[0]
    assert [view.flip for view in views['data_samples']] == [False, True]
    assert torch.equal(views['inputs'][0], plain['inputs'])
    assert torch.equal(views['inputs'][1], plain['inputs'].flip(-1))
    if tiny.task == 'segmentation':  # what the merged prediction is measured against is not flipped
        assert torch.equal(views['data_samples'][0].gt_sem_seg.data, plain['data_samples'].gt_sem_seg.data)


def build(cfg):
    """The data set that the config tests on."""
    init_default_scope(cfg.default_scope)
    return DATASETS.build(copy.deepcopy(cfg.test_dataloader.dataset))


def test_says_what_input_is_missing(tiny, refuse, trained, tmp_path):
    checkpoint = last_checkpoint(trained[0])
    assert 'config nowhere.py does not exist' in refuse('test', 'nowhere.py', checkpoint)
    assert 'checkpoint absent.pth does not exist' in refuse('test', tiny.config, 'absent.pth')
    error = refuse('test', tiny.config, checkpoint, '--cfg-options', 'test_dataloader.dataset.data_root=/nowhere')
    assert '/nowhere (test_dataloader: data_root)' in error
    if tiny.task == 'detection':
        error = refuse('test', tiny.config, checkpoint, '--cfg-options', 'test_evaluator.ann_file=/nowhere.json')
        assert '/nowhere.json (test_evaluator: ann_file)' in error
    none = 'visualizer=None'
    assert 'visualizer' in refuse('test', tiny.config, checkpoint, '--show-dir', 'x', '--cfg-options', none)
    (tmp_path / 'file').touch()
    assert 'is a file' in refuse('test', tiny.config, checkpoint, '--show-dir', 'file/x')
    out = 'file/x.pkl' if tiny.task == 'detection' else 'file/x'
    assert 'is a file' in refuse('test', tiny.config, checkpoint, '--out', out)


def test_says_which_kind_of_output_it_saves(tiny, refuse, trained, tmp_path):
    wrong, right = ('masks', '*.pkl') if tiny.task == 'detection' else ('predictions.pkl', 'name a folder')
    assert right in refuse('test', tiny.config, last_checkpoint(trained[0]), '--out', wrong)


def test_refuses_a_checkpoint_that_is_damaged_or_runs_code(tiny, refuse, trained, tmp_path):
    whole = last_checkpoint(trained[0]).read_bytes()
    (tmp_path / 'half.pth').write_bytes(whole[: len(whole) // 2])
    assert 'half.pth' in refuse('test', tiny.config, 'half.pth')
    torch.save({'state_dict': {}, 'meta': Bomb(tmp_path / 'exploded')}, tmp_path / 'bomb.pth')
    assert 'bomb.pth wants to run code' in refuse('test', tiny.config, 'bomb.pth')
    assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize('damage', ['missing', 'renamed', 'reshaped'])
def test_a_checkpoint_without_a_head_is_refused(tiny, trained, damage, tmp_path, capfd):
    content = torch.load(last_checkpoint(trained[0]), weights_only=False)
    head = 'roi_head.bbox_head.fc_cls.' if tiny.task == 'detection' else 'decode_head.conv_seg.'
    state = content['state_dict']
    for key in [key for key in state if key.startswith(head)]:
        value = state.pop(key)
        if damage != 'missing':
            state[f'other.{key}' if damage == 'renamed' else key] = torch.zeros(7, *value.shape[1:])
    torch.save(content, tmp_path / 'x.pth')
    tools = [('test', tiny.config, tmp_path / 'x.pth')]
    if damage == 'missing':  # the check is the same
        tools.append(('train', tiny.config, '--resume', tmp_path / 'x.pth'))
    for tool in tools:
        assert in_processes((run_main, *tool, '--work-dir', tmp_path / 'work')) == [2]
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith('error: checkpoint ') and f'x.pth does not cover the whole model: {head}' in error


def test_a_full_disk_leaves_no_part_of_the_predictions(tiny, trained, tmp_path, capfd):
    out = tmp_path / ('predictions.pkl' if tiny.task == 'detection' else 'masks')
    arguments = (tiny.config, last_checkpoint(trained[0]), '--work-dir', tmp_path / 'work', '--out', out)
    assert in_processes((run_on_a_full_disk, out.suffix or '.png', 'test', *arguments)) == [2]
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert 'cannot be written: No space left on device' in error and 'GB are free there' in error
    assert [path for path in tmp_path.rglob('*') if path.suffix in ('.pkl', '.png')] == []


def test_augmentation_of_masks_alone_is_refused(tool):
    cfg = Config({'default_scope': 'mmdet', 'model': {'type': 'Mask2Former', 'panoptic_head': {}}})
    with pytest.raises(InputError, match='merges boxes only, and Mask2Former predicts masks'):
        apply_tta(cfg)
