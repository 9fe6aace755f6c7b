"""EXL2 as a quantization method of transformers, so that `from_pretrained` of its auto classes loads it.

transformers asks a quantizer to change the empty model before the weights come (here: swap the modules) and
to say which stored tensor goes where (here: a table of exact names, no patterns). It is registered by
importing `dbrx_quant.runtime`; without that import transformers warns and goes on with random weights, which
is why `load_model` is the front door.

This module is imported while transformers imports its quantizers (see `registration`): at its top level it
may import nothing of transformers that needs them.
"""
# Hooks whose defaults return None are typed so by transformers, though it uses what they return.
# pyright: reportIncompatibleMethodOverride=false

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dbrx_quant.runtime.exl2.checkpoint import read_header
from dbrx_quant.runtime.families import describe, family_of
from dbrx_quant.runtime.families.config import read_config
from dbrx_quant.runtime.families.facts import to_half
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.contents import Contents, read_contents
from dbrx_quant.runtime.folder.finite import check_finite
from dbrx_quant.runtime.folder.index import unnamed_shard
from dbrx_quant.runtime.hybrid.gpu_plan import GpuPlan
from dbrx_quant.runtime.model.memory import Memory
from dbrx_quant.runtime.model.placement import check_device_map, settle

METHOD = "exl2"

_in_use: ContextVar[tuple[Contents, Memory | None, GpuPlan | None] | None] = ContextVar(
    "in_use", default=None
)


@contextmanager
def use_contents(contents: Contents, memory: Memory | None, gpu: GpuPlan | None = None) -> Iterator[None]:
    """Have `from_pretrained(None, state_dict=...)` load these contents, already checked, inside the block.

    Args:
        contents: what is loaded.
        memory: how much of it stays in memory; None: no limit is known.
        gpu: what a GPU is going to hold, if anything stays on the host.
    """
    token = _in_use.set((contents, memory, gpu))
    try:
        yield
    finally:
        _in_use.reset(token)


@register_quantization_config(METHOD)
class Exl2Config(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of an EXL2 model's config.json.

    Its keys (`bits`, `head_bits`, `calibration`, `version`) only inform: what is quantized and how follows
    from the tensors themselves. All are kept and saved again.
    """

    def __init__(self, **keys: Any) -> None:
        self.__dict__.update(keys)
        self.__dict__["quant_method"] = METHOD  # transformers types it as an enumeration of its own methods


@register_quantizer(METHOD)
class Exl2HfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads EXL2 checkpoints through `from_pretrained`, and saves them through `save_pretrained`.

    Raises (while loading):
        CheckpointError: the checkpoint does not fit the configuration in every tensor.
    """

    requires_calibration = True  # dense weights are not quantized on the fly: that is `dbrx-quant convert`

    def __init__(self, quantization_config: Exl2Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._keys: Any = None
        self._contents: Contents | None = None
        self._memory: Memory | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._gpu: GpuPlan | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse devices where the model would not run, or not be, before anything is loaded."""
        check_device_map(device_map)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Models can be saved: under the names and types that they were stored with."""
        return True

    @property
    def is_trainable(self) -> bool:
        """There is no backward pass."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Every op has a fake kernel and none depends on values, so `torch.compile` takes whole graphs.

        Not where the host computes experts: it waits for what the device has chosen.
        """
        return self._gpu is None

    def update_attn_implementation(self, config: Any) -> Any:
        """Report weights that transformers would not find by itself, such as exllamav2's.

        The only hook that is given the configuration before transformers looks for files; it has nothing to
        do with attention.
        """
        folder = Path(config.name_or_path)
        if _in_use.get() is None and folder.is_dir() and (name := unnamed_shard(folder)):
            config.transformers_weights = name
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        from dbrx_quant.runtime.model.key_table import KeyTable
        from dbrx_quant.runtime.model.swap import swap_modules

        architectures = list(model.config.architectures or [])
        if type(model).__name__ not in architectures:
            raise ValueError(
                f"{type(model).__name__} is not what config.json names, {architectures}; "
                "load EXL2 models with AutoModelForCausalLM or load_model"
            )
        in_use = _in_use.get() or (_open_contents(model, checkpoint_files), None, None)
        contents, self._memory, self._gpu = in_use
        saving = swap_modules(model, contents)
        self._contents = contents
        loading = dict(saving)
        for file in checkpoint_files or ():  # which may use the names of the original model
            known = {name: contents.architecture.normalise(name) for name in read_header(Path(file))}
            loading |= {name: saving[key] for name, key in known.items() if key in saving}
        self._keys = KeyTable(loading, saving)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if self._gpu is None and any(block.experts for block in contents.architecture.blocks):
            model._can_compile_fullgraph = True  # what couldn't was the loop over experts, which is gone
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Use our table of names instead of transformers' patterns, which would merge the experts.

        transformers before 5.20 does not pass the model.
        """
        return [self._keys]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from dbrx_quant.runtime.model.linear import QuantLinear
        from dbrx_quant.runtime.model.repacked_linears import use_repacked
        from dbrx_quant.runtime.model.swap import leave_on_host
        from dbrx_quant.runtime.step.native_step import install_native_step

        missed = sorted(set(self._keys.saving.values()) - self._keys.renamed)
        if missed:
            raise CheckpointError(
                f"{model.config.name_or_path}: transformers did not load {len(missed)} tensors, {missed[0]} "
                "first, and would run with random weights; use dbrx_quant.runtime.load_model"
            )
        for name, parameter in model.named_parameters():
            # transformers before 5.20 leaves renamed tensors of a quantized model in the type of the file
            if (dtype := self._dtypes.get(name, parameter.dtype)) != parameter.dtype:
                parameter.data = parameter.data.to(dtype)
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            settle(model)
        assert self._contents is not None
        staying = None
        if self._gpu is not None:
            leave_on_host(model, self._contents, self._gpu)
            staying = self._gpu.host_names(self._contents)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.tile()
        use_repacked(model, self._contents, self._keys.saving, self._memory, staying)
        self._contents = self._memory = None  # what is loaded holds on to what it needs
        model.requires_grad_(False)  # else torch.compile traces a backward pass, which there isn't
        install_native_step(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: 16-bit tensors go back to float16, as the format has them.

        A GPU holds one q_weight more meanwhile, not all of them.
        """
        state: dict[str, Tensor] = model.state_dict(destination=_PackedOnHost())
        floats = {name for name, t in state.items() if t.is_floating_point() and t.dtype != torch.float16}
        return {name: to_half(t, name) if name in floats else t for name, t in state.items()}, {}


class _PackedOnHost(OrderedDict[str, Tensor]):
    """A state dict that moves each q_weight to the host as it is added."""

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, tensor.cpu() if name.endswith(".q_weight") else tensor)


def _open_contents(model: Any, checkpoint_files: list[str] | None) -> Contents:
    """The contents of the files that transformers is about to load; also fixes the model's configuration."""
    if not checkpoint_files:
        raise ValueError("an EXL2 model loads from its folder, not from a state_dict")
    folder = Path(checkpoint_files[0]).parent
    architecture = describe(model.config)
    contents = read_contents(architecture, architecture.open(folder))
    check_finite(contents)
    loaded = {Path(file).name for file in checkpoint_files}
    for name in contents.names:
        file = contents.checkpoint.info(name).file
        if file.name not in loaded:
            raise CheckpointError(
                f"{folder}: {name} is in {file.name}, which transformers would not read; rewrite the index "
                f"with `dbrx-quant index {folder}`, or load it with dbrx_quant.runtime.load_model"
            )
    fix = family_of(model.config.model_type).fix_config
    if fix is not None:  # transformers has filled in its defaults by now; what the caller chose stays
        fix(model.config, read_config(folder), True)
    return contents
