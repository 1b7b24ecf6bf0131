# swin_mm with detection and segmentation, on CPUs or on NVIDIA GPUs; the commands are those of docs/get_started.md:
#   docker build -t swin_mm .
#   docker build -t swin_mm --build-arg DEVICE=cuda .
ARG DEVICE=cpu

FROM ubuntu:24.04 AS cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

# torch from PyPI is built for CUDA 13.0 (2.13). mmcv's operators are compiled by the same version, for Ampere to Hopper.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
ENV FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0 8.6 8.9 9.0+PTX"

FROM ${DEVICE}
# opencv needs libGL and GLib. The release of Ubuntu decides the versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libgl1 libglib2.0-0t64 make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /opt/swin_mm

# These two take minutes and depend on the versions alone.
COPY constraints.txt .
RUN pip install -c constraints.txt torch numpy setuptools wheel ninja
RUN MMCV_WITH_OPS=1 pip install --no-build-isolation -c constraints.txt onedl-mmcv

COPY . .
RUN pip install --no-build-isolation -c constraints.txt -e '.[all]'
RUN python -m swin_mm.doctor
