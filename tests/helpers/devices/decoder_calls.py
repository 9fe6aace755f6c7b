"""Launches of csrc/cuda/decoder/decoder.cuh on the emulator: their structs in ctypes."""

from ctypes import Structure, byref, c_float, c_int, c_int64, c_void_p


class Attention(Structure):
    _fields_ = (
        ("queries", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("cache", c_void_p),
        ("past", c_void_p),
        ("sequences", c_int),
        ("tokens", c_int),
        ("heads", c_int),
        ("key_heads", c_int),
        ("head_dim", c_int),
        ("dtype", c_int),
        ("cache_bits", c_int),
        ("splits", c_int),
        ("scale", c_float),
        ("clip", c_float),
        ("eps", c_float),
        ("attended", c_void_p),
        ("partial", c_void_p),
        ("tickets", c_void_p),
    )


class Sample(Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("sampling", c_void_p),
        ("vocabulary", c_int64),
        ("sequences", c_int),
        ("tokens", c_void_p),
        ("past", c_void_p),
        ("generated", c_void_p),
        ("made", c_void_p),
        ("room", c_int64),
    )


def run(library, args):
    assert library.dbrxq_emulator_decoder(int(isinstance(args, Sample)), byref(args)) == 0
