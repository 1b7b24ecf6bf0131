"""The compiled attention kernels; all other metadata is in pyproject.toml."""

from setuptools import Extension, setup

# The CPU attention kernel, once per instruction set that PyTorch distinguishes. Builds are optional: where the
# compiler does not support one, the next one or PyTorch's own attention is used instead.
CPU_KERNELS = [
    Extension(
        f'swin_mm.ops.attention._cpu_{name}',
        ['swin_mm/ops/attention/window_attention.cpp'],
        extra_compile_args=['-O3', '-std=c++17', '-fopenmp', *flags],
        extra_link_args=['-fopenmp'],
        language='c++',
        optional=True,
    )
    for name, flags in {'avx512': ['-march=x86-64-v4'], 'avx2': ['-march=x86-64-v3'], 'default': []}.items()
]

setup(ext_modules=CPU_KERNELS, zip_safe=False)
