"""tools/model_info.py: its tables and errors."""

import pytest
from mmengine.config import Config

from swin_mm import cli
from swin_mm.analysis import complexity


@pytest.fixture
def model_info(tool, monkeypatch):
    """Run the tool in this process and return its exit code."""

    def call(*arguments):
        module = tool('model_info')
        monkeypatch.setattr('sys.argv', ['model_info', *map(str, arguments)])
        monkeypatch.setenv('COLUMNS', '160')
        return cli.run(module.main, module.parse_args())

    return call


def test_tables(model_info, tiny, capsys):
    assert model_info(tiny.config, '--size', '90x62', '--batch', '2') == 0
    text = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in map(str.split, text.splitlines()) if row}
    config = Config.fromfile(tiny.config)
    parameters = sum(p.numel() for p in complexity.build(config).parameters())
    macs = sum(complexity.multiply_adds(config, 90, 62).values())
    assert rows['total'][:2] == [f'{parameters:,}', f'{macs / 1e9:.2f}'] and len(rows['total']) == 4
    assert rows['backbone.norm*'][0] == '480' and complexity.ELSEWHERE not in rows
    assert 'image of 90 × 62; kept with a batch of 2' in text
    assert rows['0'][3] == '16×23' and rows['0'][6:8] == ['21×28', '12']


def test_markdown(model_info, tiny, tmp_path, capsys):
    marked = tmp_path / '[bold]x[-b].py'
    marked.write_text(f"_base_ = r'{tiny.config}'\n")
    assert model_info(tiny.config, marked, '--size', '96x64', '--markdown') == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2] == lines[3].replace('[bold]x[-b]', 'tiny')
    total = sum(p.numel() for p in complexity.build(Config.fromfile(tiny.config)).parameters())
    assert lines[2].startswith(f'| tiny | {total:,} | ') and lines[2].endswith(' | 96 × 64 |')


def test_markup_in_a_name_is_printed_as_it_is(model_info, tiny, tmp_path, capsys):
    marked = tmp_path / 'a[bold]b.py'
    marked.write_text(f"_base_ = r'{tiny.config}'\n")
    assert model_info(marked, '--size', '96x64') == 0
    assert 'a[bold]b, image of 96 × 64' in capsys.readouterr().out


def test_bad_input_is_named(refuse, tiny, tmp_path):
    assert '--batch 0' in refuse('model_info', tiny.config, '--batch', '0')
    (tmp_path / 'none.py').write_text('model = dict()')
    assert 'not a detector or a segmentor' in refuse('model_info', 'none.py', '--size', '64x64')
    assert 'give the size' in refuse('model_info', 'none.py')
    assert 'cannot be built' in refuse('model_info', tiny.config, '--cfg-options', 'model.backbone.depths=[1,1]')
    assert "--size 64: expected two whole numbers with 'x'" in refuse('model_info', tiny.config, '--size', '64')
