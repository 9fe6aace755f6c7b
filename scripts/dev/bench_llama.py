"""llama.cpp's CPU matmuls at the shapes of `bench_kernels.py`, through the C interface of its ggml libraries.

FOLDER holds `libggml-base.so` and `libggml-cpu.so`. They build from the source package of llama-cpp-python:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_COMMON=OFF
    cmake --build build --target ggml-cpu ggml-base       # FOLDER: build/bin

(the package lacks some folders, so the first cmake may report errors after it has written what is needed).
A type is measured as it is and, where ggml has one, in its repacked form; the faster counts.
"""

import ctypes
import time
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

SHAPES = ((6144, 10752), (10752, 6144))  # K, N: as in bench_kernels.py
TYPES = {"Q2_K": (10, True), "Q3_K": (11, False), "Q4_K": (12, True)}  # number in ggml.h, has a repacked form
ROTATION_BYTES = 220_000_000
_F32 = 0


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


# name: (result, arguments)
_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
}
_CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_reg": (c_void_p, []),
}


def _open(file: Path, functions: dict[str, tuple[Any, list[Any]]]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Ggml:
    """The two libraries and a CPU backend with a number of threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.base = _open(folder / "libggml-base.so", _BASE)
        self._silent = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
        self.base.ggml_log_set(ctypes.cast(self._silent, c_void_p), None)
        self.cpu = _open(folder / "libggml-cpu.so", _CPU)
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.plain = self.base.ggml_backend_get_default_buffer_type(self.backend)

    def repacking(self) -> list[int]:
        """The buffer types that change the layout of the weights put into them."""
        registry = self.cpu.ggml_backend_cpu_reg()
        device = self.base.ggml_backend_reg_dev_get(registry, 0)
        address = self.base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        found: list[int] = []
        while listed[len(found)]:
            found.append(int(listed[len(found)] or 0))
        return found

    def context(self, tensors: int) -> int:
        size = tensors * self.base.ggml_tensor_overhead() + self.base.ggml_graph_overhead()
        return int(self.base.ggml_init(_InitParams(size, None, True)))


def _best(ggml: _Ggml, number: int, shape: tuple[int, int], buffer_type: int, seconds: float) -> float:
    """Seconds of one product with one token, over weights that rotate."""
    base, (k, n) = ggml.base, shape
    dense = torch.randn(n, k) / k**0.5
    row = base.ggml_row_size(number, k)
    data = torch.empty(n * row, dtype=torch.uint8)
    base.ggml_quantize_chunk(number, dense.data_ptr(), data.data_ptr(), 0, n, k, None)
    count = -(-ROTATION_BYTES // data.numel())
    held = ggml.context(count)
    weights = [base.ggml_new_tensor_2d(held, number, k, n) for _ in range(count)]
    buffers = [base.ggml_backend_alloc_ctx_tensors_from_buft(held, buffer_type)]
    for weight in weights:
        base.ggml_backend_tensor_set(weight, data.data_ptr(), 0, data.numel())
    x = torch.randn(k)
    graphs, contexts = [], [held]
    for weight in weights:
        context = ggml.context(4)
        contexts.append(context)
        activations = base.ggml_new_tensor_2d(context, _F32, k, 1)
        product = base.ggml_mul_mat(context, weight, activations)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, product)
        buffers.append(base.ggml_backend_alloc_ctx_tensors_from_buft(context, ggml.plain))
        base.ggml_backend_tensor_set(activations, x.data_ptr(), 0, x.nbytes)
        graphs.append(graph)
    fastest, start = float("inf"), time.perf_counter()
    for i, graph in enumerate(cycle(graphs)):
        if i > 2 * len(graphs) and time.perf_counter() - start > seconds:
            break
        before = time.perf_counter()
        status = base.ggml_backend_graph_compute(ggml.backend, graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute: status {status}")
        if i >= len(graphs):
            fastest = min(fastest, time.perf_counter() - before)
    for buffer in buffers:
        base.ggml_backend_buffer_free(buffer)
    for context in contexts:
        base.ggml_free(context)
    return fastest


def measure_llama(folder: Path, threads: int, seconds: float) -> list[dict[str, Any]]:
    """One token at every type and shape: milliseconds and giga-weights a second.

    Raises:
        OSError: the libraries are not in the folder, or do not load.
        RuntimeError: ggml fails to compute.
    """
    ggml = _Ggml(folder, threads)
    results: list[dict[str, Any]] = []
    for name, (number, has_repacked) in TYPES.items():
        for k, n in SHAPES:
            ways = [ggml.plain, *(ggml.repacking() if has_repacked else [])]
            took = min(_best(ggml, number, (k, n), way, seconds) for way in ways)
            row: dict[str, Any] = {"type": name, "k": k, "n": n, "threads": threads, "ms": took * 1e3}
            results.append(row | {"gweights_per_s": k * n / took / 1e9})
    ggml.base.ggml_backend_free(ggml.backend)
    return results
