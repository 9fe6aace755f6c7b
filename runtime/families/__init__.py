"""What each family of models calls its tensors and modules; a new family is a new file in this table."""

from typing import Any

from dbrx_quant.runtime.families import dbrx, llama, mixtral, qwen2_moe, qwen3_moe
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.families.family import Family
from dbrx_quant.runtime.files.errors import CheckpointError

FAMILIES: tuple[Family, ...] = (
    dbrx.FAMILY,
    mixtral.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    *llama.FAMILIES,
)


def describe(config: Any) -> Architecture:
    """Every linear and 16-bit tensor of a model, by all its names.

    Args:
        config: the model's transformers configuration.

    Raises:
        CheckpointError: no family here has this architecture, or it is not one of its model type.
    """
    names = list(config.architectures or [])
    for family in FAMILIES:
        if len(names) == 1 and names[0] in family.architectures:
            if family.name != config.model_type:
                raise CheckpointError(
                    f"config.json: model_type is {config.model_type!r}, but {names[0]} is of "
                    f"{family.name!r}; one of the two belongs to another model"
                )
            return family.describe(config)
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise CheckpointError(f"config.json: architectures is {names}; supported is one of {known}")


def family_of(model_type: Any) -> Family:
    """The family by the `model_type` of a configuration, raw or transformers'; else one without any hooks."""
    return next((f for f in FAMILIES if f.name == model_type), Family(str(model_type), (), describe))
