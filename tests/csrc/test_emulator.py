"""The emulator's own claims, on kernels with known faults; and the kernels' tests under the sanitizers."""

import ctypes
import os
import subprocess
import sys

import emulator_build
import pytest
import torch
from emulated import SANITIZED
from places import TESTS

KERNELS = TESTS / "runtime" / "kernels"
CUDA_TESTS = [
    *(
        str(KERNELS / f"test_cuda_{name}.py")
        for name in ("products", "experts", "layout", "few", "attention", "sampling")
    ),
    str(TESTS / "runtime" / "step" / "test_gpu_step.py"),
]


def selftest(library, copies, fault):
    """The results of a kernel of csrc/emulator/selftest.cu under one schedule, and what they should be."""
    values = torch.arange(512, dtype=torch.int32)
    out = torch.full_like(values, -1)
    library.dbrxq_emulator_selftest(
        copies, fault, ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr())
    )
    return (out, values) if copies else (out[:128], values[:128] ^ 32)


NO_FAULT, NO_BARRIER, NO_WAIT, OUT_OF_BOUNDS, MISALIGNED = range(5)


@pytest.mark.parametrize(("copies", "fault"), [(0, NO_BARRIER), (1, NO_WAIT)])
def test_a_missing_barrier_or_wait_shows_under_every_schedule_tried(emulated, copies, fault):
    for seed in range(20):
        for chosen in (NO_FAULT, fault):
            emulated.dbrxq_emulator_seed(ctypes.c_uint64(seed))
            out, wanted = selftest(emulated, copies, chosen)
            assert torch.equal(out, wanted) == (chosen == NO_FAULT), f"seed {seed}"


def sanitized(*arguments):
    """Runs python with the sanitized emulator; the finished process."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "DBRXQ_EMULATOR": "sanitized",
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=0",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def test_the_runtime_api_refuses_what_the_real_one_refuses_and_replays_what_was_recorded(emulated):
    said = (ctypes.c_int * 8)()
    count = ctypes.c_int(0)
    emulated.dbrxq_emulator_graphs(said, ctypes.byref(count))
    unsupported, implicit, invalidated = 900, 906, 901
    assert list(said) == [unsupported, implicit, invalidated, 0, 0, 0, 1, 3]


@pytest.fixture(scope="module")
def sanitizers():
    if SANITIZED:
        pytest.skip("these are the tests that the sanitized process runs")
    if emulator_build.build(sanitized=True) is None:
        pytest.skip("the sanitizers need g++")


@pytest.mark.slow  # the sanitized kernels take a minute to compile
def test_wild_and_misaligned_accesses_stop_the_sanitized_emulator(sanitizers):
    code = (
        "import ctypes, sys; import emulator_build; import numpy as np\n"
        "library = ctypes.CDLL(str(emulator_build.build(True)))\n"
        "a, b = np.zeros(512, np.int32), np.zeros(512, np.int32)\n"
        "library.dbrxq_emulator_selftest(int(sys.argv[1]), int(sys.argv[2]),\n"
        "                                ctypes.c_void_p(a.ctypes.data), ctypes.c_void_p(b.ctypes.data))\n"
    )
    os.environ["PYTHONPATH"] = os.path.dirname(emulator_build.__file__)
    try:
        for copies, fault, message in (
            (0, NO_FAULT, ""),
            (0, OUT_OF_BOUNDS, "heap-buffer-overflow"),
            (1, NO_FAULT, ""),
            (1, MISALIGNED, "misaligned address"),
        ):
            done = sanitized("-c", code, str(copies), str(fault))
            assert (done.returncode == 0) == (fault == NO_FAULT), done.stderr
            assert message in done.stderr
    finally:
        del os.environ["PYTHONPATH"]


@pytest.mark.slow
@pytest.mark.parametrize("extent", ["a few", "all"])
def test_the_kernels_pass_under_the_sanitizers(sanitizers, extent):
    chosen = [
        "-k",
        "(linear_is_as_accurate and (tail or ragged)) or (experts_are and (some or one)) or map_is_exact"
        " or dense_model or (attention_over and (one or bytes)) or within_the_limits or five_launches",
    ]
    done = sanitized("-m", "pytest", "-q", "-x", *CUDA_TESTS, *(chosen if extent == "a few" else []))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
