"""A DBRX that knows one answer by heart: each of its tokens calls forth the next, whatever came before."""

from itertools import pairwise

import torch
from quant_models import build_quantized_folder
from tiny_output import ADDED, CONFIG, make_tokenizer
from transformers import AutoConfig

from dbrx_quant.runtime.tokenizer.repair import apply_repair, plan_repair

NEWLINE = "\n"  # ends the opening of an answer in the chat template
END = ADDED["<|im_end|>"]


def byte_ids(text):
    """The ids of a text in the tokenizer of `tiny_output`, which has one for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [alphabet.index(character) for piece, _ in pieces for character in piece]


def scripted_folder(path, answer, then=END, context=128):
    """An EXL2 folder whose model answers `answer`, then token `then`, and so on from there.

    Args:
        path: the folder to make.
        answer: a text of which no byte occurs twice, nor a newline.
        then: the token after the last; one of the answer's makes it go round for ever.
        context: the longest sequence.
    """
    facts = {key: value for key, value in CONFIG.items() if key not in ("architectures", "torch_dtype")}
    config = AutoConfig.for_model(**{**facts, "max_seq_len": context})
    made = build_quantized_folder(config, path, head=False)
    for name in made.tensors:
        if name.endswith((".o_proj.q_scale_max", ".w2.q_scale_max")):
            made.tensors[name].zero_()  # attention and experts add nothing: the last token alone decides
    embedding = next(t for name, t in made.tensors.items() if name.endswith("embed_tokens.weight"))
    final_norm = next(t for name, t in made.tensors.items() if name.endswith("model.norm.weight"))
    final_norm.fill_(1)
    chain = [*byte_ids(NEWLINE + answer), then]
    head = torch.zeros_like(made.tensors["lm_head.weight"], dtype=torch.float32)
    for last, following in pairwise(chain):
        state = torch.nn.functional.layer_norm(embedding[last].float(), embedding.shape[1:])
        head[following] += state * (50 / state.square().sum())
    made.tensors["lm_head.weight"] = head.half()
    made.write()
    make_tokenizer(path)
    apply_repair(path, plan_repair(path))
    return path
