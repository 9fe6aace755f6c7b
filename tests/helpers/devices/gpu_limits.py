"""Limits of a GPU's memory at which so many experts of each block have room."""

from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.folder.contents import read_contents
from dbrx_quant.runtime.hybrid.gpu_bytes import allocated
from dbrx_quant.runtime.hybrid.gpu_plan import GpuMemory, plan_gpu

CONTEXT = 64
EVERYTHING = 1 << 50


def contents_of(folder):
    architecture = describe(load_config(folder))
    return read_contents(architecture, architecture.open(folder))


def room_for(folder, share, item_bytes=4, context=CONTEXT):
    """A limit that leaves this share of the bytes of all experts, and a little for the last one to fit."""
    contents = contents_of(folder)
    whole = plan_gpu(contents, GpuMemory(EVERYTHING, context), None, item_bytes)
    shape = next(spec.shape for spec in contents.architecture.floats if len(spec.shape) == 2)
    table = allocated(item_bytes * shape[0] * shape[1])
    common = whole.common - table + whole.cache + whole.workspace
    return GpuMemory(common + int(share * whole.experts), context)
