#!/usr/bin/env bash
# Run by cibuildwheel in its container (pyproject.toml): CUDA's compiler and runtime for the wheel's kernels.
# 12.9 is the newest CUDA whose code runs under every driver from 525 on, and it knows all generations up to Blackwell.
set -euo pipefail
case $(uname -m) in
    x86_64) platform=x86_64 ;;
    aarch64) platform=sbsa ;;
    *) echo "no CUDA for $(uname -m)" >&2; exit 1 ;;
esac
curl -fsSLo /etc/yum.repos.d/cuda.repo \
    "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$platform/cuda-rhel8.repo"
dnf install -y -q cuda-nvcc-12-9 cuda-cudart-devel-12-9
