"""How often each expert of a quantized folder is chosen, by the measurement that lies beside its shards."""

import math
from collections.abc import Mapping
from pathlib import Path

from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.files.json_file import Fields, read_object

_NAME = "measurement.json"
_REMEDY = "measure again, or move it away: then all experts count alike"


def expert_use(folder: Path, architecture: Architecture) -> tuple[Mapping[int, tuple[float, ...]], bool]:
    """Block → the chance of each of its experts to be chosen for a token; and whether that was measured.

    Without a measurement all experts of a block are alike.

    Raises:
        CheckpointError: the measurement is damaged, or of another model.
    """
    experts = {block.index: block.experts for block in architecture.blocks if block.experts is not None}
    alike = {index: (one.active / one.count,) * one.count for index, one in experts.items()}
    path = folder / _NAME
    try:
        content = read_object(path, "a measurement", _REMEDY)
    except FileNotFoundError:
        return alike, False
    if "coverage" not in content:  # exllamav2 has a file of that name, too
        return alike, False
    blocks = Fields(path, content, _REMEDY).object("coverage")
    use = {}
    for index, one in experts.items():
        shares = [expert.number("share", 0) for expert in blocks.listed(str(index))]
        if len(shares) != one.count or not math.isclose(sum(shares), 1, abs_tol=1e-3):
            expected = f"the shares of {one.count} experts, which add up to 1"
            raise blocks.fault(
                str(index), f"{len(shares)} shares of {sum(shares):g} in all, expected {expected}"
            )
        use[index] = tuple(min(1.0, one.active * share) for share in shares)
    return use, True
