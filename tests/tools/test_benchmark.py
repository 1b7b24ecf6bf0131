"""The benchmark: its arithmetic on known numbers, what it counts and in which order, and tiny runs of the tool."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.attention_cases import require_triton
from support.tool_fixtures import ROOT
from torch import nn

from benchmarks import count_gpu, measure, presets, report
from benchmarks.candidates import CANDIDATES, OPTIMIZED, Bench, Case
from benchmarks.report import Bar
from swin_mm.models.swin import ARCHS
from swin_mm.utils.compat import TORCH


@pytest.fixture
def run(tool, monkeypatch, tmp_path):
    """Call the tool in this process on tiny models: its exit code and what it wrote."""
    benchmark = tool('benchmark')

    def call(*arguments):
        monkeypatch.setattr('sys.argv', ['benchmark', '--quick', '--device', 'cpu', '--out', str(tmp_path), *arguments])
        code = benchmark.main(benchmark.parse_args())
        return code, json.loads((tmp_path / 'benchmark.json').read_text())

    return call


def result(**seconds):
    """Times as the tool measures them: 1000 operations on 4 images, beside a product of matrices of side 10."""
    rows = {name: {} for name in seconds if name != 'matmul'}
    return {'name': 'a case', 'case': {'batch': 4}, 'flops': 1000, 'cube': 10, 'rows': rows, 'seconds': seconds}


def test_ratios_are_taken_round_by_round():
    # The machine is three times as slow in the second round; the ratio of the medians would be 3.
    measured = result(matmul=[1, 3, 2], mmdet=[2, 6, 6], ours=[1, 3, 2])
    measured['seconds'] |= {'mmdet+compile': [8, 8, 8], 'ours+compile': [1, 1, 4], 'ours+backbone': [0.5, 1.5, 0.5]}
    measured['rows'] |= {'mmdet+compile': {}, 'ours+compile': {}, 'ours+backbone': {}}
    report.summarise(measured)
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
def test_bars(kind, asked, measured, verdict):
    each = {'name': 'a case', 'seconds': {'mmdet': [2, 3, 8], 'ours': [1, 3, 2]}}
    each['rows'] = {'mmdet': {'memory': 10}, 'ours': {'ms': [200.0, 1, 2], 'floor': [0.2], 'memory': 5}}
    bar = Bar('a case', kind, asked)
    judged = bar.judge([{'name': 'another'}, each])
    assert (judged['measured'], judged['verdict']) == (measured, verdict)
    for absent in ([], [each | {'seconds': {}}]):
        assert bar.judge(absent)['verdict'] == 'not measured'


def test_turns_alternate(monkeypatch):
    order = []
    monkeypatch.setattr(measure, 'SAMPLE', 0)
    times = {'slow': 0.002, 'fast': 0.001}
    monkeypatch.setattr(measure, 'seconds_per_call', lambda work, calls, device: work())
    works = {name: lambda name=name: order.append(name) or times[name] for name in times}
    seconds = measure.take_turns(works, 'cpu', quick=True)
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


def test_memory_is_the_peak_of_what_lives_at_once(monkeypatch):
    monkeypatch.setitem(CANDIDATES, 'known', lambda arch, size: Known())
    case = Case('inference', 'fp32', (8, 8))
    _, _, peak = Bench(case, 'cpu', {}, True).start('known')
    assert peak / (1 << 20) == pytest.approx(9, abs=0.01)


def test_operations_are_those_of_the_architecture():
    arch, (tokens, channels, macs) = ARCHS['t'], (56 * 56, 96, 56 * 56 * 96 * 48)
    for stage, depth in enumerate(arch['depths']):  # 224 needs no padding
        macs += depth * tokens * (12 * channels**2 + 2 * 49 * channels)
        if stage < 3:
            tokens, channels = tokens // 4, channels * 2
            macs += tokens * 2 * channels * channels
    for what, factor in (('inference', 1), ('training', 3)):
        assert measure.count_flops(Case(what, 'fp32', (224, 224), 2), arch) == 2 * 2 * macs * factor


@pytest.mark.skipif(TORCH < (2, 5), reason="torch 2.4 does not compile mmdet's Swin for changing sizes")
def test_a_preset_from_end_to_end(run, capsys, tmp_path):
    """That of a GPU, its bars' cases and one more: eager, compiled, and training."""
    code, written = run('--preset', 'gpu', '--what', 'inference', '--dtypes', 'fp32', '--sizes', '64', '--batches', '1')
    assert code == 0
    names = []
    for each in written['results']:
        rows = each['rows']
        names += rows
        assert all('note' not in row and row['memory'] > 0 for row in rows.values()), rows
        assert all(0 <= row['deviation'] <= measure.TOLERANCES[each['case']['dtype']] for row in rows.values())
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


def test_launches_and_bytes_are_counted(tool, monkeypatch, tmp_path, capsys):
    require_triton()
    benchmark = tool('benchmark')
    monkeypatch.setattr('sys.argv', ['benchmark', '--quick', '--preset', 'count', '--out', str(tmp_path)])
    assert benchmark.main(benchmark.parse_args()) == 0
    results = {(r['case'], r['autocast'], r['candidate']): r for r in json.loads((tmp_path / 'count.json').read_text())}
    assert len([name for *_, name in results if name != 'timm']) == 11  # timm is there or not
    for case in {case for case, autocast, _ in results if autocast}:
        ours, theirs = (results[case, True, name] for name in ('ours', 'mmdet'))
        assert ours['launches'] < theirs['launches'] and ours['bytes'] < theirs['bytes']
    assert '≤ 650' in capsys.readouterr().out


@pytest.mark.parametrize('autocast', [False, True])
def test_what_a_launch_and_a_byte_is(autocast):
    """By hand: one product, norm, addition; casts under autocast, of the weight only once; views are free."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, image):
            x = image.permute(0, 2, 3, 1).contiguous().flatten(0, 2)  # 2 x 3 pixels of 4 channels
            x = self.linear(self.linear(x)).view(6, 4)
            return [self.norm(x) + x.expand(6, 4)]

    model = Model().to('meta')
    if not autocast:
        model.to(torch.bfloat16)
    context = count_gpu.EmulatedAutocast(torch.bfloat16) if autocast else nullcontext()
    image = torch.empty(1, 4, 2, 3, device='meta', dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad(), count_gpu.LaunchCounter() as counter, context:
        model(image)
    image, weight, bias = 24, 16, 4
    expected = {'clone': (1, 4 * image), 'addmm': (2, 2 * 2 * (2 * image + weight + bias))}
    expected |= {'native_layer_norm': (1, 2 * 2 * (image + bias)), 'add': (1, 2 * 3 * image)}
    if autocast:
        expected['clone'] = (1, 8 * image)
        expected['_to_copy'] = (4, 6 * (image + weight + bias + image))  # the norm's input back to 32 bits
        expected['native_layer_norm'] = (1, 4 * 2 * (image + bias) + 2 * 4 * 6)  # mean and inverse deviation
        expected['add'] = (1, 4 * image + 2 * image + 4 * image)
    else:
        expected['native_layer_norm'] = (1, expected['native_layer_norm'][1] + 2 * 4 * 6)
    assert {n: (counter.launches[n], counter.bytes[n]) for n in counter.launches} == expected


def test_what_a_compiler_would_fuse():
    """By hand: the additions and the norm beside a product; the sum over rows reads what they write."""

    class Model(nn.Module):
        def forward(self, image):
            x = (image[0, 0] + 1) * 2  # one kernel, which the addition below must not join
            y = F.layer_norm(x @ x + x, (4,)) * 3  # the second, after the product
            return [y, y.sum(0).neg()]  # the third

    with torch.no_grad(), count_gpu.FusionEstimate() as counter:
        Model()(torch.empty(1, 1, 4, 4, device='meta'))
    matrix, row = 4 * 16, 4 * 4
    statistics = 2 * row  # mean and inverse deviation, which nobody reads: eager code writes them
    moved = {'first': 2 * matrix, 'product': 2 * matrix, 'second': 3 * matrix + statistics, 'third': matrix + row}
    assert counter.total() == (4, sum(moved.values()))


def test_wrong_and_failing_candidates_are_told(run, monkeypatch, capsys):
    build = CANDIDATES['ours']

    def crossed(arch, size):
        model = build(arch, size)
        model.forward = lambda image: type(model).forward(model, image.transpose(2, 3))
        return model

    def failing(arch, size):
        raise RuntimeError('no room\nfor it')

    monkeypatch.setitem(CANDIDATES, 'ours/reference', crossed)
    monkeypatch.setitem(CANDIDATES, 'ours/sdpa', failing)
    code, written = run('--sizes', '64', '--kernels', 'auto,reference,sdpa')
    (each,) = written['results']
    assert code == 1
    assert each['rows']['ours/reference']['note'].startswith('wrong: differs from mmdet by ')
    assert each['rows']['ours/sdpa']['note'] == 'failed: RuntimeError: no room for it'
    assert 'note' not in each['rows']['ours'] and len(each['seconds']['ours']) == 2
    assert 'wrong: differs' in capsys.readouterr().out


def test_growth_is_drawn_with_its_power(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr('matplotlib.pyplot.close', drawn.append)
    results = []
    for side, batch in ((100, 1), (200, 1), (400, 1), (100, 2), (100, 4)):
        pixels = side * side * batch
        row = {'ms': [pixels**1.5, 0, 0], 'memory': pixels}
        results.append({'case': {'size': (side, side), 'batch': batch}, 'rows': {'ours': row, 'mmdet': {'note': ''}}})
    report.plot_growth(results, tmp_path / 'growth.png')
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
        assert [name for name in rows if name != OPTIMIZED] == ['stock', 'ours', 'stock+backbone', 'ours+backbone']
        assert (OPTIMIZED in rows) == (each['case']['what'] == 'inference')
        assert all(row['deviation'] < 1e-3 for row in rows.values())
        assert rows['ours+backbone']['share'][0] > 0


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--against', 'mmdet,detectron2'], 'detectron2 is not known; choose from mmdet, transformers, timm'),
        (['--kernels', 'magic'], 'magic is not known; choose from auto, optimized, reference'),
        (['--sizes', '800x1333x3'], "invalid sizes value: '800x1333x3'"),
        (['--device', 'cpu', '--dtypes', 'fp16'], '--dtypes fp16: on GPUs only'),
        (['--device', 'cpu', '--preset', 'gpu'], '--device cpu --quick checks'),
        (['--frobnicate'], 'unrecognized arguments: --frobnicate'),
        (['--out', __file__], 'is a file, name a folder'),
    ],
)
def test_refuses(tool, monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['benchmark', *arguments])
    with pytest.raises(SystemExit) as stopped:
        tool('benchmark').parse_args()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_the_bars_of_a_cpu():
    asked = {(bar.case.what, bar.case.dtype, bar.case.size, bar.ours, bar.kind): bar.asked for bar in presets.CPU_BARS}
    for size in ((512, 512), (800, 1333)):
        assert asked['inference', 'fp32', size, OPTIMIZED, 'ratio'] == 1.5
        assert asked['inference', 'fp32', size, 'ours', 'ratio'] == 1.2
        assert asked['training', 'fp32', size, 'ours', 'ratio'] == 1.25


def test_inference_measures_both_forms_and_training_the_plain_one():
    cases, bars = presets.choose('cpu', 'cpu', against=['mmdet'], kernels=['auto', 'optimized'], compiled=True)
    assert len(bars) == len(presets.CPU_BARS)
    for case, names in cases.items():
        assert {'mmdet', 'ours', 'ours+compile'} <= set(names) and len(set(names)) == len(names)
        assert (OPTIMIZED in names) == (case.what == 'inference')


def test_the_command_without_the_folder(tmp_path):
    """As in a wheel."""
    (tmp_path / 'tools').mkdir()
    shutil.copy(ROOT / 'tools/benchmark.py', tmp_path / 'tools')
    done = subprocess.run([sys.executable, tmp_path / 'tools/benchmark.py'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert 'benchmarks does not exist: the benchmark is part of the repository' in done.stderr


def test_results_that_cannot_be_written(run, monkeypatch, tmp_path, capsys):
    (tmp_path / 'benchmark.json').mkdir()
    with pytest.raises(IsADirectoryError):
        assert run('--sizes', '64')[0] == 2
    assert 'benchmark.json cannot be written' in capsys.readouterr().err


def test_growth_with_one_size_draws_ratios(monkeypatch, tmp_path):
    drawn = []
    for name in ('plot_growth', 'plot_ratios'):
        monkeypatch.setattr(report, name, lambda results, file, name=name: drawn.append(name))
    case = {'case': {'batch': 1, 'size': (64, 64)}}
    other = {'case': {'batch': 2, 'size': (64, 64)}}
    for results in ([case], [case, other]):
        report.plot({'results': results}, tmp_path / 'a.png', growth=True)
    assert drawn == ['plot_ratios', 'plot_growth']


def test_memory_counts_what_an_optimized_model_holds():
    """It has no parameters, and packed weights instead."""
    from benchmarks.candidates import held_tensors, optimized, our_swin

    arch = {'embed_dims': 16, 'depths': (1, 1), 'num_heads': (1, 1), 'strides': (4, 2), 'out_indices': (0, 1)}
    model = our_swin(arch, (64, 64)).eval()
    plain, packed = (sum(t.numel() for t in held_tensors(m)) for m in (model, optimized(model)))
    assert plain >= sum(p.numel() for p in model.parameters()) and 0.9 * plain < packed < 3 * plain
