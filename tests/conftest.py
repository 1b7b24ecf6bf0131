"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

import pytest
import torch
from support.tool_fixtures import Tiny, make_data, make_tiny

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # Triton reads it when it is imported, which nothing has done yet


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random images and weights are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set: coco/ and ade/."""
    folder = tmp_path_factory.mktemp('data')
    make_data(folder)
    return folder


@pytest.fixture(scope='session', params=['detection', 'segmentation'])
def tiny(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Both tasks, one after the other."""
    return make_tiny(request.param, data, tmp_path_factory.mktemp(request.param))
