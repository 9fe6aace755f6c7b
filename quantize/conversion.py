"""From a model folder to EXL2 checkpoints: tokens, measurement, allocation, quantization, output files."""

import json
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dbrx_quant.calibration.data import UNSEEN_EVERY
from dbrx_quant.calibration.streamed import StreamedModel
from dbrx_quant.quantize.allocate import Strategy, allocate, check_targets
from dbrx_quant.quantize.job import open_job, source_facts
from dbrx_quant.quantize.measure import MeasureJob, measure
from dbrx_quant.quantize.options import ConvertOptions, target_name
from dbrx_quant.quantize.patch_config import Summary, generation_config, patched_config, write_configs
from dbrx_quant.quantize.pipeline import QuantizeJob, quantize_model
from dbrx_quant.quantize.plan import check_channels, check_disk, check_memory, shape_range, total_bytes
from dbrx_quant.quantize.predict import Predictor
from dbrx_quant.quantize.progress import bar
from dbrx_quant.quantize.record import RECORD_NAME, Settings, plain_name, write_record
from dbrx_quant.quantize.rows import Rows, load_rows
from dbrx_quant.quantize.shards import write_shards
from dbrx_quant.quantize.side_files import copy_side_files
from dbrx_quant.quantize.tokenizer import write_tokenizer
from dbrx_quant.runtime.config import read_config
from dbrx_quant.runtime.errors import CheckpointError
from dbrx_quant.runtime.evaluations import EVALUATION_NAME
from dbrx_quant.runtime.files import fingerprint, remove_leftovers, write_json
from dbrx_quant.runtime.products import fast_products
from dbrx_quant.runtime.tokenizer_check import check_tokenizer
from dbrx_quant.runtime.verify import verify
from dbrx_quant.runtime.vocabulary import read_object, special_ids

MEASUREMENT_VERSION = 2


@dataclass(frozen=True)
class Converted:
    """One finished checkpoint.

    Attributes:
        folder: where it is.
        target_bpw: what was asked for.
        bpw: what it takes.
        predicted_kl: KL divergence to the original that the measurement predicts, nats per token.
        measured_kl: the same, measured on held-out rows; None: there are too few to hold any out.
        total_bytes: size of the shards.
        seconds: time spent on it, the measurement aside.
        peak_bytes: most memory that the process has had.
    """

    folder: Path
    target_bpw: float
    bpw: float
    predicted_kl: float
    measured_kl: float | None
    total_bytes: int
    seconds: float
    peak_bytes: int


@fast_products()
def convert(options: ConvertOptions) -> list[Converted]:
    """Convert a model to each target; one measurement serves them all.

    Raises:
        CheckpointError: the source is incomplete or unknown.
        ValueError: targets out of reach, earlier work that differs, too little memory.
    """
    if not options.targets:
        raise ValueError("no target given")
    if options.device != "cpu":
        raise ValueError(f"device {options.device}: conversion runs on the CPU; give --device cpu")
    if options.out.resolve() == options.model.resolve():
        raise ValueError(f"{options.out}: the output folder must differ from the model's")
    model = StreamedModel(options.model)
    _check_side_files(options.model, model.architecture.vocabulary)
    check_channels(model.architecture)
    check_targets(options.targets, *shape_range(model.architecture))
    with open_job(options.work, _facts(options), options.resume) as resumed:
        if resumed and not options.quiet:
            print(f"going on with the work in {options.work}", file=sys.stderr)
        _clean(options.work)
        rows = load_rows(options)
        check_memory(model.architecture, rows.count, options.max_memory)
        sizes = [total_bytes(model.architecture, bpw, options.head_bits) for bpw in options.targets]
        measured = options.measurement is not None or (options.work / "measurement.json").exists()
        check_disk(model.architecture, rows.count, options.work, options.out, sizes, measured)
        measurement = _measurement(options, model, rows)
        strategies = _strategies(options, model, rows, measurement)
        return [_one_target(options, model, rows, measurement, s) for s in strategies]


@fast_products()
def measure_model(options: ConvertOptions, output: Path) -> Path:
    """Measure a model and write the measurement to `output`, which is returned."""
    model = StreamedModel(options.model)
    check_channels(model.architecture)
    with open_job(options.work, _facts(options), options.resume):
        _clean(options.work)
        rows = load_rows(options)
        check_memory(model.architecture, rows.count, options.max_memory)
        check_disk(model.architecture, rows.count, options.work, None)
        write_json(output, _measurement(options, model, rows))
    return output


def _check_side_files(folder: Path, vocabulary: int) -> None:
    """Find faults of the source's config and tokenizer before the work instead of after it.

    What will be written at the end is written to a temporary folder and checked.
    """
    with tempfile.TemporaryDirectory() as name:
        trial = Path(name)
        write_tokenizer(folder, trial, vocabulary)
        ids = special_ids(trial, folder)
        summary = Summary(None, 0.0, 0, 0, 0, "", ids)
        write_json(trial / "config.json", patched_config(read_config(folder), summary))
        generation = generation_config(read_object(folder / "generation_config.json"), ids)
        write_json(trial / "generation_config.json", generation)
        problems = check_tokenizer(trial, vocabulary)
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(map(str, problems[:3]))}")


def _facts(options: ConvertOptions) -> dict[str, Any]:
    """What the contents of the work folder depend on. Targets have folders of their own in it."""
    return {
        "model": source_facts(options.model),
        "calibration": _source_facts(options.calibration),
        "rows": options.rows,
        "length": options.length,
        "seed": options.seed,
        "effort": options.effort,
        "held_out": _source_facts(options.held_out) if options.held_out else f"1/{UNSEEN_EVERY}",
        "held_out_rows": options.held_out_rows,
        "measurement": fingerprint(options.measurement) if options.measurement else None,
        "repair": asdict(options.repair) if options.repair else None,
        "refit": options.refit,
    }


def _source_facts(source: str) -> Any:
    """What identifies a source of text."""
    return fingerprint(Path(source)) if Path(source).is_file() else source


def _clean(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for inner in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        remove_leftovers(inner)


def _measurement(options: ConvertOptions, model: StreamedModel, rows: Rows) -> dict[str, Any]:
    if options.measurement:
        return load_measurement(options.measurement, options.model)
    path = options.work / "measurement.json"
    if not path.exists():
        folder = options.work / "measure"
        folder.mkdir(exist_ok=True)
        blocks = model.architecture.blocks
        steps = 2 * len(blocks) + 1 + sum(b.experts.count for b in blocks if b.experts)
        with bar(steps, "measure", options.quiet) as progress:
            job = MeasureJob(
                model, rows.calibration, folder, progress, options.seed, options.effort, rows.unseen
            )
            found = measure(job)
        described = {k: _public(v) for k, v in rows.tokens.description.items() if k != "notices"}
        facts = {
            "format_version": MEASUREMENT_VERSION,
            "model": source_facts(options.model),
            "calibration": described,
            "held_out": rows.held_out,
        }
        write_json(path, {**facts, **found})
        shutil.rmtree(folder)
    return load_measurement(path, options.model)


def _public(value: Any) -> Any:
    """A value of the tokens' description, without the folder of a file."""
    return plain_name(value) if isinstance(value, str) else value


def _strategies(
    options: ConvertOptions, model: StreamedModel, rows: Rows, measurement: dict[str, Any]
) -> list[Strategy]:
    """The allocation for each target, with its predicted KL, which is kept in the work folder."""
    folder = options.work / "predict"
    shown = rows.calibration if rows.unseen is None else rows.unseen
    predictor = Predictor(model, measurement, shown, folder, options.seed)
    strategies = []
    for target in options.targets:
        strategy = allocate(measurement, target, options.head_bits)
        file = _target_work(options, target) / "predicted.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            kl, stderr = predictor.kl(strategy, options.repair is not None)
            write_json(file, {"kl": kl, "kl_stderr": stderr})
        predicted = json.loads(file.read_text(encoding="utf-8"))
        if not options.quiet:
            error = f" ± {predicted['kl_stderr']:.2g}" if predicted["kl_stderr"] is not None else ""
            print(f"{target} bits per weight: predicted KL {predicted['kl']:.4g}{error}", file=sys.stderr)
        strategies.append(replace(strategy, kl=predicted["kl"]))
    if folder.exists():
        shutil.rmtree(folder)
    return strategies


def _target_work(options: ConvertOptions, target: float) -> Path:
    """The part of the work folder that belongs to a target."""
    return options.work / f"{target_name(target)}-h{options.head_bits}"


def load_measurement(path: Path, model: Path) -> dict[str, Any]:
    """A measurement, checked to be one of this model.

    Raises:
        CheckpointError: the file is damaged, of another version, or of another model.
    """
    try:
        measurement: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, source = measurement["format_version"], measurement["model"]
        if version != MEASUREMENT_VERSION:
            raise CheckpointError(
                f"{path}: version {version}, this program reads {MEASUREMENT_VERSION}; measure again"
            )
        measurement["linears"]["lm_head"]["options"][0][2].split()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such measurement") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a measurement ({error!r}); measure again") from None
    if source != source_facts(model):
        raise CheckpointError(f"{path}: measured on another model than {model}; measure this one")
    return measurement


def _one_target(
    options: ConvertOptions,
    model: StreamedModel,
    rows: Rows,
    measurement: dict[str, Any],
    strategy: Strategy,
) -> Converted:
    started = time.monotonic()
    out = options.output(strategy.target_bpw)
    work = _target_work(options, strategy.target_bpw)
    done, written = work / "done.json", strategy.to_json()
    if not (done.exists() and _holds(out, written)):
        strategy_path = work / "strategy.json"
        if strategy_path.exists() and json.loads(strategy_path.read_text(encoding="utf-8")) != written:
            raise ValueError(f"{strategy_path}: made by another version; start anew with --resume never")
        write_json(strategy_path, written)
        groups = {name: option[2] for name, option in strategy.choices.items()}
        title = f"quantize {strategy.target_bpw}"
        with bar(len(groups), title, options.quiet) as progress:
            measured = quantize_model(
                QuantizeJob(
                    model,
                    rows.calibration,
                    work,
                    measurement,
                    groups,
                    progress,
                    options.effort,
                    options.repair,
                    rows.unseen,
                    options.refit,
                )
            )
        _write_output(options, model, rows, strategy, measured, work, out)
        write_json(out / "measurement.json", measurement)
        report = verify(out)
        if not report.ok:
            raise CheckpointError(f"{out}: the result does not verify: {'; '.join(report.faults[:3])}")
        write_json(done, {"bpw": report.facts["bpw"]})
        for leftover in work.glob("*.npy"):  # first, since states say that the linears before them are there
            leftover.unlink()
        shutil.rmtree(work / "linears")
    elif not options.quiet:
        print(f"{out}: finished earlier; kept as it is, with the shards that it has", file=sys.stderr)
    found = json.loads((out / "strategy.json").read_text(encoding="utf-8"))["measured"]
    shards = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return Converted(
        out,
        strategy.target_bpw,
        strategy.bpw,
        strategy.kl,
        found and found["kl"],
        shards,
        time.monotonic() - started,
        peak_memory(),
    )


def _holds(out: Path, strategy: dict[str, Any]) -> bool:
    """Whether a folder has the finished result of a strategy, and no other's that came into it later."""
    try:
        found = json.loads((out / "strategy.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    if not isinstance(found, dict) or "measured" not in found:
        return False
    same = {k: v for k, v in found.items() if k not in ("held_out", "measured", "notes")} == strategy
    return same and (out / "config.json").exists()


def peak_memory() -> int:
    """Most bytes of memory that this process has had.

    Not `ru_maxrss`: a child process inherits that figure from its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _write_output(
    options: ConvertOptions,
    model: StreamedModel,
    rows: Rows,
    strategy: Strategy,
    measured: dict[str, Any] | None,
    work: Path,
    out: Path,
) -> None:
    notes: list[str] = list(rows.tokens.description.get("notices", []))
    for name in ("strategy.json", RECORD_NAME, EVALUATION_NAME):  # of an earlier result, now replaced
        (out / name).unlink(missing_ok=True)
    write_shards(
        out,
        model.architecture,
        model.checkpoint,
        work / "linears",
        options.max_shard_bytes,
        notify=notes.append,
    )
    notes += write_tokenizer(options.model, out, model.architecture.vocabulary)
    notes += write_configs(
        options.model,
        out,
        model.architecture,
        bits=strategy.target_bpw,
        head_bits=options.head_bits,
        rows=rows.tokens.input_ids.shape[0],
        length=rows.tokens.input_ids.shape[1],
        dataset=plain_name(str(rows.tokens.description.get("source", options.calibration))),
    )
    skipped = copy_side_files(options.model, out).skipped
    notes += [f"left behind: {name} ({why})" for name, why in skipped.items() if why != "a hidden file"]
    settings = Settings(
        model=options.model,
        bpw=strategy.target_bpw,
        head_bits=options.head_bits,
        calibration=options.calibration,
        rows=options.rows,
        length=options.length,
        seed=options.seed,
        effort=options.effort,
        refit=options.refit,
        measurement=options.measurement,
        held_out=options.held_out,
        held_out_rows=options.held_out_rows,
    )
    write_record(out, settings, work / "linears")
    found = {"held_out": rows.held_out, "measured": measured, "notes": notes}
    write_json(out / "strategy.json", {**strategy.to_json(), **found})
