import json
import re
import shutil

import pytest
from support.tool_fixtures import make_tiny

from swin_mm import cli


def run(tool, monkeypatch, *arguments):
    module = tool('check_data')
    monkeypatch.setattr('sys.argv', ['check_data', *map(str, arguments), '--workers', '1'])
    return cli.run(module.main, module.parse_args())


def test_clean_data(tiny, tool, monkeypatch, tmp_path, capsys):
    assert run(tool, monkeypatch, tiny.config, '--out', tmp_path / 'out') == 0
    printed = capsys.readouterr().out
    assert 'no problems found' in printed and 'val, test' in printed
    # Six scenes with one 20 x 20 square each, partly under a bar of 40 x 12.
    bars = 6 if tiny.task == 'detection' else 6 * 40 * 12
    assert re.search(rf'bar.*{bars:,} \(', printed)
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'classes.png', 'sizes.png', 'problems.txt'}


def test_the_exit_code_is_1_for_faults_and_0_for_notes(tiny, data, tool, monkeypatch, tmp_path, capsys):
    own = tmp_path / 'data'
    shutil.copytree(data, own)
    config = make_tiny(tiny.task, own, tmp_path).config
    assert run(tool, monkeypatch, config, '--part', 'train') == 0
    assert 'note: schedule' in capsys.readouterr().out  # six images, and a warm-up of a long training
    for path in (own / 'coco/train2017/1.jpg', own / 'ade/images/training/1.jpg'):
        path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(SystemExit, match='1 problem found'):
        run(tool, monkeypatch, config, '--part', 'train', '--out', tmp_path / 'out')
    assert 'files that cannot be decoded: 1' in capsys.readouterr().out
    assert '1.jpg: image file is truncated' in (tmp_path / 'out/problems.txt').read_text()


def test_markup_in_class_names(data, tool, monkeypatch, tmp_path, capsys):
    own = tmp_path / 'data'
    shutil.copytree(data, own)
    config = make_tiny('detection', own, tmp_path).config
    config.write_text(config.read_text().replace("('square', 'bar')", "('[/b]', '$x_{$')"))
    for path in (own / 'coco/annotations').iterdir():
        content = json.loads(path.read_text())
        content['categories'] = [{'id': 1, 'name': '[/b]'}, {'id': 2, 'name': '$x_{$'}]
        path.write_text(json.dumps(content))
    assert run(tool, monkeypatch, config, '--out', tmp_path / 'out') == 0
    printed = capsys.readouterr().out
    assert '[/b]' in printed and '$x_{$' in printed


def test_bad_input_is_refused(refuse, tiny, tmp_path):
    absent = 'train_dataloader.dataset.data_root=/nowhere'
    assert '/nowhere (train_dataloader: data_root)' in refuse('check_data', tiny.config, '--cfg-options', absent)
    if tiny.task == 'detection':
        kind = ['train_dataloader.dataset.type=XMLDataset', 'train_dataloader.dataset.img_subdir=x']
        assert 'train: XMLDataset cannot be checked' in refuse('check_data', tiny.config, '--cfg-options', *kind)
        pickled = 'train_dataloader.dataset.proposal_file=x.pkl'
        assert 'can run code' in refuse('check_data', tiny.config, '--cfg-options', pickled)
    (tmp_path / 'bare.py').write_text("default_scope = 'mmdet'\nmodel = dict()\n")
    assert '--workers' in refuse('check_data', tiny.config, '--workers', '0')
    assert 'no val_dataloader' in refuse('check_data', 'bare.py', '--part', 'val')
