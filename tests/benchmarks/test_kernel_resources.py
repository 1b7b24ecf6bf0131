"""What the compiler makes of the Triton kernels, which the interpreter does not check."""

import subprocess
import sys

import pytest
from support.tool_fixtures import ROOT

pytest.importorskip('triton')

COUNT = """
from benchmarks.kernel_resources import count_instructions
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
"""


def run(*command):
    # In a process of its own, as Triton decides between compiler and interpreter when it is imported.
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def test_instructions_loops_and_spills_are_counted():
    done = run('-c', COUNT)
    assert done.returncode == 0, done.stderr


def test_kernels_compile_for_gpus():
    done = run('-m', 'benchmarks.kernel_resources', '--sm', '90', '--windows', '7,16', '--cosine', '')
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
