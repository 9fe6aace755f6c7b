"""A model with one block in memory at a time, run by transformers' own code.

The model is built without storage (on torch's meta device); a block gets real weights when it is asked for.
The experts that tokens are routed to are not part of it: the block's expert module is replaced by one that
notes its inputs and adds nothing, and the caller runs the experts one after another (`blocks.walk`).
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dbrx_quant.runtime.exl2.finite import all_finite
from dbrx_quant.runtime.families.facts import (
    BlockSpec,
    LinearSpec,
    find_source,
    load_bias,
    load_linear,
    module_linears,
)
from dbrx_quant.runtime.families.source import open_source
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.watched import WatchedFile
from dbrx_quant.runtime.kernels.device import CPU, upload
from dbrx_quant.runtime.kernels.float_matmul import rounded_products
from dbrx_quant.runtime.tokenizer.fix import READ_FILES


@dataclass(frozen=True)
class Routing:
    """Which experts each token went to: [T, A] indices and weights, and the experts' input [T, D].

    Experts run on `device`, where their tokens are brought a span at a time.
    """

    x: Tensor
    index: Tensor
    weight: Tensor
    device: torch.device = CPU

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {"x": self.x, "index": self.index, "weight": self.weight}

    def part(self, tokens: slice) -> "Routing":
        """That of some tokens."""
        return Routing(self.x[tokens], self.index[tokens], self.weight[tokens], self.device)


class _NotedExperts(nn.Module):
    """Stands where a block's experts were: notes what they would have got, returns zeros in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: Routing | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        self.noted = Routing(x, top_k_index, top_k_weights, x.device)
        return torch.zeros_like(hidden_states)


class _KwargsRecorder(nn.Module):
    """Stands where a block was: notes the keyword arguments that the model passes to it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", "full_attention")
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return hidden_states


class _Nothing(nn.Module):
    """Stands where a feed-forward part was and adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class LiveBlock:
    """One block with real weights.

    Attributes:
        module: the transformers module; its linears are ordinary `nn.Linear`s whose weights may be replaced.
        spec: what the block consists of.
        device: where it runs, and its outputs are; states come from anywhere.
        exact: whether its products must not be rounded.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: BlockSpec,
        kwargs: Callable[[int, int], dict[str, Any]],
        device: torch.device = CPU,
        exact: bool = False,
    ) -> None:
        self.module = module
        self.spec = spec
        self.device = device
        self.exact = exact
        self._kwargs = kwargs
        self._experts: _NotedExperts | None = None
        if spec.experts:
            self._experts = _NotedExperts()
            parent, _, child = spec.experts.module.removeprefix(spec.module + ".").rpartition(".")
            setattr(module.get_submodule(parent), child, self._experts)

    def submodule(self, spec: LinearSpec) -> nn.Linear:
        """The `nn.Linear` that holds a linear of this block (experts are not in it)."""
        found = self.module.get_submodule(spec.module.removeprefix(self.spec.module + "."))
        assert isinstance(found, nn.Linear)
        return found

    def install(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights of linears (outside the experts) by name, [N, K]."""
        for stage in self.spec.stages:
            for spec in stage:
                if spec.name in weights:
                    begin, end = spec.outputs or (0, spec.shape[1])
                    self.submodule(spec).weight.data[begin:end] = weights[spec.name]

    def __call__(self, states: Tensor) -> tuple[Tensor, Routing | None]:
        """Run states [rows, length, D] through the block.

        Returns:
            The output without the routed experts' shares, and what these experts would have got, if any.
        """
        with nullcontext() if self.exact else rounded_products(self.device), _attention_of(self.device):
            x = upload(states, self.device)
            output = self.module(x, **self._kwargs(states.shape[0], states.shape[1]))
        output = output[0] if isinstance(output, tuple) else output
        return output, self.routing

    @property
    def routing(self) -> Routing | None:
        """What the routed experts would have got when the block last ran, if there are any."""
        return self._experts.noted if self._experts else None

    def with_middle(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The output for states [rows, length, D] without routed experts' shares, and the stream between.

        That is the stream right after attention, before a feed-forward part or any experts add to it.
        """
        if self.spec.only_routed:
            output = self(states)[0]
            return output, output
        added: list[Tensor] = []
        owner, name = self._mlp()

        def keep(module: Any, inputs: Any, output: Any) -> None:
            added.append(output)

        handle = owner.get_submodule(name).register_forward_hook(keep)
        try:
            output = self(states)[0]
        finally:
            handle.remove()
        return output, output - added.pop()

    def without_mlp(self, states: Tensor) -> Tensor:
        """The output for states [rows, length, D] if the feed-forward part and all experts added nothing."""
        if self.spec.only_routed:
            return self(states)[0]
        owner, name = self._mlp()
        whole = owner.get_submodule(name)
        try:
            setattr(owner, name, _Nothing())
            return self(states)[0]
        finally:
            setattr(owner, name, whole)

    def _mlp(self) -> tuple[nn.Module, str]:
        """The owner of the feed-forward part and its name there."""
        owner, _, name = self.spec.mlp.removeprefix(self.spec.module + ".").rpartition(".")
        return self.module.get_submodule(owner), name


class StreamedModel:
    """A dense source model, opened for streaming.

    Args:
        folder: a Hugging Face model folder.
        device: where its weights come to, and what is computed with them.
        exact: whether the products of its blocks must not be rounded, as those of statistics may be.

    Attributes:
        folder: as given.
        device: as given.
        exact: as given.
        config: transformers' configuration.
        architecture: what the model consists of.
        checkpoint: its weights.
        corrections: keys of `config.json` that have other values, by the weights.
        notes: what was corrected, a sentence each.

    Raises:
        CheckpointError: unknown architecture, or tensors that are missing or left over.
    """

    def __init__(self, folder: Path, device: torch.device = CPU, exact: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        self.folder, self.device, self.exact = Path(folder), device, exact
        self._read = [WatchedFile(self.folder / name) for name in READ_FILES]
        source = open_source(self.folder)
        self.config, self.architecture, self.checkpoint = (
            source.config,
            source.architecture,
            source.checkpoint,
        )
        self.corrections, self.notes = source.corrections, source.notes
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()
        for name, module in self._model.named_modules():
            if hasattr(module, "inv_freq"):  # its buffers are computed, not stored: build it again on the CPU
                parent, _, child = name.rpartition(".")
                setattr(self._model.get_submodule(parent), child, type(module)(self.config))
        self._kwargs_cache: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def check_unchanged(self) -> None:
        """Raise ChangedError if a file of the model is not what it was when the model was opened."""
        self.checkpoint.check_unchanged()
        for watched in self._read:
            watched.check()

    def dense(self, spec: LinearSpec, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] of a linear, as the source has it, in that type."""
        weight = load_linear(self.checkpoint, spec)
        if not all_finite(weight):
            raise CheckpointError(f"{self.folder}: {spec.name}: the weight contains NaN or infinity")
        weight = weight.to(self.device).to(dtype, copy=self.device == CPU)
        self.checkpoint.release(find_source(self.checkpoint, spec).tensor)
        return weight

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings [.., D] float32 of token ids [..], both on the host."""
        return self.checkpoint.load("model.embed_tokens.weight")[input_ids].float()

    def block(self, index: int) -> LiveBlock:
        """Block `index` with its dense weights, experts aside."""
        spec = self.architecture.blocks[index]
        module = copy.deepcopy(self._model.get_submodule(spec.module))
        live = LiveBlock(
            module,
            spec,
            lambda rows, length: self._block_kwargs(rows, length)[index],
            self.device,
            self.exact,
        )
        for kept in spec.floats:
            _set(
                module,
                kept.parameter.removeprefix(spec.module + "."),
                self.checkpoint.load(kept.name).float(),
            )
        for stage in spec.stages:
            for owner, specs in module_linears(stage).items():
                path = owner.removeprefix(spec.module + ".")
                _set(module, f"{path}.weight", torch.cat([self.dense(s) for s in specs]))
                if specs[0].bias:
                    biases = [load_bias(self.checkpoint, s) for s in specs]
                    _set(module, f"{path}.bias", torch.cat([b.float() for b in biases if b is not None]))
        left = [name for name, p in module.named_parameters() if p.is_meta]
        if left:
            raise CheckpointError(f"{self.folder}: block {index}: no weights for {', '.join(left)}")
        module.to(self.device)
        return live

    def final_norm(self, states: Tensor) -> Tensor:
        """The input of the head, from the last block's output, both on the device."""
        spec = next(f for f in self.architecture.floats if f.name == "model.norm.weight")
        module = copy.deepcopy(self._model.get_submodule(spec.parameter.removesuffix(".weight")))
        _set(module, "weight", self.checkpoint.load(spec.name).float().to(self.device))
        result: Tensor = module(states)
        return result

    def _block_kwargs(self, rows: int, length: int) -> list[dict[str, Any]]:
        """What transformers passes to each block for full rows without padding."""
        key = (rows, length)
        if key not in self._kwargs_cache:
            layers_path = self.architecture.blocks[0].module.rpartition(".")[0]
            base_path, _, layers_name = layers_path.rpartition(".")
            norm = next(f.parameter for f in self.architecture.floats if f.name == "model.norm.weight")
            norm_name = norm.removesuffix(".weight").rpartition(".")[2]
            base = self._model.get_submodule(base_path)
            layers, final = getattr(base, layers_name), getattr(base, norm_name)
            recorders = nn.ModuleList(_KwargsRecorder(block) for block in layers)
            try:
                setattr(base, layers_name, recorders)
                setattr(base, norm_name, nn.Identity())
                with torch.no_grad():
                    base(inputs_embeds=torch.zeros(rows, length, self.architecture.hidden), use_cache=False)
            finally:
                setattr(base, layers_name, layers)
                setattr(base, norm_name, final)
            noted = [r.kwargs for r in recorders if isinstance(r, _KwargsRecorder)]
            self._kwargs_cache[key] = [_brought(kwargs, self.device) for kwargs in noted]
        return self._kwargs_cache[key]


def _attention_of(device: torch.device) -> AbstractContextManager[Any]:
    """On GPUs the attention of plain products, whose gradients are the same at every run."""
    return nullcontext() if device == CPU else sdpa_kernel(SDPBackend.MATH)


def _brought(value: Any, device: torch.device) -> Any:
    """Keyword arguments with their tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _brought(part, device) for name, part in value.items()}
    return tuple(_brought(part, device) for part in value) if isinstance(value, tuple) else value


def _set(module: nn.Module, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    module.get_submodule(owner)._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=False)
