"""The launches of csrc/cuda/few/few.cuh on the emulator: its structs in ctypes, and calls on host tensors."""

import ctypes
from ctypes import Structure, c_float, c_int, c_int64, c_void_p

import torch

from dbrx_quant.runtime.kernels import cuda_tiles
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.library import _abi


class Input(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("k", c_int64),
        ("tokens", c_int),
        ("dtype", c_int),
        ("parts", c_int),
        ("norm_dtype", c_int),
        ("norm", c_void_p),
        ("layer_norm", c_int),
        ("eps", c_float),
        ("folded", c_int),
    )


class Result(Structure):
    _fields_ = (
        ("y", c_void_p),
        ("residual", c_void_p),
        ("stride", c_int64),
        ("residual_stride", c_int64),
        ("dtype", c_int),
        ("residual_dtype", c_int),
    )


class Router(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("norm", c_void_p),
        ("dtype", c_int),
        ("layer_norm", c_int),
        ("experts", c_int),
        ("expert_norm", c_float),
        ("partial", c_void_p),
        ("constants", c_void_p),
        ("index", c_void_p),
        ("weights", c_void_p),
    )


class Linears(Structure):
    _fields_ = (
        ("input", Input),
        ("linears", _abi.CudaLinear * 3),
        ("results", Result * 3),
        ("count", c_int),
        ("workspace", c_void_p),
        ("router", Router),
    )


class Routing(Structure):
    _fields_ = (
        ("top_k_index", c_void_p),
        ("top_k_weights", c_void_p),
        ("index_bytes", c_int),
        ("tokens", c_int),
        ("active", c_int),
        ("experts", c_int),
    )


class GateUp(Structure):
    _fields_ = (
        ("input", Input),
        ("routing", Routing),
        ("gate", c_void_p),
        ("up", c_void_p),
        ("ffn", c_int64),
        ("activation", c_int),
        ("inner", c_void_p),
        ("largest", c_void_p),
        ("workspace", c_void_p),
        ("router", Router),
    )


class Down(Structure):
    _fields_ = (
        ("routing", Routing),
        ("down", c_void_p),
        ("ffn", c_int64),
        ("hidden", c_int64),
        ("parts", c_int),
        ("folded", c_int),
        ("inner", c_void_p),
        ("largest", c_void_p),
        ("result", Result),
        ("workspace", c_void_p),
    )


class FewRows:
    """One workspace, cleared once, and the launches that share it."""

    def __init__(self, library):
        self.library = library
        size = c_int64()
        assert library.dbrxq_emulator_few(3, ctypes.byref(size)) == 0
        self.workspace = torch.full((size.value,), 0x5A, dtype=torch.uint8)
        assert library.dbrxq_emulator_few(4, c_void_p(self.workspace.data_ptr())) == 0

    def _run(self, call, args):
        args.workspace = self.workspace.data_ptr()
        assert self.library.dbrxq_emulator_few(call, ctypes.byref(args)) == 0

    def linears(self, given, several, results, router=None):
        """several: (tensors by suffix, out_features); results: `Result`s; router: a `Router`, or None."""
        described = [
            cuda_tiles.device_linear(Stored.of(tensors)).described(width, tensors.get("bias"))
            for tensors, width in several
        ]
        args = Linears(input=given, count=len(several), router=router or Router())
        for i, (linear, result) in enumerate(zip(described, results, strict=True)):
            args.linears[i], args.results[i] = linear, result
        self._run(0, args)

    def mlp(self, given, routing, experts, activation, result, router=None):
        """experts: (gate, up, down) tensors by suffix of each; result: a `Result` [tokens, hidden]."""
        tables = []
        ffn = Stored.of(experts[0][2]).k
        for role, width in zip(range(3), (ffn, ffn, given.k), strict=True):
            structs = [cuda_tiles.device_linear(Stored.of(e[role])).described(width) for e in experts]
            tables.append((_abi.CudaLinear * len(structs))(*structs))
        gate, up, down = (ctypes.addressof(table) for table in tables)
        slots = routing.tokens * routing.active
        inner = torch.full((slots, ffn), float("nan"))
        largest = torch.full((slots, -(-ffn // 128)), float("nan"))
        places = {"inner": inner.data_ptr(), "largest": largest.data_ptr()}
        self._run(
            1,
            GateUp(
                input=given,
                routing=routing,
                gate=gate,
                up=up,
                ffn=ffn,
                activation=_abi.ACTIVATIONS[activation],
                router=router or Router(),
                **places,
            ),
        )
        self._run(
            2,
            Down(
                routing=routing,
                down=down,
                ffn=ffn,
                hidden=given.k,
                parts=given.parts,
                folded=given.folded,
                result=result,
                **places,
            ),
        )
        return inner


def input_of(x, parts=1, norm=None, layer_norm=False, eps=1e-5, folded=0):
    """The activations x [T, K], which must stay alive as must `norm`."""
    return Input(
        x=x.data_ptr(),
        k=x.shape[1],
        tokens=x.shape[0],
        dtype=_abi.DTYPES[x.dtype],
        parts=parts,
        norm_dtype=0 if norm is None else _abi.DTYPES[norm.dtype],
        norm=None if norm is None else norm.data_ptr(),
        layer_norm=layer_norm,
        eps=eps,
        folded=folded,
    )


def result_of(y, residual=None):
    """y [T, N], perhaps a part of wider rows, and what is added to it."""
    result = Result(y=y.data_ptr(), stride=y.stride(0), dtype=_abi.DTYPES[y.dtype])
    if residual is not None:
        result.residual, result.residual_stride = residual.data_ptr(), residual.stride(0)
        result.residual_dtype = _abi.DTYPES[residual.dtype]
    return result


def routing_of(index, weights, experts):
    """index [T, A] int64 or int32; weights [T, A] float32."""
    return Routing(
        top_k_index=index.data_ptr(),
        top_k_weights=weights.data_ptr(),
        index_bytes=index.element_size(),
        tokens=index.shape[0],
        active=index.shape[1],
        experts=experts,
    )
