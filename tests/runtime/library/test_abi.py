"""`library/_abi.py` against `csrc/include/dbrxq.h`, which it repeats: each function, struct and number."""

import ctypes
import re

import pytest
from places import CSRC

from dbrx_quant.runtime.library import _abi

HEADER = CSRC / "include" / "dbrxq.h"
SOURCE = re.sub(r"//[^\n]*", "", HEADER.read_text(encoding="utf-8"))

FUNCTIONS = re.findall(r"DBRXQ_API\s+([^;()]*?)(\w+)\(([^)]*)\);", SOURCE)
BODIES = {name: body for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", SOURCE, re.DOTALL)}
NUMBERS = {name: int(value) for name, value in re.findall(r"\b(DBRXQ_\w+)\s*=?\s*(\d+)", SOURCE)}
STRUCTS = {
    "dbrxq_linear": _abi.Linear,
    "dbrxq_decoder_layer": _abi.DecoderLayer,
    "dbrxq_decoder": _abi.Decoder,
    "dbrxq_cuda_linear": _abi.CudaLinear,
    "dbrxq_cuda_experts": _abi.CudaExperts,
    "dbrxq_cuda_decoder_layer": _abi.CudaDecoderLayer,
    "dbrxq_cuda_decoder": _abi.CudaDecoder,
    "dbrxq_cuda_cache": _abi.CudaCache,
    "dbrxq_cuda_sampling": _abi.CudaSampling,
    "dbrxq_cuda_step": _abi.CudaStep,
}
TYPES = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "void": None,
    "char*": ctypes.c_char_p,
}


def split(declaration):
    """(type without const, name, length of the array or None) of a C declaration."""
    kind, name, length = re.fullmatch(
        r"(.*?)\s*(\w+)\s*(?:\[(\d+)\])?", declaration.strip(), re.DOTALL
    ).groups()
    return re.sub(r"\bconst\b|\s", "", kind), name, length and int(length)


def allowed(kind):
    """The ctypes that may stand for a C type: a pointer may always go as a bare address."""
    if kind in TYPES:
        return [TYPES[kind]]
    assert kind.endswith("*"), kind
    pointed = (TYPES | STRUCTS).get(kind[:-1])
    return [ctypes.c_void_p] + ([ctypes.POINTER(pointed)] if pointed else [])


def test_the_tables_have_the_functions_of_the_header_in_its_order():
    names = [name for _, name, _ in FUNCTIONS]
    assert len(names) == SOURCE.count("DBRXQ_API") - 1  # and its definition
    assert [*_abi.CPU_FUNCTIONS, *_abi.CUDA_FUNCTIONS] == names
    assert all(name.startswith("dbrxq_cuda_") for name in _abi.CUDA_FUNCTIONS)


@pytest.mark.parametrize(("result", "name", "parameters"), FUNCTIONS, ids=[name for _, name, _ in FUNCTIONS])
def test_a_function_has_the_result_and_the_arguments_of_the_header(result, name, parameters):
    ours, arguments = {**_abi.CPU_FUNCTIONS, **_abi.CUDA_FUNCTIONS}[name]
    assert ours in allowed(split(f"{result} {name}")[0])
    wanted = [] if parameters == "void" else [split(each)[0] for each in parameters.split(",")]
    assert len(arguments) == len(wanted)
    for at, (argument, kind) in enumerate(zip(arguments, wanted, strict=True)):
        assert argument in allowed(kind), f"argument {at}: {kind}"


@pytest.mark.parametrize("name", STRUCTS)
def test_a_struct_has_the_fields_of_the_header(name):
    fields = [split(line) for line in BODIES[name].split(";") if line.strip()]
    ours = STRUCTS[name]._fields_
    assert [field for field, _ in ours] == [field for _, field, _ in fields]
    for (field, found), (kind, _, length) in zip(ours, fields, strict=True):
        assert found in [each * length if length else each for each in allowed(kind)], field


def test_the_numbers_are_those_of_the_header():
    assert NUMBERS["DBRXQ_ABI_VERSION"] == _abi.ABI_VERSION
    assert {name: NUMBERS[f"DBRXQ_{name.upper()}"] for name in _abi.ACTIVATIONS} == _abi.ACTIVATIONS
    assert {kind: NUMBERS[f"DBRXQ_{str(kind)[6:].upper()}"] for kind in _abi.DTYPES} == _abi.DTYPES
    for name in ("BAD_ISA", "NO_MEMORY", "NOT_FINITE"):
        assert NUMBERS[f"DBRXQ_{name}"] == getattr(_abi, name)
