"""The model card of a quantized model: what a visitor to its page on the Hub needs to know, as measured.

Everything here is text out of facts; nothing is read or asked. A figure that was not measured says so.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dbrx_quant.quantize.measurement import MEASUREMENT_NAME
from dbrx_quant.quantize.publish.release import KEPT_OUT, MAIN, Branch, Evaluation, Model
from dbrx_quant.quantize.publish.source_card import dump_front_matter
from dbrx_quant.runtime.evaluation.record import ppl_text
from dbrx_quant.runtime.families import family_of
from dbrx_quant.runtime.folder.verify import PRODUCER

PICTURE_NAME = "error-vs-size.png"
KEPT_BELOW = "<!-- written by dbrx-quant upload; what you write below this line stays when it runs again -->"
UNMEASURED = "not measured"

_EvaluationKey = tuple[str, int, int]


def main_card(
    repository: str,
    model: Model,
    branches: Sequence[Branch],
    *,
    picture: bool = False,
    measurement: bool = False,
    kept: str = "",
) -> str:
    """The card of the branch that people see first, which holds no weights.

    Args:
        repository: NAMESPACE/NAME.
        model: what the branches have in common.
        branches: all of the repository's, by rising bits.
        picture: whether `error-vs-size.png` lies beside the card.
        measurement: whether `measurement.json` does.
        kept: what somebody wrote below our text before.
    """
    key = common_evaluation(branches)
    example = branches[len(branches) // 2].name
    parts = [
        _front_matter(repository, model),
        f"# {_short(model.base_model)} in EXL2",
        _introduction(model, branches),
        _choose(branches),
        "## Sizes",
        _table(repository, branches, key),
        _explanation(branches, key),
    ]
    if picture:
        parts.append(f"![KL divergence from the original over bits per weight]({PICTURE_NAME})")
        if measurement:
            parts.append(
                "Dashed: what the conversion's measurement predicts for any size, on the text that it was "
                "calibrated with."
            )
    parts += _other_evaluations(branches, key)
    parts += _usage(repository, model, example)
    parts += _making(model)
    parts += _measuring(repository, branches) if measurement else []
    parts += _terms(model)
    return _join(parts, kept)


def branch_card(repository: str, model: Model, branch: Branch, kept: str = "") -> str:
    """The card of a branch with weights: the same terms and use, its own figures."""
    key = common_evaluation([branch])
    parts = [
        _front_matter(repository, model),
        f"# {_short(model.base_model)} in EXL2, {branch.bpw:.2f} bits per weight",
        f"This branch holds {_link(model.base_model)} quantized to {branch.bpw:.2f} bits per weight, "
        f"{size_text(branch.shard_bytes)}. The other sizes, and how they compare, are on "
        f"[main](https://huggingface.co/{repository}).",
        _table(repository, [branch], key),
        _explanation([branch], key),
        *_other_evaluations([branch], key),
        *_usage(repository, model, branch.name),
        *_making(model),
        *([f"Made by:\n\n```sh\n{branch.command}\n```"] if branch.command else []),
        *_terms(model),
    ]
    return _join(parts, kept)


def kept_text(card: str) -> str | None:
    """What somebody wrote below our part of a card; None if the card isn't ours."""
    _, found, below = card.partition(KEPT_BELOW)
    return below.strip() if found else None


def common_evaluation(branches: Sequence[Branch]) -> _EvaluationKey | None:
    """The text, windows and length that most branches were measured on; of several, `eval`'s longest."""
    counts = Counter(e.key for branch in branches for e in branch.evaluations)
    return max(counts, key=lambda key: (counts[key], key[0] != KEPT_OUT, key[1] * key[2], key), default=None)


def evaluation_of(branch: Branch, key: _EvaluationKey | None) -> Evaluation | None:
    """A branch's measurement on that text."""
    return next((e for e in branch.evaluations if e.key == key), None)


def size_text(count: int) -> str:
    """`33.1 GB`, `1.69 MB`; units of 1000, as the Hub shows them."""
    unit, factor = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    digits = f"{count / factor:#.3g}" if count < 1000 * factor else f"{count / factor:,.0f}"
    return f"{digits.rstrip('.')} {unit}"


def _front_matter(repository: str, model: Model) -> str:
    carried = model.card.carried
    facts: dict[str, Any] = {
        "base_model": model.base_model,
        "base_model_relation": "quantized",
        "quantized_by": repository.split("/")[0],
        "pipeline_tag": "text-generation",
        "library_name": "dbrx-quant",  # "transformers" would have the Hub show code that loads random weights
        "tags": _tags(model),
        "inference": False,
        **carried,
    }
    return f"---\n{dump_front_matter(facts)}---"


def _tags(model: Model) -> list[str]:
    tags = ["exl2", "quantized", str(model.config.get("model_type", ""))]
    tags += ["moe"] if model.experts else []
    tags += ["conversational"] if model.chat else []
    return [tag for tag in tags if tag]


def _introduction(model: Model, branches: Sequence[Branch]) -> str:
    shape = (
        f"Every matrix of each of a block's {model.experts} experts has its own bits, out of one budget: "
        "more where they save error, fewer where they don't."
        if model.experts
        else "Every matrix has its own bits, out of one budget: more where they save error, fewer where they "
        "don't."
    )
    if not model.producer.startswith(PRODUCER):
        shape = ""
    sizes = f"{len(branches)} sizes" if len(branches) > 1 else "one size"
    return (
        f"{_link(model.base_model)} quantized to EXL2 by {model.producer}, in {sizes}. {shape} The weights "
        "stay packed in memory, in dbrx-quant's runtime and in transformers."
    )


def _choose(branches: Sequence[Branch]) -> str:
    if any(branch.name == MAIN for branch in branches):
        return "" if len(branches) == 1 else "Each size is a branch of this repository."
    return (
        "**Each size is a branch of this repository**; `main`, which you are looking at, holds no weights. "
        "Take the largest that fits: its size, and some memory for the context."
    )


def _table(repository: str, branches: Sequence[Branch], key: _EvaluationKey | None) -> str:
    routed = any(e and e.router_topk is not None for e in (evaluation_of(b, key) for b in branches))
    head = ["branch", "bits per weight", "head", "size", "perplexity", "KL divergence", "same top token"]
    rows = [head + (["same experts"] if routed else [])]
    for branch in branches:
        found = evaluation_of(branch, key)
        row = [
            f"[{branch.name}](https://huggingface.co/{repository}/tree/{branch.name})",
            f"{branch.bpw:.2f}",
            f"{branch.head_bits} bits",
            size_text(branch.shard_bytes),
            ppl_text(found.ppl) if found else UNMEASURED,
            _kl(branch, found),
            f"{100 * found.top1:.2f} %" if found else UNMEASURED,
        ]
        if routed:
            has = found is not None and found.router_topk is not None
            row.append(f"{100 * found.router_topk:.2f} %" if has else UNMEASURED)  # type: ignore[union-attr, operator]
        rows.append(row)
    return _markdown(rows)


def _kl(branch: Branch, found: Evaluation | None) -> str:
    if found:
        return f"{found.kl:.5f}" + (f" ± {found.kl_stderr:.5f}" if found.kl_stderr is not None else "")
    return f"{branch.predicted_kl:.5f} (predicted)" if branch.predicted_kl is not None else UNMEASURED


def _explanation(branches: Sequence[Branch], key: _EvaluationKey | None) -> str:
    lines = [
        "Bits per weight are those of the decoder's matrices as stored, scales and tables included; the size "
        "is that of the weights' files."
    ]
    found = next((e for branch in branches if (e := evaluation_of(branch, key))), None)
    if found:
        lines.append(
            f"Measured against the original on {_text(found)}, {found.windows} windows of {found.length} "
            f"tokens, where the original's perplexity is {ppl_text(found.ppl_original)}. KL divergence is in "
            "nats per token, ± its standard error; 0 is the original."
        )
    open_ones = [branch for branch in branches if evaluation_of(branch, key) is None]
    if any(branch.predicted_kl is not None for branch in open_ones):
        lines.append(
            "A *predicted* KL divergence was not measured: it is what the conversion expects on the text it "
            "was calibrated with, in nats per token; on other texts it tends to be too low."
        )
    return " ".join(lines)


def _other_evaluations(branches: Sequence[Branch], key: _EvaluationKey | None) -> list[str]:
    rows = [
        [
            f"{_text(e)}, {e.windows} windows of {e.length}",
            branch.name,
            ppl_text(e.ppl),
            ppl_text(e.ppl_original),
            _kl(branch, e),
            f"{100 * e.top1:.2f} %",
        ]
        for branch in branches
        for e in branch.evaluations
        if e.key != key
    ]
    if not rows:
        return []
    head = ["text, tokens", "branch", "perplexity", "original's", "KL divergence", "same top token"]
    return ["Measured on other texts:", _markdown([head, *sorted(rows)], left=2)]


def _text(evaluation: Evaluation) -> str:
    return KEPT_OUT if evaluation.text == KEPT_OUT else f"`{evaluation.text}`"


def _usage(repository: str, model: Model, branch: str) -> list[str]:
    folder = f"{repository.split('/')[1]}-{branch}"
    prompt = (
        "messages = [{'role': 'user', 'content': 'What is a mixture of experts?'}]\n"
        "inputs = tokenizer.apply_chat_template(\n"
        "    messages, add_generation_prompt=True, return_tensors='pt', return_dict=True\n)"
        if model.chat
        else "inputs = tokenizer('A mixture of experts is', return_tensors='pt')"
    ).replace("'", '"')
    ours = f"""\
```python
from dbrx_quant.runtime import load_model
from transformers import AutoTokenizer

repository, branch = "{repository}", "{branch}"
model = load_model(repository, revision=branch)
tokenizer = AutoTokenizer.from_pretrained(repository, revision=branch)

{prompt}
output = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
    transformers = """\
```python
import dbrx_quant.runtime  # without it, transformers warns and fills the model with random weights
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(repository, revision=branch)
```"""
    question = '"What is a mixture of experts?" --chat' if model.chat else '"A mixture of experts is"'
    commands = f"""\
```sh
hf download {repository} --revision {branch} --local-dir {folder}
dbrx-quant generate {folder} {question}
dbrx-quant verify {folder}
```"""
    exllamav2 = f"""\
```python
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer
from exllamav2.generator import ExLlamaV2DynamicGenerator

config = ExLlamaV2Config("{folder}")
model = ExLlamaV2(config)
cache = ExLlamaV2Cache(model, max_seq_len=4096, lazy=True)
model.load_autosplit(cache)
generator = ExLlamaV2DynamicGenerator(model=model, cache=cache, tokenizer=ExLlamaV2Tokenizer(config))
print(generator.generate(prompt="A mixture of experts is", max_new_tokens=200))
```"""
    note = family_of(model.config.get("model_type")).exllamav2_note
    return [
        "## Use",
        '**dbrx-quant**, on a CPU, or with `device="cuda"`:',
        ours,
        "**transformers**, with dbrx-quant installed:",
        transformers,
        "As a folder, to run, check or compare from the command line:",
        commands,
        "**exllamav2**, from that folder, on NVIDIA GPUs. The files keep to its format; that loader was not "
        f"run on these.{f' {note}' if note else ''}",
        exllamav2,
    ]


def _making(model: Model) -> list[str]:
    calibration, lines = model.calibration, []
    if calibration.get("rows") and calibration.get("length"):
        name = str(calibration.get("dataset") or "unknown text").rsplit("/", 1)[-1]
        lines.append(
            f"Calibration text: {calibration['rows']} rows of {calibration['length']} tokens (`{name}`). "
            f"Converter: {model.producer}."
        )
    kept = "norms, routers and the embedding are" if model.experts else "norms and the embedding are"
    lines.append(f"The decoder's matrices and the head are quantized; {kept} in 16 bits.")
    return ["## How it was made", " ".join(lines)]


def _measuring(repository: str, branches: Sequence[Branch]) -> list[str]:
    lacking = "2.75" if all(branch.target != 2.75 for branch in branches) else "3.1"
    return [
        f"`{MEASUREMENT_NAME}` makes any other size without measuring again:",
        f"```sh\nhf download {repository} {MEASUREMENT_NAME} --local-dir .\ndbrx-quant convert "
        f"ORIGINAL OUT --bpw {lacking} --measurement {MEASUREMENT_NAME}\n```",
    ]


def _terms(model: Model) -> list[str]:
    carried = model.card.carried
    link = str(carried.get("license_link") or "")
    name = f"[{model.card.license}]({link})" if link else model.card.license
    lines = [f"The original's licence applies: {name}."]
    if model.term_files:
        files = ", ".join(f"[{file}]({file})" for file in model.term_files)
        lines.append(f"Its files are here as they were: {files}.")
    lines.append(
        "This is a modified version: weights were quantized, what is not quantized was rounded to float16, "
        "and config and tokenizer files were completed. What the model is for, and its limits, are on "
        f"{_link(model.base_model)}'s page."
    )
    return ["## Licence", " ".join(lines)]


def _link(base_model: str) -> str:
    return f"[{base_model}](https://huggingface.co/{base_model})"


def _short(base_model: str) -> str:
    return base_model.rsplit("/", 1)[-1]


def _markdown(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table; its first columns stand to the left, the others to the right."""
    head, *body = rows
    rule = [":---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def _join(parts: Sequence[str], kept: str) -> str:
    text = "\n\n".join(part for part in (*parts, KEPT_BELOW, kept.strip()) if part)
    return text + "\n"
