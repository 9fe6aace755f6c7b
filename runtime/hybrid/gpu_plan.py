"""What of a model a GPU holds within a limit, and what the host computes: planned from headers, then told.

What every token needs is on the GPU: attention, routers, norms, dense parts, head, and the cache. Then come
the busiest experts of all blocks (`plan.py`). Where not all experts have room, the embedding stays in main
memory: of it a token reads one row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dbrx_quant.runtime.families.facts import LinearSpec
from dbrx_quant.runtime.folder.contents import Contents
from dbrx_quant.runtime.folder.expert_use import expert_use
from dbrx_quant.runtime.folder.sizes import cache_bytes, linear_bits
from dbrx_quant.runtime.hybrid.gpu_bytes import Batch, allocated, linear_bytes, workspace_bytes
from dbrx_quant.runtime.hybrid.plan import resident_experts, traffic

CONTEXT = 4096  # tokens that the cache is planned for where nobody says how many


@dataclass(frozen=True)
class GpuMemory:
    """What a model may take of a GPU's memory.

    Attributes:
        limit: bytes of weights, cache and workspace. CUDA itself takes some hundred MB beside them.
        context: tokens of prompt and answer that the cache has to hold; None: the model's own, 4096 at most.
        logits: tokens of which logits are made at once; a prompt that is continued needs those of one.
    """

    limit: int
    context: int | None = None
    logits: int = 1


@dataclass(frozen=True)
class GpuPlan:
    """What a GPU holds, and what stays in main memory.

    Attributes:
        limit: bytes on the GPU.
        context: tokens of the cache.
        common: bytes of what every token needs.
        experts: bytes of the experts on the GPU.
        cache: bytes of keys and values.
        workspace: bytes for activations and the kernels.
        device_experts: block → its experts on the GPU.
        host_experts: block → its other experts.
        embedding: the embedding's name, where it stays in main memory.
        share: the part of the reading of experts that the GPU does, on average.
        host_bytes: of the experts in main memory.
        host_traffic: bytes of them that a token reads on average.
        measured: whether a measurement told which experts are busy.
    """

    limit: int
    context: int
    common: int
    experts: int
    cache: int
    workspace: int
    device_experts: Mapping[int, tuple[int, ...]]
    host_experts: Mapping[int, tuple[int, ...]]
    embedding: str | None
    share: float
    host_bytes: int
    host_traffic: float
    measured: bool

    @property
    def whole(self) -> bool:
        """Whether the GPU holds all of the model."""
        return self.embedding is None and not any(self.host_experts.values())

    def host_names(self, contents: Contents) -> frozenset[str]:
        """The linears and other tensors that stay in main memory."""
        names = {spec.name for spec in _experts(contents, self.host_experts)}
        return frozenset(names | ({self.embedding} if self.embedding else set()))

    def lines(self) -> Iterator[str]:
        """What is going to be where, for the user."""
        total = self.common + self.experts + self.cache + self.workspace
        where = ", the embedding in main memory" if self.embedding else ""
        yield (
            f"GPU: {_gb(total)} of {_gb(self.limit)} planned: {_gb(self.common)} of what every token needs, "
            f"{_gb(self.experts)} of experts, {_gb(self.cache)} for a cache of {self.context} tokens, "
            f"{_gb(self.workspace)} of workspace{where}"
        )
        if not any(self.host_experts.values()):
            return
        use = (
            "by measurement.json"
            if self.measured
            else "if all are chosen alike: there is no measurement.json"
        )
        yield (
            f"experts on the GPU: {_counts(self.device_experts, self.host_experts)}; "
            f"{100 * self.share:.0f} % of what a token reads of experts, {use}"
        )
        yield (
            f"main memory: the other experts, {_gb(self.host_bytes)}, of which a token reads "
            f"{_gb(self.host_traffic)} on average; the CPU computes them"
        )


def plan_gpu(contents: Contents, memory: GpuMemory, longest: int | None, item_bytes: int) -> GpuPlan:
    """What a GPU holds of a model.

    Args:
        contents: the folder's.
        memory: what there is.
        longest: tokens that the model takes, as far as it says.
        item_bytes: of an element of activations, and of tensors that are not quantized, as they are loaded.

    Raises:
        ValueError: not even what every token needs has room.
        CheckpointError: the measurement beside the shards is damaged.
    """
    architecture = contents.architecture
    context = memory.context or min(CONTEXT, longest or CONTEXT)
    use, measured = expert_use(contents.checkpoint.folder, architecture)
    sizes, host_sizes = _expert_sizes(contents, item_bytes)
    embedding = next(spec for spec in architecture.floats if len(spec.shape) == 2)
    tied = architecture.tied and "lm_head.weight" not in contents.names
    movable = not tied or contents.is_quantized(architecture.head)  # else it is the head as well
    table = allocated(item_bytes * embedding.shape[0] * embedding.shape[1])
    common = _common_bytes(contents, item_bytes)
    cache = cache_bytes(architecture, context, item_bytes)
    workspace = workspace_bytes(architecture, Batch(context, memory.logits, item_bytes))
    every = sum(map(sum, sizes.values()))
    whole = common + cache + workspace + every <= memory.limit
    if whole or not movable:
        on_gpu, name = common, None
    else:
        on_gpu, name = common - table, embedding.name
    left = memory.limit - on_gpu - cache - workspace
    if left < 0:
        _refuse(memory, context, on_gpu, cache, workspace, bool(sizes))
    kept = resident_experts(left, use, sizes)
    rest = {
        block: tuple(expert for expert in range(len(sizes[block])) if expert not in own)
        for block, own in kept.items()
    }
    read = traffic(kept, use, host_sizes), traffic(rest, use, host_sizes)
    return GpuPlan(
        limit=memory.limit,
        context=context,
        common=on_gpu,
        experts=sum(sizes[block][expert] for block, own in kept.items() for expert in own),
        cache=cache,
        workspace=workspace,
        device_experts=kept,
        host_experts=rest,
        embedding=name,
        share=read[0] / sum(read) if sum(read) else 1.0,
        host_bytes=sum(host_sizes[block][expert] for block, own in rest.items() for expert in own),
        host_traffic=read[1],
        measured=measured,
    )


def _expert_sizes(
    contents: Contents, item_bytes: int
) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """Block → bytes of each expert on a GPU; and as stored."""
    there, stored = {}, {}
    for block in contents.architecture.blocks:
        if block.experts:
            each = block.experts.linears
            there[block.index] = tuple(
                sum(linear_bytes(contents, s, item_bytes) for s in own) for own in each
            )
            stored[block.index] = tuple(
                sum(linear_bits(contents.checkpoint, s) // 8 for s in own) for own in each
            )
    return there, stored


def _common_bytes(contents: Contents, item_bytes: int) -> int:
    """Bytes on a GPU of all but routed experts."""
    architecture = contents.architecture
    count = 0
    for spec in architecture.linears():
        shared = (
            spec is architecture.head and architecture.tied and f"{spec.name}.weight" not in contents.names
        )
        if spec.expert is None and not (shared and not contents.is_quantized(spec)):
            count += linear_bytes(contents, spec, item_bytes)
    for kept in architecture.all_floats():
        elements = 1
        for size in kept.shape:
            elements *= size
        count += allocated(item_bytes * elements)
    return count


def _refuse(
    memory: GpuMemory, context: int, common: int, cache: int, workspace: int, has_experts: bool
) -> None:
    what = "what every token needs" if has_experts else "the model, which has no experts to leave out,"
    total = common + cache + workspace
    raise ValueError(
        f"gpu memory: {_gb(memory.limit)} are too little: {what} takes {_gb(common)}, "
        f"a cache of {context} tokens {_gb(cache)}, workspace {_gb(workspace)}: {_gb(total)} in all; "
        "give that much, fewer tokens, or leave it out to run on the CPU"
    )


def _experts(contents: Contents, chosen: Mapping[int, Sequence[int]]) -> Iterator[LinearSpec]:
    """The linears of experts."""
    for block in contents.architecture.blocks:
        for expert in chosen.get(block.index, ()):
            assert block.experts is not None
            yield from block.experts.linears[expert]


def _counts(device: Mapping[int, Sequence[int]], host: Mapping[int, Sequence[int]]) -> str:
    """How many experts of each block are there: `6 of 16 in every block`, `7 6 6 of 16 in blocks 0 to 2`."""
    counts = [len(own) for own in device.values()]
    first, last = min(device), max(device)
    most = len(device[first]) + len(host[first])
    if len(set(counts)) == 1:
        return f"{counts[0]} of {most} in every block"
    return f"{' '.join(map(str, counts))} of {most} in blocks {first} to {last}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
