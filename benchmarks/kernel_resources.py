"""Registers, spills, shared memory and instructions of the Triton kernels, from compiled code, without a GPU.

    python -m benchmarks.kernel_resources                    all kernels, for sm_80, sm_89 and sm_90
    python -m benchmarks.kernel_resources --kernels forward --windows 7 --dtypes bf16 --sm 90

Needs Triton, whose package holds the compiler and the disassembler. Programs per SM follow from registers, threads and
shared memory; the loop is that over windows, with all that is in it.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ['TRITON_INTERPRET'] = '0'  # Triton reads it when it is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swin_mm.ops import fused_norm
from swin_mm.ops.attention import triton as attention

DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
TYPES = {torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.float32: '*fp32', float: 'fp32', int: 'i32'}
# Shared memory of an SM and threads that it holds, in CUDA's table of compute capabilities; 64 K registers each.
SMS = {80: (164, 2048), 89: (100, 1536), 90: (228, 2048)}
HEADER = ('kernel', 'window or C', 'dtype', 'sm', 'registers', 'spills', 'shared KB', 'programs/SM', 'loop', 'all')


@dataclass
class Resources:
    """What one compiled kernel needs.

    Args:
        registers: per thread.
        spills: instructions that store to or load from memory what registers cannot hold.
        shared: bytes of shared memory per program.
        programs: how many run on an SM at a time.
        loop: instructions in the longest loop.
        total: instructions in all.
    """

    registers: int
    spills: int
    shared: int
    programs: int
    loop: int
    total: int


Launch = tuple[Any, tuple, dict]  # kernel, arguments, constants


@contextmanager
def recorded(module: ModuleType) -> Iterator[list[Launch]]:
    """Record the launches of a module's kernels instead of starting them."""
    found: list[Launch] = []
    original = module.launch
    module.launch = lambda kernel, programs, arguments, constants: found.append((kernel, arguments, constants))
    try:
        yield found
    finally:
        module.launch = original


def launches(window: int, dtype: torch.dtype, cosine: bool, heads: int = 3) -> list[Launch]:
    """The kernels with arguments and constants: of inference, and of the forward and backward of training."""
    N, C = window**2, heads * 32
    qkv, pad = torch.zeros(1, 2 * window, 3 * window, 3 * C, dtype=dtype), torch.zeros(3 * C, dtype=dtype)
    bias, scale = torch.zeros(heads, N, N), torch.ones(heads) if cosine else 0.3
    with recorded(attention) as found:
        for training in (False, True):
            out = attention.attention(
                qkv.requires_grad_(training), pad, bias, (window, window), (window // 2,) * 2, scale
            )
        out.sum().backward()
    return found


def norm_launches(channels: int, dtype: torch.dtype) -> list[Launch]:
    """The fused norms with arguments and constants as in training with autocast: the residual stream is in float32."""
    x = torch.zeros(2, 4, 4, channels, requires_grad=True)
    branch = x.detach().to(dtype).requires_grad_()
    weight = torch.ones(4 * channels)
    parameters = (weight[:channels], weight[:channels], 1e-5)
    with recorded(fused_norm) as found:
        for nchw in (False, True):
            results = fused_norm.add_norm(x, branch, *parameters, torch.float32 if nchw else dtype, nchw=nchw)
            sum(result.sum() for result in results).backward()
        sum(result.sum() for result in fused_norm.norm_add(x, branch, *parameters, torch.float32, dtype)).backward()
        fused_norm.merge_norm(branch, weight, weight, 1e-5, dtype).sum().backward()
    return found


def compile_kernel(kernel: Any, arguments: tuple, constants: dict, sm: int) -> Any:
    """Compile one kernel as at its launch; tensors are aligned, sizes are not specialised."""
    options = {name: constants[name] for name in ('num_warps', 'num_stages', 'maxnreg') if name in constants}
    names = kernel.arg_names
    values = {name: constants[name] for name in names[len(arguments) :]}
    types = [TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)] for value in arguments]
    signature = dict(zip(names, [*types, *['constexpr'] * len(values)], strict=True))
    aligned = {(n,): [['tt.divisibility', 16]] for n, v in enumerate(arguments) if isinstance(v, torch.Tensor)}
    return triton.compile(ASTSource(kernel, signature, values, aligned), GPUTarget('cuda', sm, 32), options)


def disassemble(cubin: bytes) -> str:
    """The machine code as text."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / 'backends/nvidia/bin/nvdisasm'
        return subprocess.run([tool, '-c', file.name], check=True, capture_output=True, text=True).stdout


def count_instructions(assembly: str) -> tuple[int, int, int]:
    """Instructions in the longest loop, in all, and those that spill registers."""
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    count = spills = 0
    for line in assembly.splitlines():
        if label := re.match(r'(\.L_x?_?\d+):', line.strip()):
            labels[label[1]] = count
        elif code := re.match(r'\s*/\*[0-9a-f]{4,}\*/\s+(.*?);', line):
            text = code[1]
            if re.search(r'\bNOP\b', text):
                continue
            count += 1
            spills += bool(re.search(r'\b(STL|LDL)\b', text))
            if target := re.search(r'\bBRA\b.*?(\.L_x?_?\d+)', text):
                jumps.append((count, target[1]))
    loops = [at - labels[label] for at, label in jumps if label in labels and labels[label] < at]
    # The last jump of a kernel is to itself, after its end.
    return max(loops, default=0), count, spills


def resources(kernel: Any, arguments: tuple, constants: dict, sm: int) -> Resources:
    """Compile a kernel and read what it needs from the result."""
    binary = compile_kernel(kernel, arguments, constants, sm)
    assembly = disassemble(binary.asm['cubin'])
    loop, total, spills = count_instructions(assembly)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(binary.asm['cubin'])
        file.flush()
        tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
        usage = subprocess.run([tool, '-res-usage', file.name], check=True, capture_output=True, text=True).stdout
    registers = int(re.search(r'REG:(\d+)', usage)[1])  # type: ignore[index]
    threads, shared = 32 * constants['num_warps'], binary.metadata.shared
    kilobytes, most = SMS[sm]
    rounded = -(-registers // 8) * 8  # registers are given to warps in units of 256
    limits = [most // threads, 65536 // (rounded * threads), kilobytes * 1024 // (shared + 1024)]
    return Resources(registers, spills, shared, min(limits), loop, total)


def main() -> int:
    """Print a table."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sm', default='80,89,90', help='compute capabilities')
    parser.add_argument('--windows', default='7,12', help='sides of V1 windows')
    parser.add_argument('--cosine', default='8', help='sides of V2 windows')
    parser.add_argument('--norms', default='', help='channels of fused norms, such as 96,768')
    parser.add_argument('--dtypes', default='bf16', help=f'of {",".join(DTYPES)}')
    parser.add_argument('--kernels', default='', help='part of the names of the kernels')
    args = parser.parse_args()
    kinds = [
        (int(w), cosine) for text, cosine in ((args.windows, False), (args.cosine, True)) for w in text.split(',') if w
    ]
    cases = {f'{window}{" V2" if cosine else ""}': partial(launches, window, cosine=cosine) for window, cosine in kinds}
    cases |= {
        f'{channels} channels': partial(norm_launches, int(channels)) for channels in args.norms.split(',') if channels
    }
    print('| ' + ' | '.join(HEADER) + ' |\n' + '| --- ' * len(HEADER) + '|')
    for (case, record), dtype in itertools.product(cases.items(), args.dtypes.split(',')):
        for kernel, arguments, constants in record(dtype=DTYPES[dtype]):
            name = kernel.__name__.strip('_').replace('_', ' ') + (', training' if constants.get('SAVE') else '')
            name += ', NCHW' if constants.get('NCHW') else ''
            if args.kernels and args.kernels not in name:
                continue
            for sm in args.sm.split(','):
                r = resources(kernel, arguments, constants, int(sm))
                row = (name, case, dtype, sm, r.registers, r.spills)
                row = (*row, f'{r.shared / 1024:.0f}', r.programs, r.loop, r.total)
                print('| ' + ' | '.join(map(str, row)) + ' |', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
