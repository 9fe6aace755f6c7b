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
        CheckpointError: no family here has this architecture, or it describes none that can be.
    """
    names = config.architectures
    for family in FAMILIES:
        if isinstance(names, list) and len(names) == 1 and names[0] in family.architectures:
            if family.name != config.model_type:
                raise CheckpointError(
                    f"config.json: model_type is {config.model_type!r}, but {names[0]} is of "
                    f"{family.name!r}; one of the two belongs to another model"
                )
            return _checked(family, config)
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise CheckpointError(f"config.json: architectures is {names}; supported is one of {known}")


def _checked(family: Family, config: Any) -> Architecture:
    """The description, if its numbers can be those of a model."""
    try:
        architecture = family.describe(config)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: does not describe a {family.name} model ({error!r})") from None
    shapes: list[tuple[str, tuple[int, ...]]] = [(one.name, one.shape) for one in architecture.linears()]
    shapes += [(one.name, one.shape) for one in architecture.all_floats()]
    for name, shape in shapes:
        if any(type(size) is not int or size < 1 for size in shape):
            raise CheckpointError(f"config.json: {name} would have the shape {shape}; its sizes are wrong")
    for experts in (block.experts for block in architecture.blocks if block.experts is not None):
        if type(experts.active) is not int or not 1 <= experts.active <= experts.count:
            raise CheckpointError(
                f"config.json: {experts.active} active experts a token, expected 1 to {experts.count}"
            )
    return architecture


def family_of(model_type: Any) -> Family:
    """The family by the `model_type` of a configuration, raw or transformers'; else one without any hooks."""
    return next((f for f in FAMILIES if f.name == model_type), Family(str(model_type), (), describe))
