"""Which experts a GPU holds: those that save most reading of main memory for the bytes that they take."""

from collections.abc import Mapping, Sequence


def resident_experts(
    budget: int, use: Mapping[int, Sequence[float]], sizes: Mapping[int, Sequence[int]]
) -> dict[int, tuple[int, ...]]:
    """Block → its experts that the GPU holds, ascending: the busiest of all blocks, as many as fit.

    An expert saves its bytes times its use and takes its bytes, so the order is that of the use. No choice
    saves more than this one and one expert. Of equally busy experts every block gets its first one before any
    gets a second: both sides then work in every block.

    Args:
        budget: bytes on the GPU for experts.
        use: block → the chance of each of its experts to be chosen for a token.
        sizes: block → the bytes of each there.
    """
    order = []
    for block, chances in use.items():
        ranked = sorted(range(len(chances)), key=lambda expert: -chances[expert])
        order += [(-chances[expert], rank, block, expert) for rank, expert in enumerate(ranked)]
    left = budget
    found: dict[int, list[int]] = {block: [] for block in use}
    for _, _, block, expert in sorted(order):
        if sizes[block][expert] <= left:
            left -= sizes[block][expert]
            found[block].append(expert)
    return {block: tuple(sorted(experts)) for block, experts in found.items()}


def traffic(
    experts: Mapping[int, Sequence[int]],
    use: Mapping[int, Sequence[float]],
    sizes: Mapping[int, Sequence[int]],
) -> float:
    """Bytes of these experts (block → experts) that a token reads on average."""
    return sum(use[block][expert] * sizes[block][expert] for block, own in experts.items() for expert in own)
