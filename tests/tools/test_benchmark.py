"""tools/benchmark.py: its arithmetic on known numbers, what it counts and in which order, and tiny runs of it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support.tool_fixtures import ROOT
from torch import nn


@pytest.fixture
def benchmark(tool, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools')  # where its parts are
    return tool('benchmark')


@pytest.fixture
def candidates(benchmark):
    return sys.modules['benchmark_candidates'].CANDIDATES


@pytest.fixture
def run(benchmark, monkeypatch, tmp_path):
    """Call the tool in this process on tiny models: its exit code and what it wrote."""

    def call(*arguments):
        monkeypatch.setattr('sys.argv', ['benchmark', '--quick', '--device', 'cpu', '--out', str(tmp_path), *arguments])
        code = benchmark.main(benchmark.parse_args())
        return code, json.loads((tmp_path / 'benchmark.json').read_text())

    return call


def result(**seconds):
    """Times as the tool measures them: 1000 operations on 4 images, beside a product of matrices of side 10."""
    rows = {name: {} for name in seconds if name != 'matmul'}
    return {'name': 'a case', 'case': {'batch': 4}, 'flops': 1000, 'cube': 10, 'rows': rows, 'seconds': seconds}


def test_ratios_are_taken_round_by_round(benchmark):
    # The machine is three times as slow in the second round; the ratio of the medians would be 3.
    measured = result(matmul=[1, 3, 2], mmdet=[2, 6, 6], ours=[1, 3, 2])
    measured['seconds'] |= {'mmdet+compile': [8, 8, 8], 'ours+compile': [1, 1, 4], 'ours+backbone': [0.5, 1.5, 0.5]}
    measured['rows'] |= {'mmdet+compile': {}, 'ours+compile': {}, 'ours+backbone': {}}
    benchmark.report.summarise(measured)
    rows = measured['rows']
    assert rows['mmdet']['ratio'] == [2, 2, 2.5]
    assert rows['ours']['ms'] == [2000, 1500, 2500] and rows['ours']['images_per_s'] == 2
    assert rows['ours']['floor'] == [2, 2, 2]  # half a product of 2000 operations
    assert rows['mmdet+compile']['ratio'][0] == 8  # over ours compiled
    assert rows['ours+backbone']['share'] == [0.5, 0.375, 0.5]
    assert 'ratio' not in rows['ours'] and 'share' not in rows['ours']


@pytest.mark.parametrize(
    'kind, asked, measured, verdict',
    [
        ('ratio', 2.0, 2.0, 'met'),
        ('ratio', 2.1, 2.0, 'not met'),
        ('ms', 250.0, 200.0, 'met'),
        ('ms', 150.0, 200.0, 'not met'),
        ('floor', 0.1, 0.2, 'not met'),
        ('memory', 0.65, 0.5, 'met'),
        ('memory', 0.45, 0.5, 'not met'),
    ],
)
def test_bars(benchmark, kind, asked, measured, verdict):
    each = {'name': 'a case', 'seconds': {'mmdet': [2, 3, 8], 'ours': [1, 3, 2]}}
    each['rows'] = {'mmdet': {'memory': 10}, 'ours': {'ms': [200.0, 1, 2], 'floor': [0.2], 'memory': 5}}
    bar = benchmark.Bar('a case', kind, asked)
    judged = bar.judge([{'name': 'another'}, each])
    assert (judged['measured'], judged['verdict']) == (measured, verdict)
    for absent in ([], [each | {'seconds': {}}]):
        assert bar.judge(absent)['verdict'] == 'not measured'


def test_turns_alternate(benchmark, monkeypatch):
    order = []
    monkeypatch.setattr(benchmark, 'SAMPLE', 0)
    times = {'slow': 0.002, 'fast': 0.001}
    monkeypatch.setattr(benchmark, 'seconds_per_call', lambda work, calls, device: work())
    works = {name: lambda name=name: order.append(name) or times[name] for name in times}
    seconds = benchmark.take_turns(works, SimpleNamespace(device='cpu', quick=True))
    assert order == ['slow', 'fast', 'slow', 'fast', 'fast', 'slow']  # once to learn how long it takes
    assert seconds == {'slow': [0.002] * 2, 'fast': [0.001] * 2}


class Known(nn.Module):
    """Holds 1 MB of weights and, at its peak, two of the three tensors of 4 MB that it makes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 << 18))

    def forward(self, image):
        a = torch.zeros(1 << 20)
        b = a + 1
        del a
        return (b + 1,)


def test_memory_is_the_peak_of_what_lives_at_once(benchmark, candidates, monkeypatch):
    monkeypatch.setitem(candidates, 'known', lambda arch, size: Known())
    case = benchmark.Case('inference', 'fp32', (8, 8))
    _, _, peak = benchmark.Bench(case, 'cpu', {}, True).start('known')
    assert peak / (1 << 20) == pytest.approx(9, abs=0.01)


def test_operations_are_those_of_the_architecture(benchmark):
    arch, (tokens, channels, macs) = benchmark.ARCHS['t'], (56 * 56, 96, 56 * 56 * 96 * 48)
    for stage, depth in enumerate(arch['depths']):  # 224 needs no padding
        macs += depth * tokens * (12 * channels**2 + 2 * 49 * channels)
        if stage < 3:
            tokens, channels = tokens // 4, channels * 2
            macs += tokens * 2 * channels * channels
    for what, factor in (('inference', 1), ('training', 3)):
        assert benchmark.count_flops(benchmark.Case(what, 'fp32', (224, 224), 2), arch) == 2 * 2 * macs * factor


def test_a_preset_from_end_to_end(benchmark, run, capsys, tmp_path):
    """That of a GPU, its bars' cases and one more: eager, compiled, and training."""
    code, written = run('--preset', 'gpu', '--what', 'inference', '--dtypes', 'fp32', '--sizes', '64', '--batches', '1')
    assert code == 0
    names = []
    for each in written['results']:
        rows = each['rows']
        names += rows
        assert all('note' not in row and row['memory'] > 0 for row in rows.values()), rows
        assert all(0 <= row['deviation'] <= benchmark.TOLERANCES[each['case']['dtype']] for row in rows.values())
    assert (names.count('mmdet'), names.count('ours'), names.count('ours/sdpa'), names.count('ours+compile')) == (
        4,
        4,
        3,
        2,
    )
    assert len(written['bars']) == 8 and {bar['verdict'] for bar in written['bars']} <= {'met', 'not met'}
    printed = capsys.readouterr().out
    assert 'ours+compile' in printed and '≤ 0.65' in printed and 'copies' in printed
    with Image.open(tmp_path / 'benchmark.png') as picture:
        assert picture.width > 1000


def test_wrong_and_failing_candidates_are_told(candidates, run, monkeypatch, capsys):
    build = candidates['ours']

    def crossed(arch, size):
        model = build(arch, size)
        model.forward = lambda image: type(model).forward(model, image.transpose(2, 3))
        return model

    def failing(arch, size):
        raise RuntimeError('no room\nfor it')

    monkeypatch.setitem(candidates, 'ours/reference', crossed)
    monkeypatch.setitem(candidates, 'ours/sdpa', failing)
    code, written = run('--sizes', '64', '--kernels', 'auto,reference,sdpa')
    (each,) = written['results']
    assert code == 1
    assert each['rows']['ours/reference']['note'].startswith('wrong: differs from mmdet by ')
    assert each['rows']['ours/sdpa']['note'] == 'failed: RuntimeError: no room for it'
    assert 'note' not in each['rows']['ours'] and len(each['seconds']['ours']) == 2
    assert 'wrong: differs' in capsys.readouterr().out


def test_growth_is_drawn_with_its_power(benchmark, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr('matplotlib.pyplot.close', drawn.append)
    results = []
    for side, batch in ((100, 1), (200, 1), (400, 1), (100, 2), (100, 4)):
        pixels = side * side * batch
        row = {'ms': [pixels**1.5, 0, 0], 'memory': pixels}
        results.append({'case': {'size': (side, side), 'batch': batch}, 'rows': {'ours': row, 'mmdet': {'note': ''}}})
    benchmark.report.plot_growth(results, tmp_path / 'growth.png')
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in drawn[0].axes]
    assert legends[0] == ['ours, larger images: 1.50', 'ours, more images: 1.50']  # time
    assert legends[1] == ['ours, larger images: 1.00', 'ours, more images: 1.00']  # memory


@pytest.mark.parametrize(
    'task, what',
    [
        ('segmentation', 'inference'),
        pytest.param('segmentation', 'training', marks=pytest.mark.slow),
        pytest.param('detection', 'inference,training', marks=pytest.mark.slow),
    ],
)
def test_whole_models(run, task, what):
    pytest.importorskip('mmseg')
    code, written = run('--preset', 'models', '--task', task, '--what', what)
    assert code == 0, written
    for each in written['results']:
        rows = each['rows']
        assert list(rows) == ['stock', 'ours', 'stock+backbone', 'ours+backbone']
        assert all(row['deviation'] < 1e-3 for row in rows.values())
        assert 0 < rows['ours+backbone']['share'][0] < 1.2


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--against', 'mmdet,detectron2'], 'detectron2 is not known; choose from mmdet, transformers, timm'),
        (['--kernels', 'magic'], 'magic is not known; choose from auto, graphs, reference'),
        (['--sizes', '800x1333x3'], "invalid sizes value: '800x1333x3'"),
        (['--device', 'cpu', '--dtypes', 'fp16'], '--dtypes fp16: on GPUs only'),
        (['--device', 'cpu', '--preset', 'gpu'], '--device cpu --quick tries'),
        (['--frobnicate'], 'unrecognized arguments: --frobnicate'),
        (['--out', __file__], 'is a file, name a folder'),
    ],
)
def test_refuses(benchmark, monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['benchmark', *arguments])
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_args()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())
