"""The C interface `csrc/include/dbrxq.h` in ctypes: structs, numbers and the functions of both libraries.

All stands in the order of that header, which describes it; `test_abi.py` holds this file against it.
"""

from collections.abc import Mapping
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from typing import Any

import torch

ABI_VERSION = 8
LAYOUT_VERSION = 1  # of the bodies of repacked linears
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
BAD_ISA, NO_MEMORY, NOT_FINITE, DAMAGED = 6, 7, 8, 10  # statuses that mean more than a wrong argument
CUDA_ERRORS = 1000  # plus a cudaError_t: a status of the CUDA library

Signatures = Mapping[str, tuple[Any, list[Any]]]  # function -> (result, arguments)


class Linear(Structure):
    """`dbrxq_linear`: pointers to the tensors of one quantized linear, and its sizes."""

    _fields_ = (
        ("q_weight", c_void_p),
        ("q_scale", c_void_p),
        ("q_scale_max", c_void_p),
        ("q_groups", c_void_p),
        ("q_invperm", c_void_p),
        ("bias", c_void_p),
        ("k", c_int64),
        ("n", c_int64),
        ("word_rows", c_int64),
        ("groups", c_int64),
        ("out_features", c_int64),
    )


class DecoderLayer(Structure):
    """`dbrxq_decoder_layer`: pointers to the weights of one layer."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", c_void_p * 3),
        ("output", c_void_p),
        ("mlp", c_void_p * 3),
        ("router", c_void_p),
        ("experts", c_void_p),
        ("expert_count", c_int64),
        ("active", c_int64),
        ("expert_norm", c_float),
        ("reserved", c_int32),
    )


class Decoder(Structure):
    """`dbrxq_decoder`: the layers of a model, and what they share."""

    _fields_ = (
        ("layers", POINTER(DecoderLayer)),
        ("final_norm", c_void_p),
        ("layer_count", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("key_heads", c_int64),
        ("head_dim", c_int64),
        ("scale", c_float),
        ("clip", c_float),
        ("eps", c_float),
        ("layer_norm", c_int32),
        ("activation", c_int32),
        ("dtype", c_int32),
        ("activation_bits", c_int32),
        ("reserved", c_int32),
    )


CPU_FUNCTIONS: Signatures = {
    "dbrxq_abi_version": (c_int, []),
    "dbrxq_set_threads": (None, [c_int]),
    "dbrxq_threads": (c_int, []),
    "dbrxq_explain_bus_errors": (None, []),
    "dbrxq_status_text": (c_char_p, [c_int]),
    "dbrxq_isa": (c_char_p, []),
    "dbrxq_set_isa": (c_int, [c_char_p]),
    "dbrxq_pack_codes": (c_int, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p]),
    "dbrxq_unpack_codes": (c_int, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p]),
    "dbrxq_dequantize": (c_int, [POINTER(Linear), c_void_p]),
    "dbrxq_linear_forward": (c_int, [POINTER(Linear), c_void_p, c_int64, c_void_p]),
    "dbrxq_experts_forward": (
        c_int,
        [c_void_p] * 3 + [c_int64] * 4 + [POINTER(Linear)] * 3 + [c_int, c_void_p],
    ),
    "dbrxq_repacked_bytes": (c_int, [POINTER(Linear), POINTER(c_int64), POINTER(c_int64)]),
    "dbrxq_repack": (c_int, [POINTER(Linear), c_void_p, c_void_p]),
    "dbrxq_repacked_head": (c_int, [POINTER(Linear), c_void_p, c_uint64, c_int, c_void_p]),
    "dbrxq_repacked_checksum": (c_int, [c_void_p, POINTER(c_uint64)]),
    "dbrxq_repacked_check": (c_int, [c_void_p]),
    "dbrxq_repacked_linear": (c_int, [c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p]),
    "dbrxq_read_memory": (c_int, [c_void_p, c_int64, POINTER(c_uint64)]),
    "dbrxq_repacked_experts": (
        c_int,
        [c_void_p, c_int64, c_int] + [c_void_p] * 3 + [c_int64] * 3 + [c_int, c_void_p],
    ),
    "dbrxq_decode": (c_int, [POINTER(Decoder), c_void_p] + [c_int64] * 3 + [c_void_p] * 4),
    "dbrxq_search_group": (c_int, [c_void_p, c_int64, c_int64, c_int] + [c_void_p] * 5),
    "dbrxq_error_table": (
        c_int,
        [c_void_p, c_int64, c_int64] + [c_void_p] * 3 + [c_int64, c_int64, c_void_p],
    ),
    "dbrxq_solve_block": (
        c_int,
        [c_void_p, c_int64, c_int64] + [c_void_p] * 5 + [c_int64, c_int] + [c_void_p] * 6,
    ),
}


class CudaLinear(Structure):
    """`dbrxq_cuda_linear`: pointers to one linear in device layout, and its sizes."""

    _fields_ = (
        ("words", c_void_p),
        ("scale_codes", c_void_p),
        ("unit_scale", c_void_p),
        ("permutation", c_void_p),
        ("bias", c_void_p),
        ("k", c_int64),
        ("n", c_int64),
        ("out_features", c_int64),
        ("units", c_int64),
        ("first_unit", c_int32 * 7),
        ("reserved", c_int32),
    )


class CudaExperts(Structure):
    """`dbrxq_cuda_experts`: device pointers to the arrays of a block's linears, and their sizes."""

    _fields_ = (
        ("gate", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
        ("experts", c_int64),
        ("hidden", c_int64),
        ("ffn", c_int64),
        ("activation", c_int32),
        ("reserved", c_int32),
    )


class CudaDecoderLayer(Structure):
    """`dbrxq_cuda_decoder_layer`: pointers to the weights of one layer."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", c_void_p * 3),
        ("output", c_void_p),
        ("experts", c_void_p),
        ("router", c_void_p),
        ("active", c_int64),
        ("expert_norm", c_float),
        ("reserved", c_int32),
    )


class CudaDecoder(Structure):
    """`dbrxq_cuda_decoder`: the layers of a model on a GPU, and what they share."""

    _fields_ = (
        ("layers", c_void_p),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("head", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("layer_count", c_int64),
        ("hidden", c_int64),
        ("vocabulary", c_int64),
        ("heads", c_int64),
        ("key_heads", c_int64),
        ("head_dim", c_int64),
        ("scale", c_float),
        ("clip", c_float),
        ("eps", c_float),
        ("layer_norm", c_int32),
        ("dtype", c_int32),
        ("cache_bits", c_int32),
    )


class CudaCache(Structure):
    """`dbrxq_cuda_cache`: keys and values of one layer; an array of these is in device memory."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("capacity", c_int64),
    )


class CudaSampling(Structure):
    """`dbrxq_cuda_sampling`: how the next token is chosen; one is in device memory."""

    _fields_ = (
        ("temperature", c_float),
        ("top_p", c_float),
        ("top_k", c_int64),
        ("seed", c_uint64),
    )


class CudaStep(Structure):
    """`dbrxq_cuda_step`: where a step's inputs, cache and results are, and its shape."""

    _fields_ = (
        ("tokens", c_void_p),
        ("past", c_void_p),
        ("cache", c_void_p),
        ("states", c_void_p),
        ("workspace", c_void_p),
        ("logits", c_void_p),
        ("sampling", c_void_p),
        ("generated", c_void_p),
        ("made", c_void_p),
        ("room", c_int64),
        ("sequences", c_int64),
        ("new_tokens", c_int64),
    )


CUDA_FUNCTIONS: Signatures = {
    "dbrxq_cuda_abi_version": (c_int, []),
    "dbrxq_cuda_status_text": (c_char_p, [c_int]),
    "dbrxq_cuda_targets": (c_char_p, []),
    "dbrxq_cuda_runtime_version": (c_int, []),
    "dbrxq_cuda_probe": (c_int, [c_int]),
    "dbrxq_cuda_repack": (c_int, [POINTER(CudaLinear), c_void_p, c_void_p, c_void_p]),
    "dbrxq_cuda_unpack": (c_int, [POINTER(CudaLinear), c_void_p, c_void_p]),
    "dbrxq_cuda_reconstruct": (c_int, [POINTER(CudaLinear), c_void_p, c_void_p]),
    "dbrxq_cuda_linear_workspace": (c_int, [POINTER(CudaLinear), c_int64, c_int, POINTER(c_int64)]),
    "dbrxq_cuda_linear_forward": (
        c_int,
        [POINTER(CudaLinear), c_void_p, c_int64, c_int, c_void_p, c_void_p, c_void_p],
    ),
    "dbrxq_cuda_experts_workspace": (
        c_int,
        [POINTER(CudaExperts), c_int64, c_int64, c_int, POINTER(c_int64)],
    ),
    "dbrxq_cuda_experts_forward": (
        c_int,
        [POINTER(CudaExperts)] + [c_void_p] * 3 + [c_int64, c_int64, c_int] + [c_void_p] * 3,
    ),
    "dbrxq_cuda_decode_workspace": (c_int, [POINTER(CudaDecoder), c_int64, c_int64, POINTER(c_int64)]),
    "dbrxq_cuda_decode": (c_int, [POINTER(CudaDecoder), POINTER(CudaStep), c_void_p]),
    "dbrxq_cuda_decode_capture": (c_int, [POINTER(CudaDecoder), POINTER(CudaStep), c_void_p]),
    "dbrxq_cuda_graph_launch": (c_int, [c_void_p, c_void_p]),
    "dbrxq_cuda_graph_free": (c_int, [c_void_p]),
}
