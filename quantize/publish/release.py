"""Quantized folders on their way to the Hub: what each branch will hold, and what is known about it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_quant.quantize.budget.strategy import STRATEGY_NAME, Outcome, find_strategy
from dbrx_quant.quantize.measurement import MEASUREMENT_NAME
from dbrx_quant.quantize.options import target_name
from dbrx_quant.quantize.output.record import read_record
from dbrx_quant.quantize.publish.source_card import (
    CARD_NAME,
    SourceCard,
    read_source_card,
    term_faults,
    term_files,
)
from dbrx_quant.runtime.evaluation.record import EVALUATION_NAME, read_evaluations
from dbrx_quant.runtime.exl2.weight_files import shard_files
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config, read_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_file import read_object
from dbrx_quant.runtime.files.links import refuse_links_out
from dbrx_quant.runtime.folder.repacked_file import REPACKED_NAME
from dbrx_quant.runtime.folder.verify import PRODUCER

KEPT_OUT = "calibration text kept out of the calibration"  # the text of what the conversion itself measured
MAIN = "main"

_SMALL_BYTES = 32 << 20
_SAME_BPW = 1e-3  # an evaluation of the same folder differs by rounding only


@dataclass(frozen=True)
class Evaluation:
    """A comparison with the original: an entry of `evaluation.json`, or the conversion's own.

    Attributes:
        text: name of the text; `KEPT_OUT` for the conversion's own.
        windows: pieces of it.
        length: tokens of each.
        tokens: in all.
        ppl: perplexity of the quantized model; None: beyond what a float holds.
        ppl_original: of the original.
        kl: KL divergence to the original, nats per token.
        kl_stderr: its standard error, where known.
        top1: share of tokens whose likeliest successor is the original's.
        router_topk: share of routing choices that are the original's; None without experts.
    """

    text: str
    windows: int
    length: int
    tokens: int
    ppl: float | None
    ppl_original: float | None
    kl: float
    kl_stderr: float | None
    top1: float
    router_topk: float | None

    @property
    def key(self) -> tuple[str, int, int]:
        """What two evaluations must share for their figures to be comparable."""
        return self.text, self.windows, self.length


@dataclass(frozen=True)
class Branch:
    """What is known about one quantized model.

    Attributes:
        name: of its branch.
        target: bits per weight that were asked for.
        bpw: bits per weight of the decoder's linears, overhead included.
        head_bits: width of the head.
        shard_bytes: size of the weights' files.
        predicted_kl: what the conversion predicted, nats per token; None where it left no strategy.json.
        evaluations: what was measured.
        command: the command line that makes it again; empty where it is not known.
    """

    name: str
    target: float
    bpw: float
    head_bits: int
    shard_bytes: int
    predicted_kl: float | None
    evaluations: tuple[Evaluation, ...]
    command: str = ""


@dataclass(frozen=True)
class Model:
    """What all branches have in common.

    Attributes:
        base_model: the original's id on the Hub.
        card: what is inherited from its card.
        config: its config, without the quantization.
        experts: of a block; 0: it is dense.
        chat: whether the tokenizer has a chat template.
        term_files: licence and notice files that go along.
        calibration: as the config describes it.
        producer: what converted it.
    """

    base_model: str
    card: SourceCard
    config: Mapping[str, Any]
    experts: int
    chat: bool
    term_files: tuple[str, ...]
    calibration: Mapping[str, Any]
    producer: str


@dataclass(frozen=True)
class Release:
    """All that goes to one repository in one call.

    Attributes:
        repository: NAMESPACE/NAME.
        model: what the branches have in common.
        branches: by rising bits.
        folders: branch → its folder.
        measurement: the measurement that all share, for main; None if there is none, or several.
    """

    repository: str
    model: Model
    branches: tuple[Branch, ...]
    folders: Mapping[str, Path]
    measurement: Path | None


def find_checkpoints(folders: Iterable[Path]) -> list[Path]:
    """The quantized folders: those given, and those inside a given parent (`convert --bpw a,b`).

    Raises:
        CheckpointError: a folder is not a quantized one, and contains none.
        ValueError: one is given twice.
    """
    found: list[Path] = []
    for folder in folders:
        if (folder / "config.json").is_file():
            found.append(folder)
            continue
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        inner = sorted(path.parent for path in folder.glob("*bpw/config.json"))
        if not inner:
            raise CheckpointError(
                f"{folder}: not a quantized folder: it has neither config.json nor *bpw folders"
            )
        found += inner
    resolved = [folder.resolve() for folder in found]
    twice = [str(folder) for i, folder in enumerate(found) if resolved[i] in resolved[:i]]
    if twice:
        raise ValueError(f"{twice[0]}: given twice")
    return found


def gather(
    repository: str,
    folders: Sequence[Path],
    base_model: str | None = None,
    card: Path | None = None,
    branch: str | None = None,
) -> Release:
    """What uploading these folders means.

    Args:
        repository: NAMESPACE/NAME.
        folders: quantized folders.
        base_model: the original's id on the Hub; None: as the folders say.
        card: the original's README.md; None: that in each folder.
        branch: its name, for one folder; None: from the target, such as `3.0bpw`.

    Raises:
        CheckpointError: a folder is not an EXL2 checkpoint, or one of its files is damaged or a link out of
            the folder.
        ValueError: the folders are of different models, two would become the same branch, the original is
            unknown, or it may not be passed on like this.
    """
    if card is not None and not card.is_file():
        raise ValueError(f"{card}: no such file")
    models: list[Model] = []
    branches: dict[str, tuple[Branch, Path]] = {}
    for folder in folders:
        refuse_links_out(path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
        config = quantized_config(folder)
        name = branch or target_name(_number(config["quantization_config"], "bits", folder / "config.json"))
        if name in branches:
            raise ValueError(
                f"{folder} and {branches[name][1]} would both become the branch {name}; upload one of "
                "them by itself with --revision NAME"
            )
        branches[name] = (read_branch(folder, name, config, shard_bytes(folder)), folder)
        models.append(_model(folder, config, base_model, card))
    for folder, model in zip(folders, models, strict=True):
        _check_alike(folders[0], models[0], folder, model)
    ordered = sorted(branches.values(), key=lambda pair: (pair[0].bpw, pair[0].name))
    return Release(
        repository,
        models[0],
        tuple(known for known, _ in ordered),
        {known.name: folder for known, folder in ordered},
        _shared_measurement(folders),
    )


def branch_files(folder: Path) -> list[str]:
    """The files of a folder that go to its branch; the card is written anew.

    Hidden files, subfolders and what a killed writer left behind stay, and so do repacked linears, which
    everybody makes of the shards.
    """
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(name for name in names if name not in (CARD_NAME, REPACKED_NAME))


def files_that_mention(folder: Path, text: str) -> list[str]:
    """The small files of a folder that hold a text, such as the name of a folder of this machine."""
    mention = text.encode()
    small = [name for name in branch_files(folder) if (folder / name).stat().st_size <= _SMALL_BYTES]
    return [name for name in small if mention in (folder / name).read_bytes()]


def shard_bytes(folder: Path) -> int:
    """Size of a folder's weights."""
    return sum(path.stat().st_size for path in shard_files(folder))


def quantized_config(folder: Path) -> dict[str, Any]:
    """The config of an EXL2 folder.

    Raises:
        CheckpointError: it is none.
    """
    config = read_config(folder)
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != "exl2":
        raise CheckpointError(f"{folder / 'config.json'}: no quantization_config with quant_method exl2")
    return config


def read_branch(folder: Path, name: str, config: Mapping[str, Any], size: int) -> Branch:
    """What the small files of a quantized folder say about it.

    Args:
        folder: where `evaluation.json`, `strategy.json` and `conversion.json` are, if they are.
        name: of the branch.
        config: its config.
        size: of its weights, in bytes.

    Raises:
        CheckpointError: a file is damaged, or the evaluation is that of another conversion.
    """
    path = folder / "config.json"
    section = config["quantization_config"]
    target = _number(section, "bits", path)
    bpw = _number(section, "bpw", path) if "bpw" in section else target
    strategy, outcome = find_strategy(folder) or (None, None)
    predicted = strategy.kl if strategy else None
    evaluations = _evaluations(folder, bpw) + _own_evaluation(folder, outcome, section)
    head_bits = int(section.get("head_bits", 6))
    record = read_record(folder)
    return Branch(
        name, target, bpw, head_bits, size, predicted, evaluations, record.command if record else ""
    )


def _evaluations(folder: Path, bpw: float) -> tuple[Evaluation, ...]:
    found = []
    for entry in read_evaluations(folder):
        if abs(entry["bpw"] - bpw) > _SAME_BPW:
            raise CheckpointError(
                f"{folder / EVALUATION_NAME}: evaluated at {entry['bpw']:.4f} bits per weight, the model has "
                f"{bpw:.4f}; it is that of another conversion: remove the file and run eval again"
            )
        found.append(Evaluation(**{name: entry[name] for name in Evaluation.__dataclass_fields__}))
    return tuple(found)


def _own_evaluation(
    folder: Path, outcome: Outcome | None, section: Mapping[str, Any]
) -> tuple[Evaluation, ...]:
    """What the conversion measured on held-out rows; nothing if there were too few."""
    if outcome is None or not outcome.measured:
        return ()
    scores = outcome.measured
    try:
        length, tokens = int(section["calibration"]["length"]), int(scores["positions"])
        return (
            Evaluation(
                outcome.held_out or KEPT_OUT,
                windows=tokens // length,
                length=length,
                tokens=tokens,
                ppl=_or_none(scores["ppl"]),
                ppl_original=_or_none(scores["reference_ppl"]),
                kl=float(scores["kl"]),
                kl_stderr=_or_none(scores["kl_stderr"]),
                top1=float(scores["top1"]),
                router_topk=None,
            ),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / STRATEGY_NAME}: measured is damaged ({error!r})") from None


def _or_none(value: Any) -> float | None:
    return None if value is None else float(value)


def _model(folder: Path, config: Mapping[str, Any], base_model: str | None, card: Path | None) -> Model:
    inherited = read_source_card(card or folder / CARD_NAME)
    base = base_model or inherited.base_model or _recorded_original(folder)
    if not base:
        raise ValueError(f"{folder}: doesn't say which model it was made from; give --base-model ORG/NAME")
    names = branch_files(folder)
    faults = term_faults(inherited, names)
    if faults:
        raise ValueError(f"{folder}: cannot be published: {'; '.join(faults)}")
    architecture = describe(load_config(folder))
    section = config["quantization_config"]
    tokenizer = _tokenizer_config(folder)
    return Model(
        base_model=str(base),
        card=inherited,
        config={key: value for key, value in config.items() if key != "quantization_config"},
        experts=max((b.experts.count for b in architecture.blocks if b.experts), default=0),
        chat="chat_template.jinja" in names or bool(tokenizer.get("chat_template")),
        term_files=tuple(term_files(names)),
        calibration=section.get("calibration") or {},
        producer=_producer(str(section.get("version", ""))),
    )


def _producer(version: str) -> str:
    """What converted the model; exllamav2 writes its bare version."""
    if version.startswith(PRODUCER):
        return version
    return f"exllamav2 {version}" if version[:1].isdigit() else "another converter"


def _recorded_original(folder: Path) -> str | None:
    """The original's id on the Hub, where the conversion was given one."""
    record = read_record(folder)
    name = str(record.settings.get("model", "")) if record else ""
    return name if "/" in name else None


def _check_alike(first: Path, model: Model, folder: Path, other: Model) -> None:
    for what in ("base_model", "config", "card", "term_files"):
        if getattr(model, what) != getattr(other, what):
            named = {"base_model": "original", "card": "terms", "term_files": "licence files"}.get(what, what)
            raise ValueError(
                f"{first} and {folder} differ in their {named}; branches of a repository are one model in "
                "several sizes: upload them to different repositories"
            )


def _shared_measurement(folders: Sequence[Path]) -> Path | None:
    paths = [folder / MEASUREMENT_NAME for folder in folders]
    if not all(path.is_file() for path in paths):
        return None
    contents = {path.read_bytes() for path in paths}
    return paths[0] if len(contents) == 1 else None


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "tokenizer_config.json", "a tokenizer config", "fetch it again")
    except FileNotFoundError:
        return {}


def _number(values: Mapping[str, Any], key: str, path: Path) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{path}: {key} is {value!r}, expected a number")
    return float(value)
