"""Two ranks on the CPU train like one process; killed runs resume.

See :mod:`support.processes` for how they run.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS
from support import dist_fixtures as toy
from support.processes import in_processes, run_main
from support.tool_fixtures import ROOT
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel

from swin_mm.engine import preemption
from swin_mm.engine.runner import build_runner
from swin_mm.engine.work_dir import last_checkpoint
from swin_mm.utils.errors import InputError

pytestmark = pytest.mark.skipif(get_device() != 'cpu', reason='mmengine takes the GPU where there is one')
FSDP = ROOT / 'configs/_base_/strategies/fsdp.py'


def train(config, work_dir, launcher='none', **options):
    """Train on a config and return the runner."""
    cfg = Config.fromfile(config)
    options = {key.replace('__', '.'): value for key, value in options.items()}
    cfg.merge_from_dict(options | {'work_dir': str(work_dir), 'launcher': launcher, 'experiment_name': work_dir.name})
    runner = build_runner(cfg)
    runner.train()
    return runner


def on_two_ranks(function, *arguments):
    """The calls with which ``in_processes`` runs (function, rank, *arguments) as torchrun would."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    return [(_as_rank, number, port, function, *arguments) for number in range(2)]


def _as_rank(number, port, function, *arguments):
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE='2')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    function(number, *arguments)


def learn(_, folder):
    """Train on each of two ranks and save the results."""
    plain, fsdp = folder / 'plain/toy.py', folder / 'fsdp/toy.py'

    runner = train(plain, folder / 'ddp', 'pytorch', train_dataloader__batch_size=2)
    for parameter in runner.model.parameters():
        theirs = parameter.detach().clone()
        distributed.broadcast(theirs, 0)
        assert torch.equal(parameter, theirs), 'the ranks have different weights'
    accumulating = {'train_dataloader__batch_size': 1, 'optim_wrapper__accumulative_counts': 2}
    train(plain, folder / 'accumulated', 'pytorch', **accumulating)

    half = {'train_dataloader__batch_size': 2, 'model__dtype': 'float32'}  # the norm of gradients needs it
    runner = train(fsdp, folder / 'fsdp', 'pytorch', **half)
    units = [module for module in runner.model.modules() if isinstance(module, FullyShardedDataParallel)]
    assert len(units) == 4, 'one for each block and one around all'
    train(fsdp, folder / 'fsdp_resumed', 'pytorch', resume=True, load_from=str(folder / 'fsdp/epoch_1.pth'), **half)

    uses_every_parameter()


def uses_every_parameter():
    """DDP fails at the second pass if a parameter had no gradient in the first."""
    ways = itertools.product(
        ('SwinTransformer', 'SwinTransformerV2'), range(-1, 5), ((0, 1, 2, 3), (0,), (3,), (1, 2)), (False, True)
    )
    for kind, frozen, out, with_cp in ways:
        if frozen > max(out):
            continue  # nothing to train
        backbone = MODELS.build(
            dict(
                type=f'swin_mm.{kind}',
                embed_dims=4,
                depths=(1, 1, 1, 1),
                num_heads=(1, 1, 1, 1),
                window_size=2,
                frozen_stages=frozen,
                out_indices=out,
                with_cp=with_cp,
            )
        )
        model = MMDistributedDataParallel(backbone.train(), find_unused_parameters=False)
        for _ in range(2):
            try:
                sum(x.sum() for x in model(torch.randn(1, 3, 32, 32))).backward()
            except RuntimeError as error:
                raise AssertionError(f'{kind}, {frozen=}, {out=}, {with_cp=}') from error


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with the results of one process and of two ranks."""
    folder = tmp_path_factory.mktemp('runs')
    toy.write_config(folder / 'plain')
    toy.write_config(folder / 'fsdp', FSDP)
    one = (train, folder / 'plain/toy.py', folder / 'one')
    assert in_processes(one, *on_two_ranks(learn, folder)) == [0, 0, 0]
    return folder


def learned(runs, name, part='state_dict'):
    return torch.load(runs / name / 'epoch_2.pth', weights_only=False)[part]


def assert_same(ours, theirs, tolerance=1e-12):
    """Assert equality up to the order of summation."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=tolerance, check_dtype=False)


def test_two_ranks_equal_one_process_with_the_same_batch(runs):
    assert_same(learned(runs, 'ddp'), learned(runs, 'one'))
    for number, state in learned(runs, 'one', 'optimizer')['state'].items():  # the sum of the gradients
        assert_same(learned(runs, 'ddp', 'optimizer')['state'][number], state)


def test_accumulating_two_batches_equals_one_of_twice_the_size(runs):
    assert_same(learned(runs, 'accumulated'), learned(runs, 'one'))


def test_fsdp_equals_ddp(runs):
    assert_same(learned(runs, 'fsdp'), learned(runs, 'ddp'), tolerance=1e-5)


def test_fsdp_resumes(runs):
    assert_same(learned(runs, 'fsdp_resumed'), learned(runs, 'fsdp'), tolerance=1e-7)  # in fp32


def run_tool(config, *arguments):
    """Run `tools/train.py` in this process."""
    run_main('train', config, '--work-dir', config.parent, *arguments)


def train_and_die(config, *arguments):
    """Train, and exit while the checkpoint of the second epoch is being written."""
    write, checkpoints = Path.write_bytes, itertools.count(1)

    def write_half(self, content):
        if self.suffix == '.pth' and next(checkpoints) == 2:
            write(self, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, content)

    Path.write_bytes = write_half
    run_tool(config, *arguments)


def losses(work_dir):
    """The losses of every iteration, in the order of the runs."""
    lines = ''.join(path.read_text() for path in sorted(work_dir.glob('*/vis_data/scalars.json'))).splitlines()
    return [json.loads(line)['loss'] for line in lines]


def test_a_killed_run_resumes_from_the_last_complete_checkpoint(tmp_path):
    whole, killed = (toy.write_config(tmp_path / name) for name in ('whole', 'killed'))
    options = ['--cfg-options', 'train_cfg.max_epochs=3', 'default_hooks.checkpoint.max_keep_ckpts=1']
    assert in_processes((run_tool, whole, *options), (train_and_die, killed, *options)) == [0, -signal.SIGKILL]
    assert [path.name for path in killed.parent.glob('epoch*')] == ['epoch_1.pth']
    assert len(list(killed.parent.glob('.*.part.pth'))) == 1, 'what was half-written'
    assert len(losses(killed.parent)) == 6
    assert in_processes((run_tool, killed, '--resume', *options)) == [0]
    assert losses(killed.parent) == losses(whole.parent)[:6] + losses(whole.parent)[3:]
    assert [path.name for path in killed.parent.glob('*.pth')] == ['epoch_3.pth']


def test_fsdp_without_a_launcher_is_an_error(tmp_path):
    cfg = Config.fromfile(toy.write_config(tmp_path, FSDP))
    cfg.update(work_dir=str(tmp_path), launcher='none')
    with pytest.raises(InputError, match='tools/dist_train.sh'):
        build_runner(cfg)


def train_as_rank(number, config, stop, *arguments):
    """Train as one of two ranks; the second one is told to stop while it waits for the first."""
    reduce, calls = preemption.all_reduce, itertools.count(1)

    def reduce_and_receive(*arguments):
        reduce(*arguments)
        if stop and number == 1 and next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    preemption.all_reduce = reduce_and_receive
    run_tool(config, '--launcher', 'pytorch', *arguments)


@pytest.mark.parametrize('kind', ['ddp', 'fsdp'])
def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_iteration(runs, kind, tmp_path):
    config = toy.write_config(tmp_path, *[FSDP] * (kind == 'fsdp'))
    options = ['--cfg-options', 'train_dataloader.batch_size=2']
    options += ['model.dtype=float32'] * (kind == 'fsdp')
    codes = in_processes(*on_two_ranks(train_as_rank, config, True, *options))
    assert codes == [128 + signal.SIGTERM] * 2
    meta = torch.load(tmp_path / 'interrupted.pth', weights_only=False)['meta']
    assert (meta['epoch'], meta['iter']) == (1, 5), 'asked behind the fourth'
    assert last_checkpoint(tmp_path) == str(tmp_path / 'interrupted.pth')
    assert in_processes(*on_two_ranks(train_as_rank, config, False, '--resume', *options)) == [0, 0]
    assert_same(learned(tmp_path, '.'), learned(runs, kind))


@pytest.mark.slow
def test_torchrun_ends_the_job_when_a_rank_is_killed(tmp_path):
    config = toy.write_config(tmp_path)
    options = ['--cfg-options', 'train_cfg.max_epochs=1000', 'default_hooks.checkpoint.interval=1000']
    process = subprocess.Popen(
        ['bash', ROOT / 'tools/dist_train.sh', config, '2', '--work-dir', tmp_path, *options],
        env=os.environ | {'PYTHON': sys.executable, 'PYTHONPATH': str(ROOT / 'tests')},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, ranks = '', []
        for line in process.stdout:
            output += line
            if '[2/2]' in line and not ranks:
                ranks = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
                os.kill(int(ranks[1]), signal.SIGKILL)
        assert process.wait(60) == 1
    finally:
        process.kill()
    assert 'rank      : 1' in output and 'Signal 9 (SIGKILL)' in output
    assert not any(Path('/proc', rank).exists() for rank in ranks)


@pytest.mark.parametrize(
    'script, arguments, environment, expected',
    [
        ('dist_train', 'c.py 8 --amp', {}, '--standalone --nproc-per-node 8 train.py c.py --amp --launcher pytorch'),
        ('dist_train', 'c.py 8', {'PORT': '9'}, '--master-port 9 --nproc-per-node 8 train.py c.py --launcher pytorch'),
        (
            'dist_train',
            'c.py 8',
            {'NNODES': '2', 'NODE_RANK': '1', 'MASTER_ADDR': 'a'},
            '--nnodes 2 --node-rank 1 --master-addr a --master-port 29500 --nproc-per-node 8 train.py c.py '
            '--launcher pytorch',
        ),
        ('dist_train', 'c.py 8', {'NNODES': '2', 'NODE_RANK': '1'}, 'MASTER_ADDR: is not set'),
        ('dist_train', 'c.py', {}, 'dist_train.sh CONFIG GPUS'),
        (
            'dist_test',
            'c.py x.pth 8 --tta',
            {},
            '--standalone --nproc-per-node 8 test.py c.py x.pth --tta --launcher pytorch',
        ),
        (
            'slurm_train',
            'p name c.py work --resume',
            {'GPUS': '4', 'SRUN_ARGS': '--qos x'},
            '-p p --job-name name --ntasks 4 --ntasks-per-node 4 --gres gpu:4 --cpus-per-task 5 --kill-on-bad-exit=1 '
            '--qos x echo -u train.py c.py --work-dir work --resume --launcher slurm',
        ),
    ],
)
def test_commands_of_the_shell_scripts(script, arguments, environment, expected, tmp_path):
    (tmp_path / 'srun').write_text('#!/bin/sh\necho "$@"')
    (tmp_path / 'srun').chmod(0o755)
    clean = {'PYTHON': 'echo', 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    command = ['bash', f'tools/{script}.sh', *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, env=clean | environment, text=True, capture_output=True, check=False)
    assert expected in (done.stdout + done.stderr).replace('tools/', '')
