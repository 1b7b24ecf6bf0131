"""The demo's scenes: repeatable, honest between splits, and the same in both layouts."""

import hashlib
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

TOOL = Path(__file__).parents[2] / 'tools/make_demo_data.py'


def make(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), str(out), '--train', '30', '--val', '15', '--size', '128', *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('demo') / 'data'
    result = make(out)
    assert result.returncode == 0, result.stderr
    return out


def content(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob('*') if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_the_seed_alone_decides(scenes, tmp_path):
    assert make(tmp_path / 'again').returncode == 0
    assert content(tmp_path / 'again') == content(scenes)
    assert make(tmp_path / 'other', '--seed', '1').returncode == 0
    assert content(tmp_path / 'other').keys() == content(scenes).keys()
    assert content(tmp_path / 'other')['train/00001.jpg'] != content(scenes)['train/00001.jpg']


@pytest.mark.parametrize('split', ['train', 'val'])
def test_ground_truth_as_detections_scores_one(scenes, split):
    truth = COCO(scenes / f'annotations/instances_{split}.json')
    assert len(truth.getCatIds()) == 10
    detections = truth.loadRes([dict(a, score=1.0) for a in truth.dataset['annotations']])
    for kind in ('bbox', 'segm'):
        evaluation = COCOeval(truth, detections, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == 1.0


def covered_by_none(truth: COCO, image: dict) -> np.ndarray:
    masks = [rle.decode(a['segmentation']) for a in truth.imgToAnns[image['id']]]
    return ~np.any(masks, axis=0)


@pytest.mark.parametrize('split, ade', [('train', 'training'), ('val', 'validation')])
def test_both_layouts_show_the_same_scenes(scenes, split, ade):
    truth = COCO(scenes / f'annotations/instances_{split}.json')
    for image in truth.dataset['images']:
        name = image['file_name']
        assert (scenes / split / name).read_bytes() == (scenes / 'images' / ade / name).read_bytes()
        semantic = cv2.imread(str(scenes / 'annotations' / ade / name.replace('jpg', 'png')), cv2.IMREAD_UNCHANGED)
        photograph = semantic[covered_by_none(truth, image)]
        assert len(set(photograph.tolist())) == 1 and photograph[0] in (1, 2)
        expected = np.full_like(semantic, photograph[0])
        covered = np.zeros_like(semantic)
        for annotation in truth.imgToAnns[image['id']]:
            mask = rle.decode(annotation['segmentation'])
            assert annotation['area'] == mask.sum() > 0
            covered += mask
            expected[mask > 0] = 3
        assert covered.max() <= 1  # what one digit hides of another belongs to the first alone
        assert np.array_equal(semantic, expected)


def test_splits_share_neither_digits_nor_photographs():
    """Taken apart as the tool takes them: the samples that `write_split` draws from, compared by their pixels."""
    from sklearn.datasets import load_digits

    sys.path.insert(0, str(TOOL.parent))
    try:
        from make_demo_data import SPLITS
    finally:
        sys.path.remove(str(TOOL.parent))
    (_, _, width, writers), (_, _, other_width, other_writers) = SPLITS.values()
    assert width[1] <= other_width[0]
    assert writers[1] <= other_writers[0]
    images = load_digits().images
    cut = int(len(images) * writers[1])
    assert not {i.tobytes() for i in images[:cut]} & {i.tobytes() for i in images[cut:]}


def test_nothing_is_replaced_unless_asked_for(scenes, tmp_path):
    before = content(scenes)
    result = make(scenes)
    assert (result.returncode, result.stdout) == (2, '')
    assert 'exists' in result.stderr and '--force' in result.stderr and 'Traceback' not in result.stderr
    assert content(scenes) == before
    out = tmp_path / 'data'
    out.mkdir()
    (out / 'old').touch()
    assert make(out, '--force').returncode == 0
    assert content(out) == before


def test_bad_sizes_leave_nothing(tmp_path):
    result = make(tmp_path / 'data', '--size', '10')
    assert result.returncode == 2
    assert 'at least 96' in result.stderr
    assert list(tmp_path.iterdir()) == []
