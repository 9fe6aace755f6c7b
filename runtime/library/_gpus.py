"""The GPUs and the NVIDIA driver of this machine, and whether a CUDA library's code runs on them.

Everything is asked before any work: what a driver or a GPU cannot run is said in a line, with the way out.
Compute capabilities are numbers without a point (8.6 is 86), CUDA versions are counted as NVIDIA does:
1000 * major + 10 * minor (12.8 is 12080).
"""

import ctypes
from dataclasses import dataclass

import torch

OLDEST = 75  # Turing, whose tensor cores the kernels need
# The first driver for Linux of each CUDA version, by NVIDIA's release notes.
_DRIVERS = {
    11080: "520.61",
    12000: "525.60",
    12010: "530.30",
    12020: "535.54",
    12030: "545.23",
    12040: "550.54",
    12050: "555.42",
    12060: "560.28",
    12080: "570.26",
    12090: "575.51",
    13000: "580.65",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch counts it.

    Attributes:
        index: torch's number.
        name: its model.
        capability: its compute capability.
        memory: bytes.
    """

    index: int
    name: str
    capability: int
    memory: int


@dataclass(frozen=True)
class Build:
    """What a CUDA library was built with and for.

    Attributes:
        runtime: the CUDA version of its compiler, and of the runtime inside it.
        machine_code: compute capabilities that it has machine code for.
        ptx: those that it has PTX for, which drivers translate for later GPUs.
        draft: whether it was made on a machine without a GPU, only to see that its sources compile.
    """

    runtime: int
    machine_code: tuple[int, ...]
    ptx: tuple[int, ...]
    draft: bool = False

    @classmethod
    def parse(cls, runtime: int, targets: str) -> "Build":
        """From what the library says of itself (`dbrxq_cuda_targets` in csrc/include/dbrxq.h)."""
        if targets == "draft":
            return cls(runtime, (), (), draft=True)
        parts = [part.partition("-") for part in targets.split(",") if part]
        return cls(
            runtime,
            tuple(int(number) for number, _, kind in parts if kind != "virtual"),
            tuple(int(number) for number, _, kind in parts if kind != "real"),
        )

    def runs_on(self, capability: int) -> bool:
        """Whether there is machine code for a GPU: that of its own generation, not of a later member."""
        return any(code // 10 == capability // 10 and code <= capability for code in self.machine_code)

    def __str__(self) -> str:
        if self.draft:
            return "none: a draft"
        names = [f"{code / 10:.1f}" for code in self.machine_code]
        names += [f"PTX of {code / 10:.1f}" for code in self.ptx]
        return ", ".join(names) or "unknown targets"


def driver_version() -> int:
    """The CUDA version that the installed NVIDIA driver is for; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def find_gpus() -> list[Gpu]:
    """The GPUs that torch can use."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        Gpu(index, found.name, 10 * found.major + found.minor, found.total_memory)
        for index, found in enumerate(properties)
    ]


def why_no_gpu() -> str:
    """Why torch finds no GPU, and what to do."""
    needed, driver = torch.version.cuda, driver_version()
    if needed is None:
        return f"torch {torch.__version__} is built without CUDA; install one for CUDA from pytorch.org"
    if driver == 0:
        return "there is no NVIDIA driver (libcuda.so.1); install one, or run on the CPU"
    major = int(needed.split(".")[0])
    if driver // 1000 < major:
        return (
            f"the NVIDIA driver is for CUDA {version_text(driver)}, torch is built for {needed}: update the "
            f"driver to {_driver_of(1000 * major)} or newer, or install a torch for an older CUDA"
        )
    return "torch finds no GPU; is CUDA_VISIBLE_DEVICES set, or the GPU lost (nvidia-smi)?"


def why_not_on(gpu: Gpu, build: Build, driver: int) -> str | None:
    """Why a library's kernels cannot run on a GPU under a driver, and what to do; None when they can."""
    own, names = f"{gpu.capability / 10:.1f}", f"{gpu.name} (cuda:{gpu.index})"
    if gpu.capability < OLDEST:
        return (
            f"{names} has compute capability {own}, the CUDA kernels need {OLDEST / 10} (Turing) or newer; "
            "run on the CPU"
        )
    rebuild = f"build from source for it: -C cmake.define.DBRXQ_CUDA_ARCHITECTURES={gpu.capability}"
    if build.draft:
        return (
            "the CUDA library was built on a machine without a GPU, only to see that it compiles; build it "
            f"again here, or anywhere with -C cmake.define.DBRXQ_CUDA_ARCHITECTURES={gpu.capability}"
        )
    if driver // 1000 < build.runtime // 1000:
        return (
            f"the NVIDIA driver is for CUDA {version_text(driver)}, the CUDA kernels are built with "
            f"{version_text(build.runtime)}: update the driver to {_driver_of(build.runtime // 1000 * 1000)} "
            "or newer, or build from source with a compiler of the driver's CUDA"
        )
    if not build.machine_code and not build.ptx:
        return None  # the library does not say: loading its code will tell
    if build.runs_on(gpu.capability):
        return None
    if not any(code <= gpu.capability for code in build.ptx):
        return f"{names} has compute capability {own}, the CUDA library has code for {build}; {rebuild}"
    if driver < build.runtime:
        return (
            f"{names} has compute capability {own}, for which the CUDA library has PTX alone, and the "
            f"driver is for CUDA {version_text(driver)}: update it to {_driver_of(build.runtime)} or newer, "
            f"or {rebuild}"
        )
    return None


def version_text(version: int) -> str:
    """A CUDA version as people write it."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _driver_of(version: int) -> str:
    """The first driver of a CUDA version."""
    return _DRIVERS.get(version, f"one for CUDA {version_text(version)}")
