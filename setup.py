"""Metadata, dependencies and extras.

``swin_mm/.mim`` holds links to configs/, tools/ and model-index.yml, where mim looks for them. An editable install
uses the links as they are; a wheel gets the files behind them.
"""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent

# The maintained distributions of mmengine, mmcv, mmdet and mmseg; their import names are the original ones. The
# originals serve as well, but beside these they would overwrite each other's files: where they are installed
# already, install swin_mm with `pip install --no-deps`.
DET = ['onedl-mmcv>=2.1', 'onedl-mmdetection>=3.3']
SEG = ['onedl-mmcv>=2.1', 'onedl-mmsegmentation>=1.2']
ALL = sorted({*DET, *SEG})
ONNX = ['onnx', 'onnxscript', 'onnxruntime']

# The attention kernel for CPUs, for each set of instructions that PyTorch tells apart. What the compiler at hand cannot
# build is left out, and PyTorch's own attention takes its place.
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

setup(
    name='swin_mm',
    version=re.search(r"'(.+)'", (ROOT / 'swin_mm/version.py').read_text())[1],
    description='Swin Transformer V1 and V2 for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text() if (ROOT / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    python_requires='>=3.10',
    packages=find_packages(include=['swin_mm', 'swin_mm.*']),
    package_data={
        'swin_mm': [
            '.mim/model-index.yml',
            '.mim/tools/*.py',
            '.mim/tools/*.sh',
            *(f'.mim/configs/{depth}*.{suffix}' for depth in ('', '*/', '*/*/') for suffix in ('py', 'yml', 'md')),
        ]
    },
    ext_modules=CPU_KERNELS,
    install_requires=['torch>=2.6', 'safetensors', 'onedl-mmengine>=0.10.8,<1'],
    extras_require={
        'det': DET,
        'seg': SEG,
        'all': ALL,
        'hub': ['huggingface_hub'],  # hf:// addresses of weights
        'onnx': ONNX,  # tools/export.py --to onnx
        # transformers: the reference that V2 is tested against.
        'dev': [
            *ONNX,
            'huggingface_hub',
            'pytest',
            'pytest-xdist',
            'ruff',
            'tensorboard',
            'transformers>=4.45',
            'triton; platform_system == "Linux"',  # interprets and compiles the kernels without a GPU
        ],
    },
    zip_safe=False,
    classifiers=[
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
