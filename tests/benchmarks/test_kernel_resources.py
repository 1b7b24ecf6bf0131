"""What the compiler makes of the Triton kernels, which the interpreter does not check."""

import subprocess
import sys

import pytest
from support.attention_cases import require_triton
from support.tool_fixtures import ROOT

require_triton()

COUNT = """
import sys
from benchmarks.kernel_resources import count_instructions, main
assembly = '''
.text._forward:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDL R4, [R1] ;
.L_x_0:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
        /*0070*/                   NOP;
'''
assert count_instructions(assembly) == (4, 7, 1), count_instructions(assembly)
sys.argv[1:] = ['--sm', '90', '--windows', '7,16', '--cosine', '']
main()
"""


def test_kernels_compile_for_gpus_and_their_instructions_are_counted():
    # In a process of its own, as Triton decides between compiler and interpreter when it is imported.
    done = subprocess.run([sys.executable, '-c', COUNT], cwd=ROOT, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in done.stdout.splitlines()[2:]]
    single, tiled = ['backward'], ['backward q', 'backward kv', 'backward bias']
    forward = ['forward', 'forward, training']
    assert [(row[0], row[1]) for row in rows] == [
        *((name, '7') for name in forward + single),
        *((name, '16') for name in forward + tiled),
    ], done.stderr
    for name, _, dtype, sm, registers, spills, shared, programs, loop, total in rows:
        assert (dtype, sm) == ('bf16', '90') and 32 <= int(registers) <= 255 and int(shared) < 99
        assert int(programs) >= 2 and 100 < int(loop) < int(total)
        assert int(spills) == 0 or name not in forward


@pytest.mark.parametrize(
    'channels, targets', [('96', '90'), pytest.param('192', '80,89,90', marks=pytest.mark.slow)], ids=['96', '192']
)
def test_norms_compile_for_gpus(channels, targets):
    command = f'-m benchmarks.kernel_resources --windows= --cosine= --norms {channels} --sm {targets}'.split()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in done.stdout.splitlines()[2:]]
    add = ['add norm, training', 'add norm backward', 'add norm, training, NCHW', 'add norm backward, NCHW']
    names = [*add, 'norm add, training', 'norm add backward', 'merge norm, training', 'merge norm backward']
    assert [row[0] for row in rows] == [n for _ in channels.split(',') for n in names for _ in targets.split(',')], done
    for name, _, _, _, registers, spills, shared, programs, _, _ in rows:
        assert int(registers) <= 255 and int(shared) < 99 and int(programs) >= 1, name
        assert int(spills) == 0, name
