"""What sets a family of models apart: how it is described, and the few things that only it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.families.parts import DecoderParts


def _as_it_is(config: dict[str, Any]) -> dict[str, Any]:
    return config


def _no_problems(config: dict[str, Any]) -> list[str]:
    return []


def _no_problem(config: Any) -> str:
    return ""


def _none_needed(architecture: Architecture, checkpoint: Checkpoint) -> None:
    return None


@dataclass(frozen=True)
class Switch:
    """A key of config.json that the weights can contradict: whether a block has certain biases.

    Attributes:
        key: of config.json.
        parts: those of a block that have a bias where it is on; a part that some block lacks altogether, such
            as the MLP where there are experts, does not count.
        default: where the key is not there.
    """

    key: str
    parts: tuple[str, ...]
    default: bool = False


@dataclass(frozen=True)
class Family:
    """One family of models; most need a name, their classes and a description.

    A hook that needs transformers, or modules of the runtime that need `families`, imports them when called.

    Attributes:
        name: transformers' `model_type`.
        architectures: names of its classes, as `architectures` in config.json has them.
        describe: the facts about a model, from its transformers configuration.
        renames: what turns the names of its tensors into EXL2's, applied one after another.
        switches: keys of its configuration that say which linears have a bias.
        layer_parts: the parts of its decoder (the model below the head) for the native step; raises
            `decoder_parts.UnknownPartError` for a decoder that is not made of them. None: the family has no
            native step, and runs by transformers' own code.
        output: of transformers' `modeling_outputs`, the class that its decoder returns.
        fix_config: puts right, in a transformers configuration, what was misread of the raw config.json. The
            third argument says that a caller may have set values on purpose: then only those that are still
            transformers' defaults are changed. None: nothing is misread.
        patch_config: the raw config.json of a quantized model, from the original's; raises CheckpointError
            where that lacks something.
        config_problems: what readers of a raw config.json stumble on, a sentence each.
        dense_state: the tensors of an original under transformers' names, where the checkpoint has them under
            names that transformers cannot read; else None.
        vllm_by_module: vLLM's class names 16-bit tensors as transformers' modules, not as they are stored.
        vllm_problem: why vLLM's class would compute something else than the configuration (transformers')
            says; empty where it would not.
        exllamav2_note: a sentence for the model card on what exllamav2 computes otherwise.
        notice_license: how licences begin that want the original's NOTICE file to go along.
        tiktoken_module: the Python module by which its first tokenizers wrapped tiktoken.
    """

    name: str
    architectures: tuple[str, ...]
    describe: Callable[[Any], Architecture]
    renames: tuple[tuple[str, str], ...] = ()
    switches: tuple[Switch, ...] = ()
    layer_parts: Callable[[Any], DecoderParts] | None = None
    output: str = "BaseModelOutputWithPast"
    fix_config: Callable[[Any, dict[str, Any], bool], None] | None = None
    patch_config: Callable[[dict[str, Any]], dict[str, Any]] = _as_it_is
    config_problems: Callable[[dict[str, Any]], list[str]] = _no_problems
    dense_state: Callable[[Architecture, Checkpoint], dict[str, Tensor] | None] = _none_needed
    vllm_by_module: bool = False
    vllm_problem: Callable[[Any], str] = _no_problem
    exllamav2_note: str = ""
    notice_license: str = ""
    tiktoken_module: str = ""
