"""The front door: from a folder or repository of EXL2 tensors to a transformers model ready to generate."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.contents import DERIVED, Contents, read_contents
from dbrx_quant.runtime.folder.find import find_folder
from dbrx_quant.runtime.folder.finite import check_finite
from dbrx_quant.runtime.hybrid.gpu_device import splitting_device
from dbrx_quant.runtime.hybrid.gpu_plan import GpuMemory, GpuPlan, plan_gpu
from dbrx_quant.runtime.model.memory import Notify, prepare_memory
from dbrx_quant.runtime.model.placement import AUTO, find_devices, place
from dbrx_quant.runtime.model.quantizer import METHOD, use_contents
from dbrx_quant.runtime.tokenizer.ids import special_ids

_logger = logging.getLogger(__name__)
_MOST_SEQUENCES = 256  # side by side, each of which takes memory


def load_model(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    device_map: Any = None,
    memory: int | None = None,
    gpu_memory: int | GpuMemory | None = None,
    notify: Notify | None = None,
    **options: Any,
) -> Any:
    """An EXL2 model, ready for `generate`; its weights stay packed and, on the CPU, in the mapped file.

    Every shard of the folder counts, whatever an index says, so that folders written by exllamav2 load too:
    without an index or with a stale one, under either of DBRX's namings, without a generation config or with
    one that knows no end of a chat turn (the ids that end something come from all files together).

    Args:
        source: a folder, or the id of a repository on the Hub.
        device: where to put the model: `cpu`, `cuda`, several GPUs as `cuda:0,cuda:1`, which get consecutive
            layers each by their free memory, or `auto`: as many GPUs as it takes, the CPU where none is.
        dtype: of activations and of the tensors that are not quantized. Default: float32 on the CPU, where
            half precision is slow and bfloat16 would round the stored float16 norms; float16 elsewhere.
        revision: branch, tag or commit of a repository; EXL2 repositories have a branch for each size.
        device_map: says which module goes to which device, as in transformers; then `device` doesn't count.
            Nothing can be offloaded to the CPU or the disk by it.
        memory: bytes of weights that stay in memory, on the CPU: those that every token reads, then the
            experts that are chosen most; the others are read from the disk when they are used. Where not all
            of the model has room, `repacked.bin` is made in the folder, unless it is there. The cache and the
            program itself come on top. Default: all of them.
        gpu_memory: bytes that the model may take of a GPU's memory: `device`, or the current GPU where that
            is "cpu". It gets what every token needs, the cache and as many experts as have room, the busiest
            first; the CPU computes the others while the GPU computes its own. With `memory`, that many
            bytes of those stay in main memory. Default: all of the model is on one device.
        notify: called with each line on what is done for `memory` and `gpu_memory`. Default: the log.
        **options: passed on to `from_pretrained`, such as `attn_implementation`.

    Raises:
        CheckpointError: the folder is no EXL2 checkpoint, does not fit its configuration in every tensor, or
            holds NaN or infinity (0.1 s a gigabyte of 16-bit tensors to see). A model is never returned with
            weights that were not read.
        RuntimeError: there is no such GPU, or the CUDA kernels cannot run there; before anything is read.
        ValueError: the devices have too little free memory; `memory` is too little for what has to stay, or
            the model is not on the CPU; `gpu_memory` is too little for what every token needs, or more than
            is free, or asked for several devices.
        OSError: `repacked.bin` has to be made, and cannot be.
    """
    import transformers

    devices = find_devices(device) if device_map is None else None
    folder = find_folder(source, revision)
    config = load_config(folder)
    architecture = describe(config)
    contents = read_contents(architecture, architecture.open(folder))
    check_finite(contents)
    generation = _generation_config(folder, config)
    config.quantization_config = _quantization(config, folder)
    notify = notify or _logger.warning
    split, gpu = None, None
    if gpu_memory is not None:
        if devices is None or (len(devices) > 1 and device != AUTO):
            raise ValueError("gpu_memory: it splits a model over one GPU and the CPU; name one device")
        dtype = dtype or torch.float16
        split, gpu = _split(contents, gpu_memory, devices[0], config, dtype, notify)
        devices = [torch.device("cpu") if split else gpu]
    on_cpu = not torch.accelerator.is_available() if devices is None else devices[0].type == "cpu"
    dtype = dtype or (torch.float32 if on_cpu else torch.float16)
    if devices is not None:
        device_map = place(contents, dtype.itemsize, devices, fewest=device == AUTO)
    plan = None
    if memory is not None:
        if not on_cpu:
            raise ValueError("memory: weights stay in memory or on disk on the CPU only; leave it out")
        host = split.host_names(contents) if split else None
        plan = prepare_memory(contents, memory, dtype.itemsize, notify, host)
    checkpoint = contents.checkpoint
    names = [name for name in checkpoint.names() if not name.endswith(DERIVED)]
    try:
        with use_contents(contents, plan, split):
            model = getattr(transformers, config.architectures[0]).from_pretrained(
                None,
                config=config,
                state_dict={name: checkpoint.load(name) for name in names},
                dtype=dtype,
                device_map=device_map,
                **options,
            )
    except (CheckpointError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        if options or not on_cpu or "memory" in str(error):  # then it need not be the file's fault
            raise
        path = folder / "config.json"
        raise CheckpointError(
            f"{path}: transformers cannot build the model that it describes: {error!r}"
        ) from error
    if split:
        model.to(gpu)
        checkpoint.release_all()  # what the device holds now; what stays comes from the file again
    model.generation_config = generation
    model.config.name_or_path = str(source)
    return model


def _split(
    contents: Contents,
    memory: int | GpuMemory,
    device: torch.device,
    config: Any,
    dtype: torch.dtype,
    notify: Notify,
) -> tuple[GpuPlan | None, torch.device]:
    """What a GPU holds of a model, None where that is all of it, and the GPU; tells what is where."""
    asked = memory if isinstance(memory, GpuMemory) else GpuMemory(memory)
    longest = getattr(config, "max_position_embeddings", None)
    plan = plan_gpu(contents, asked, longest, dtype.itemsize)
    chosen = splitting_device(device, asked.limit)
    for line in plan.lines():
        notify(line)
    return None if plan.whole else plan, chosen


def _quantization(config: Any, folder: Path) -> dict[str, Any]:
    """The folder's quantization config; repositories from before March 2024 have none."""
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method", METHOD)
    if method != METHOD:
        raise CheckpointError(f"{folder / 'config.json'}: quant_method is {method!r}, expected {METHOD!r}")
    return {**stored, "quant_method": METHOD}


def _generation_config(folder: Path, config: Any) -> Any:
    """The folder's generation config, with all ids that its files say end a text or a chat turn."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    found = path.exists()
    try:
        if found:
            made = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        else:
            made = GenerationConfig.from_model_config(config)
        if (folder / "tokenizer.json").exists():
            ids = special_ids(folder)
            made.eos_token_id = list(ids.eos) or None
            if not found:
                made.bos_token_id, made.pad_token_id = ids.bos, ids.pad
        for key in ("num_beams", "num_return_sequences"):
            if (getattr(made, key) or 1) > _MOST_SEQUENCES:
                raise ValueError(f"{key} is {getattr(made, key)}, expected at most {_MOST_SEQUENCES}")
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            _check_ids(key, getattr(made, key))
        made._original_object_hash = hash(made)  # transformers saves what is as it was loaded without a fuss
    except CheckpointError:
        raise
    except Exception as error:  # of fields that have a wrong type
        raise CheckpointError(
            f"{path if found else folder / 'config.json'}: {error or repr(error)}"
        ) from error
    return made


def _check_ids(key: str, value: Any) -> None:
    """Raise ValueError unless a value is a token's id, a list of ids, or None."""
    ids = value if isinstance(value, list) and value else [value]
    if value is not None and any(type(one) is not int or one < 0 for one in ids):
        raise ValueError(f"{key} is {value!r}, expected an id of a token or a list of ids")
