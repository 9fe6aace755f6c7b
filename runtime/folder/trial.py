"""Whether a folder runs: it is loaded as anybody would load it, and asked for one token."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.tokenizer.load import load_tokenizer

_PROMPT = "What is a list?"


def run_one_token(folder: Path) -> str | None:
    """Load a folder on the CPU and generate a token; what went wrong, None where nothing did.

    The exact kernels are used, since they make no copies of the weights: of a mixture of experts only those
    that a token passes are read.

    Raises:
        MemoryError: there is too little of it to tell.
    """
    import torch

    from dbrx_quant.runtime import load_model

    try:
        with _quietly(), use_activations("float"), torch.random.fork_rng(devices=[]), torch.no_grad():
            ids = load_tokenizer(folder)(_PROMPT, return_tensors="pt")["input_ids"].long()
            made = load_model(folder).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise MemoryError from None
    except Exception as error:  # nobody knows what a configuration that cannot be leads to
        if "can't allocate memory" in str(error):
            raise MemoryError from None
        named = str(folder) in str(error)
        return str(error) if named else f"{folder}: does not run: {type(error).__name__}: {error}"
    if not bool(torch.isfinite(made.logits[0]).all()):
        return f"{folder}: does not run: NaN or infinity among the logits of a token; see config.json"
    return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep bars and warnings back: what matters is said by whoever called."""
    from logging import CRITICAL, getLogger

    from transformers.utils import logging

    ours = getLogger("dbrx_quant")
    level, bar, our_level = logging.get_verbosity(), logging.is_progress_bar_enabled(), ours.level
    logging.set_verbosity(CRITICAL)
    ours.setLevel(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        ours.setLevel(our_level)
        if bar:
            logging.enable_progress_bar()
