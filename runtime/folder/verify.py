"""Whether a folder is a sound EXL2 checkpoint: every rule, every tensor, one line per fault.

What is wrong for every reader is a fault. What only some readers stumble on is a warning in checkpoints of
other writers (exllamav2 leaves DBRX's RoPE base and the stop tokens as it finds them, and a stale index), and
a fault in our own, which promise better.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint, TensorInfo, read_header
from dbrx_quant.runtime.exl2.finite import first_not_finite
from dbrx_quant.runtime.exl2.format import SUFFIXES, padded_columns, validate_linear
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME, read_index, shard_files
from dbrx_quant.runtime.families import describe, family_of
from dbrx_quant.runtime.families.config import load_config, read_config
from dbrx_quant.runtime.families.facts import ATTENTION_ROLES, Architecture, FloatSpec, LinearSpec
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.links import leaves
from dbrx_quant.runtime.files.regular import check_model_folder, open_regular
from dbrx_quant.runtime.folder.agreement import disagreements
from dbrx_quant.runtime.folder.checksums import CHECKSUMS_NAME, read_checksums
from dbrx_quant.runtime.folder.contents import read_contents
from dbrx_quant.runtime.folder.repacked_file import REPACKED_NAME, repacked_faults
from dbrx_quant.runtime.folder.sizes import stored_bits
from dbrx_quant.runtime.folder.trial import run_one_token
from dbrx_quant.runtime.library._native import why_unavailable
from dbrx_quant.runtime.tokenizer.check import check_tokenizer

PRODUCER = "dbrx-quant"

_CHUNK_BYTES = 16 << 20
_SHOWN = 4  # names in a message
_NEEDS_INDEX = "transformers needs one for several shards, which `dbrx-quant index {}` writes"


@dataclass
class Report:
    """What was found.

    Attributes:
        faults: what makes the checkpoint wrong, a line each; empty for a sound one.
        warnings: what some readers stumble on, a line each.
        facts: what it consists of: `family`, `producer`, `shards`, `tensors`, `linears`, `bpw`, `head_bpw`,
            `total_bytes`, `checksums` (whether they were compared), `unchecked` (linears and 16-bit tensors
            in shards that could not be read), `repacked` (whether a file of repacked linears is theirs), as
            far as known.
    """

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are no faults."""
        return not self.faults


def verify(
    folder: Path, checksums: bool = True, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Check a whole checkpoint folder.

    Args:
        folder: the folder.
        checksums: whether to read all shards and compare their SHA-256 where `checksums.json` is there, and
            to compare repacked linears with what the shards make.
        progress: called with (bytes read, total bytes) while whole files are compared.
    """
    folder = Path(folder)
    report = Report()
    reading = _Reading(folder, progress)
    if not folder.is_dir():
        report.faults.append(f"{folder}: no such folder")
        return report
    try:
        check_model_folder(folder)
    except CheckpointError as error:  # what follows would open it
        report.faults.append(str(error))
        return report
    config, architecture = _read_architecture(folder, report)
    producer = str(_section(config, "quantization_config").get("version", ""))
    ours = producer.startswith(PRODUCER)
    report.facts["producer"] = producer or "unknown"
    minor = report.faults if ours else report.warnings

    infos, lost = _read_shards(folder, architecture, report)
    lost |= _check_index(folder, infos, lost, report)
    if architecture is not None:
        checkpoint = Checkpoint(folder, infos=infos)
        _check_tensors(checkpoint, architecture, bool(lost), report, minor)
        _check_config(config, architecture, minor)
        for problem in check_tokenizer(folder, architecture.vocabulary):
            (report.faults if problem.fatal else minor).append(str(problem))
        if not report.faults:
            _count_bits(checkpoint, architecture, config, report)
            if ours:
                report.faults += disagreements(folder, config, checkpoint, architecture)
            _try_to_run(folder, report)
            _check_repacked(checkpoint, architecture, reading if checksums else None, report)
    if (folder / CHECKSUMS_NAME).exists():
        _check_checksums(folder, checksums, reading, report)
    elif ours:
        report.warnings.append(
            f"{CHECKSUMS_NAME}: missing, as after save_pretrained; damage to the shards may go unnoticed"
        )
    for lines in (report.faults, report.warnings):
        lines[:] = [" ".join(line.split()) for line in lines]  # libraries wrap their messages
    return report


class _Reading:
    """Counts the bytes of a folder's large files that have been read whole."""

    def __init__(self, folder: Path, progress: Callable[[int, int], None] | None) -> None:
        files = [*shard_files(folder), folder / REPACKED_NAME] if folder.is_dir() else []
        self._total = sum(file.stat().st_size for file in files if file.is_file())
        self._done, self._progress = 0, progress

    def count(self, size: int) -> None:
        """Some more."""
        self._done += size
        if self._progress:
            self._progress(self._done, max(self._done, self._total))


def _read_architecture(folder: Path, report: Report) -> tuple[dict[str, Any], Architecture | None]:
    try:
        config = read_config(folder)
    except CheckpointError as error:
        report.faults.append(str(error))
        return {}, None
    try:
        architecture = describe(load_config(folder))
    except CheckpointError as error:
        report.faults.append(str(error))
        return config, None
    report.facts["family"] = architecture.family
    return config, architecture


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`, or an empty one."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _read_shards(
    folder: Path, architecture: Architecture | None, report: Report
) -> tuple[dict[str, TensorInfo], set[str]]:
    """The tensors of all shards that can be read, by their name in the format, and names of the others."""
    files = shard_files(folder)
    report.facts["shards"] = len(files)
    if not files:
        report.faults.append(f"{folder}: no *.safetensors files in it")
    infos: dict[str, TensorInfo] = {}
    lost = set() if files else {"all"}
    for file in files:
        try:
            header = read_header(file)
        except (CheckpointError, OSError) as error:
            report.faults.append(str(error))
            lost.add(file.name)
            continue
        for name, info in header.items():
            known = architecture.normalise(name) if architecture else name
            if known in infos:
                other = infos[known].file.name
                report.faults.append(f"{file.name}: {name}: stored in {other} too; remove one of the two")
            infos.setdefault(known, info)
    report.facts["tensors"] = len(infos)
    return infos, lost


def _check_index(folder: Path, infos: dict[str, TensorInfo], lost: set[str], report: Report) -> set[str]:
    """Check that the index, if any, says where each tensor is; returns the missing shards that it names.

    One that names no quantized tensor is the original's, as exllamav2 copies it along.
    """
    try:
        weight_map = read_index(folder)
    except (CheckpointError, OSError) as error:
        report.faults.append(str(error))
        return set()
    if weight_map is None:
        if report.facts["shards"] > 1:
            report.warnings.append(f"{INDEX_NAME}: missing; {_NEEDS_INDEX.format(folder)}")
        return set()
    stored = {info.name: info.file.name for info in infos.values()}
    quantized = any(name.endswith(".q_weight") for name in stored)
    if quantized and not any(name.endswith(".q_weight") for name in weight_map):
        cure = _NEEDS_INDEX.format(folder) if report.facts["shards"] > 1 else "delete it"
        report.warnings.append(f"{INDEX_NAME}: a stale copy of the original's; {cure}")
        return set()
    absent: dict[str, int] = {}
    for name, file in sorted(weight_map.items()):
        if name in stored and stored[name] != file:
            report.faults.append(f"{INDEX_NAME}: places {name} in {file}, but it is in {stored[name]}")
        elif name not in stored and not (folder / file).is_file():
            absent[file] = absent.get(file, 0) + 1
        elif name not in stored and file not in lost:
            report.faults.append(f"{INDEX_NAME}: names {name} in {file}, which does not exist")
    for file, count in absent.items():
        report.faults.append(f"{file}: missing; {INDEX_NAME} places {count} of the tensors in it")
    for name in sorted(set(stored) - set(weight_map)):
        report.faults.append(f"{INDEX_NAME}: omits {name}, which is in {stored[name]}")
    return set(absent)


def _check_tensors(
    checkpoint: Checkpoint, architecture: Architecture, some_lost: bool, report: Report, minor: list[str]
) -> None:
    """Every linear and every 16-bit tensor of the model, and nothing else.

    Where shards are lost, what is not in the others is not missing, but cannot be checked.
    """
    used: set[str] = set()
    unchecked: list[str] = []
    linears = 0
    for spec in architecture.linears():
        names = [f"{spec.name}.{suffix}" for suffix in (*SUFFIXES, "bias")]
        used.update(names)
        found = [name in checkpoint for name in names[: len(SUFFIXES)]]
        if some_lost and any(found) and not all(found):
            unchecked.append(spec.name)
            continue
        if any(found):
            linears += 1
            report.faults += _linear_faults(checkpoint, spec)
            continue
        dense = next((source for source in spec.sources if source.tensor in checkpoint), None)
        if dense is None and some_lost:
            unchecked.append(spec.name)
            continue
        if dense is None:
            report.faults.append(_missing(spec.name))
            continue
        used.add(dense.tensor)
        where = f"{checkpoint.info(dense.tensor).file.name}: {spec.name}"
        if _may_stay_dense(checkpoint, architecture, spec):
            minor.append(f"{where}: stored in 16 bits, as {dense.tensor}")
            if dense.tensor == f"{spec.name}.weight":
                k, n = spec.shape
                report.faults += _float_faults(checkpoint, FloatSpec(dense.tensor, "", (n, k)))
        else:
            what = "the expert matrix" if spec.expert is not None else "the linear"
            report.faults.append(f"{where}: {what} was left unquantized ({dense.tensor})")
    report.facts["linears"] = linears
    for kept in architecture.all_floats():
        used.add(kept.name)
        if some_lost and kept.name not in checkpoint:
            unchecked.append(kept.name)
        else:
            report.faults += _float_faults(checkpoint, kept)
    if architecture.tied:
        used.add("lm_head.weight")
    for name in checkpoint.names():
        if name not in used and not name.endswith("rotary_emb.inv_freq"):
            file = checkpoint.info(name).file.name
            report.faults.append(
                f"{file}: {name}: this tensor does not belong to a {architecture.family} model"
            )
    if some_lost:
        report.facts["unchecked"] = unchecked
        report.warnings.append(
            f"not checked, because some shards are unreadable: {len(unchecked)} linears and 16-bit tensors, "
            f"{', '.join(unchecked[:_SHOWN])}{' and others' if len(unchecked) > _SHOWN else ''}"
        )


def _missing(name: str) -> str:
    return f"config.json: requires {name}, which no shard holds"


def _may_stay_dense(checkpoint: Checkpoint, architecture: Architecture, spec: LinearSpec) -> bool:
    """Whether the format allows it: the head, and the attention of a block if none of it is quantized."""
    if spec.block is None:
        return True
    linears = (other for stage in architecture.blocks[spec.block].stages for other in stage)
    return spec.role in ATTENTION_ROLES and not any(
        checkpoint.is_quantized(other.name) for other in linears if other.role in ATTENTION_ROLES
    )


def _linear_faults(checkpoint: Checkpoint, spec: LinearSpec) -> list[str]:
    """Faults of one quantized linear; its big tensors are not read."""
    tensors = {}
    files = set()
    for suffix in (*SUFFIXES, "bias"):
        name = f"{spec.name}.{suffix}"
        if name in checkpoint:
            files.add(checkpoint.info(name).file.name)
            tensors[suffix] = checkpoint.load(name)
    file = " and ".join(sorted(files))
    try:
        validate_linear(tensors, spec.name, file)
    except CheckpointError as error:
        return [str(error)]
    faults = []
    k, n = tensors["q_invperm"].shape[0], tensors["q_weight"].shape[1]
    if (k, n) != (spec.shape[0], padded_columns(spec.shape[1])):
        expected = (spec.shape[0], padded_columns(spec.shape[1]))
        faults.append(f"{file}: {spec.name}: is {(k, n)} (K, N as stored), the model requires {expected}")
    if ("bias" in tensors) != spec.bias:
        state, rule = ("present", "none") if "bias" in tensors else ("missing", "one")
        faults.append(f"{file}: {spec.name}.bias: {state}, the model's linear has {rule}")
    return faults


def _float_faults(checkpoint: Checkpoint, kept: FloatSpec) -> list[str]:
    if kept.name not in checkpoint:
        return [_missing(kept.name)]
    info = checkpoint.info(kept.name)
    where = f"{info.file.name}: {kept.name}"
    faults = []
    if info.dtype != "F16":
        faults.append(f"{where}: dtype {info.dtype}, expected F16")
    if info.shape != kept.shape:
        return [*faults, f"{where}: shape {info.shape}, the model requires {kept.shape}"]
    if found := first_not_finite(checkpoint, kept.name):
        faults.append(f"{where}: {found}, expected finite values")
    return faults


def _check_config(config: dict[str, Any], architecture: Architecture, minor: list[str]) -> None:
    if _section(config, "quantization_config").get("quant_method") != "exl2":
        minor.append(
            'config.json: no quantization_config with quant_method "exl2"; '
            "transformers would load random weights"
        )
    minor += family_of(architecture.family).config_problems(config)


def _count_bits(
    checkpoint: Checkpoint, architecture: Architecture, config: dict[str, Any], report: Report
) -> None:
    bits = stored_bits(checkpoint, architecture)
    report.facts |= {"bpw": bits.bpw, "head_bpw": bits.head_bpw, "total_bytes": bits.total_bytes}
    said = _section(config, "quantization_config").get("bpw")
    if isinstance(said, float) and abs(said - bits.bpw) > 1e-4:
        report.faults.append(
            f"config.json: quantization_config.bpw is {said}, the shards hold {bits.bpw:.5f} bits per weight"
        )


def _try_to_run(folder: Path, report: Report) -> None:
    """Generate a token, for whatever makes a folder unusable and breaks no rule."""
    try:
        fault = run_one_token(folder)
    except MemoryError:
        report.warnings.append(f"{folder}: not tried out, because there is too little memory to load it")
    else:
        report.faults += [fault] if fault else []


def _check_repacked(
    checkpoint: Checkpoint, architecture: Architecture, reading: _Reading | None, report: Report
) -> None:
    """Compare the file of repacked linears, if there is one, with what the shards make."""
    if not (checkpoint.folder / REPACKED_NAME).exists():
        return
    if (reason := why_unavailable()) is not None:
        report.warnings.append(f"{REPACKED_NAME}: not checked, because there is no native library: {reason}")
        return
    contents = read_contents(architecture, checkpoint)
    faults, warnings = repacked_faults(contents, reading.count if reading else None)
    report.faults += faults
    report.warnings += warnings
    report.facts["repacked"] = not faults and not warnings


def _check_checksums(folder: Path, compare: bool, reading: "_Reading", report: Report) -> None:
    try:
        listed = read_checksums(folder)
    except (CheckpointError, OSError) as error:
        report.faults.append(str(error))
        return
    for file in shard_files(folder):
        if file.name not in listed:
            report.faults.append(f"{CHECKSUMS_NAME}: omits {file.name}")
    for name, checksum in sorted(listed.items()):
        file = folder / name
        if not file.is_file():
            report.faults.append(f"{name}: missing; {CHECKSUMS_NAME} names it")
            continue
        if leaves(file):
            report.faults.append(f"{name}: a link out of the folder; put the shard itself there")
            continue
        found = file.stat().st_size
        if found != checksum.size:
            report.faults.append(
                f"{name}: {found} bytes, {CHECKSUMS_NAME} says {checksum.size}; fetch it again"
            )
            continue
        if not compare:
            continue
        hasher = hashlib.sha256()
        with open_regular(file) as stream:
            while piece := stream.read(_CHUNK_BYTES):
                hasher.update(piece)
                reading.count(len(piece))
        if hasher.hexdigest() != checksum.sha256:
            report.faults.append(f"{name}: its SHA-256 differs from {CHECKSUMS_NAME}; fetch it again")
    report.facts["checksums"] = compare
