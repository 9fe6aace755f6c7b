"""`dbrx-quant doctor`: what was found on this machine, and which kernels will run. Nothing is fetched."""

import argparse
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from dbrx_quant.scripts.terminal.output import bytes_text, print_json, print_table
from dbrx_quant.scripts.terminal.verb import Verb

CHECK_FAILED = 3
PACKAGES = ("dbrx-quant", "torch", "transformers", "tokenizers", "safetensors", "datasets", "accelerate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: none of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 3 where the native library cannot be used."""
    found = examine()
    if arguments.json:
        print_json(found)
    else:
        print_table("machine and libraries", ["", ""], [[k, _text(k, v)] for k, v in _flat(found)], left=2)
    return 0 if found["native"]["usable"] else CHECK_FAILED


def examine() -> dict[str, Any]:
    """Versions, native library, threads, memory, disk, CUDA; JSON-ready."""
    import torch

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "native": _native(),
        "threads": {"cpus": len(os.sched_getaffinity(0)), "torch": torch.get_num_threads()},
        "memory": _memory(),
        "disk": {"folder": str(Path.cwd()), "free": shutil.disk_usage(Path.cwd()).free},
        "cuda": {
            "nvcc": _nvcc(),
            "torch": torch.version.cuda,
            "driver": _driver(),
            "library": _cuda_library(),
            "targets": _targets(),
            "gpus": _gpu_facts(),
            "reason": _why_no_gpu(),
        },
    }


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    from dbrx_quant.runtime.kernels.activations import activations
    from dbrx_quant.runtime.library import _native

    reason = _native.why_unavailable()
    isa = _native.isa() if reason is None else None
    if isa == "unusable":
        reason = f"DBRXQ_ISA={os.environ.get('DBRXQ_ISA')} is not an instruction set of this machine"
    return {"usable": reason is None, "isa": isa, "activations": activations(), "reason": reason}


def _memory() -> dict[str, int | None]:
    """Bytes of main memory: all, and what could be taken now (None where the system doesn't say)."""
    from dbrx_quant.runtime.kernels.device import available_memory

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"total": total, "available": available_memory()}


def _nvcc() -> str | None:
    """The CUDA compiler's release, None without one."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        return None
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False)
    return next((line.strip() for line in done.stdout.splitlines() if "release" in line), compiler)


def _cuda_library() -> str:
    """Whether the CUDA kernels were built and can be loaded, or why not."""
    from dbrx_quant.runtime.library import _cuda

    return _cuda.why_unavailable() or "usable"


def _targets() -> str | None:
    """The GPUs that the CUDA library has code for, and its CUDA version; None without the library."""
    from dbrx_quant.runtime.library import _cuda, _gpus

    if _cuda.why_unavailable() is not None:
        return None
    build = _cuda.build()
    return f"{build} (CUDA {_gpus.version_text(build.runtime)})"


def _driver() -> str | None:
    """The CUDA version that the NVIDIA driver is for; None without one."""
    from dbrx_quant.runtime.library import _gpus

    version = _gpus.driver_version()
    return f"for CUDA {_gpus.version_text(version)}" if version else None


def _gpu_facts() -> list[dict[str, Any]]:
    """The GPUs, and why the CUDA kernels do not run on one (None: they do)."""
    import torch

    from dbrx_quant.runtime.library import _cuda, _gpus

    return [
        {
            "name": gpu.name,
            "memory": gpu.memory,
            "compute_capability": f"{gpu.capability / 10:.1f}",
            "reason": _cuda.why_unavailable(torch.device("cuda", gpu.index)),
        }
        for gpu in _gpus.find_gpus()
    ]


def _why_no_gpu() -> str | None:
    """Why torch finds no GPU; None: it does."""
    from dbrx_quant.runtime.library import _gpus

    return None if _gpus.find_gpus() else _gpus.why_no_gpu()


def _flat(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """Nested entries as flat rows, such as `memory total`; packages keep their names."""
    rows = []
    for key, value in found.items():
        if isinstance(value, dict):
            rows += [(name if key == "packages" else f"{key} {name}", inner) for name, inner in value.items()]
        else:
            rows.append((key, value))
    return [(key, value) for key, value in rows if not key.endswith(" reason") or value]


def _text(key: str, value: Any) -> str:
    if key in ("memory total", "memory available", "disk free") and value:
        return bytes_text(value)
    if value is None:
        return "not found"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "cuda gpus":
        return "\n".join(map(_gpu_text, value)) or "none"
    return str(value)


def _gpu_text(gpu: dict[str, Any]) -> str:
    facts = f"{gpu['name']}, {bytes_text(gpu['memory'])}, compute capability {gpu['compute_capability']}"
    return f"{facts}: {gpu['reason'] or 'the CUDA kernels run on it'}"


VERB = Verb(
    "doctor",
    "show the hardware and libraries found, and which kernels will run",
    "dbrx-quant doctor",
    add_arguments,
    run,
)
