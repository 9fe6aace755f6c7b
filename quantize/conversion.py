"""From a model folder to EXL2 checkpoints: tokens, measurement, allocation, quantization, output files."""

import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dbrx_quant.calibration.blocks.crew import Crew, NotedProgress
from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.text.tokens import HELD_OUT_EVERY
from dbrx_quant.quantize.budget.allocate import allocate, check_targets
from dbrx_quant.quantize.budget.predict import Predictor
from dbrx_quant.quantize.budget.strategy import (
    STRATEGY_NAME,
    Outcome,
    Strategy,
    read_strategy,
    write_strategy,
)
from dbrx_quant.quantize.declared import plain_name
from dbrx_quant.quantize.estimate.memory import DeviceNeeds, check_device_memory, check_disk, check_memory
from dbrx_quant.quantize.estimate.sizes import check_channels, shape_range, total_bytes
from dbrx_quant.quantize.first_pass import MeasureJob, measure
from dbrx_quant.quantize.measurement import (
    MEASUREMENT_NAME,
    Measurement,
    read_measurement_of,
    source_facts,
    write_measurement,
)
from dbrx_quant.quantize.options import ConvertOptions, target_name
from dbrx_quant.quantize.output.config import Summary, generation_config, patched_config, write_configs
from dbrx_quant.quantize.output.finished import is_finished, note_finished, was_finished
from dbrx_quant.quantize.output.place import claimed
from dbrx_quant.quantize.output.record import RECORD_NAME, write_record
from dbrx_quant.quantize.output.side_files import copy_side_files
from dbrx_quant.quantize.rows import Rows, load_rows
from dbrx_quant.quantize.second_pass import QuantizeJob, quantize_model
from dbrx_quant.quantize.solve.repair import NO_REPAIR
from dbrx_quant.quantize.work_folder import arithmetic, check_apart, open_job
from dbrx_quant.quantize.workers.joining import crew_of, help_out
from dbrx_quant.quantize.workers.ranks import rank, size
from dbrx_quant.runtime.evaluation.record import EVALUATION_NAME
from dbrx_quant.runtime.exl2.group_text import parse_groups
from dbrx_quant.runtime.families.config import read_config
from dbrx_quant.runtime.families.values import check_values
from dbrx_quant.runtime.files.atomic import check_place, write_json
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_file import JsonFile
from dbrx_quant.runtime.files.sealed import check_seal, seal
from dbrx_quant.runtime.files.watched import WatchedFile
from dbrx_quant.runtime.folder.checksums import CHECKSUMS_NAME
from dbrx_quant.runtime.folder.verify import verify
from dbrx_quant.runtime.kernels.device import CPU, device_name, find_device
from dbrx_quant.runtime.kernels.float_matmul import exact_on_gpus, fast_products
from dbrx_quant.runtime.output.progress import bar
from dbrx_quant.runtime.shards.filling import FillingShards, check_begun, is_begun
from dbrx_quant.runtime.shards.write import check_foreign
from dbrx_quant.runtime.tokenizer.check import check_tokenizer
from dbrx_quant.runtime.tokenizer.fix import write_tokenizer
from dbrx_quant.runtime.tokenizer.ids import read_object, special_ids

# of an earlier result, and gone when the first shard of another comes
_REPLACED = ("config.json", STRATEGY_NAME, RECORD_NAME, EVALUATION_NAME)
_PREDICTED = JsonFile("a prediction", version=1, remedy="start over with --resume never", sealed=True)


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


@exact_on_gpus()
@fast_products()
def convert(options: ConvertOptions) -> list[Converted]:
    """Convert a model to each target; one measurement serves them all.

    Of several workers, rank 0 does this; the others help, and return nothing.

    Raises:
        CheckpointError: the source is incomplete or unknown.
        ValueError: targets out of reach, earlier work that differs, too little memory, no such device.
        WorkerError: another worker has failed, or gives no sign.
    """
    device = find_device(options.device)
    if rank():
        help_out(options.work, options.model, device)
        return []
    if not options.targets:
        raise ValueError("no target given")
    model = open_model(options.model, device)
    _check_side_files(model)
    check_channels(model.architecture)
    check_targets(options.targets, *shape_range(model.architecture))
    given = read_measurement_of(options.measurement, options.model) if options.measurement else None
    outputs = [options.output(target) for target in options.targets]
    check_apart(options.work, (*outputs, options.model, options.measurement))
    with (
        claimed(outputs, options.model),
        open_job(options.work, _facts(options, device), options.resume) as resumed,
    ):
        if resumed and not options.quiet:
            print(f"resuming the work in {options.work}", file=sys.stderr)
        for target in options.targets:
            _check_place(options, target)
        rows = _rows(options, model)
        check_memory(model.architecture, rows.count, options.max_memory)
        check_device_memory(device, model.architecture, _device_needs(options, model, rows))
        sizes = [total_bytes(model.architecture, bpw, options.head_bits) for bpw in options.targets]
        measured = given is not None or (options.work / MEASUREMENT_NAME).exists()
        limit = options.max_shard_bytes
        several = size() > 1
        check_disk(model.architecture, rows.count, options.work, options.out, sizes, limit, measured, several)
        with crew_of(options.work, options.model, device, options.quiet) as crew:
            measurement = given or _measurement(options, model, rows, crew)
            strategies = _strategies(options, model, rows, measurement, crew)
            return [_one_target(options, model, rows, measurement, s, crew) for s in strategies]


@exact_on_gpus()
@fast_products()
def measure_model(options: ConvertOptions, output: Path) -> Path:
    """Measure a model and write the measurement to `output`, which is returned.

    Of several workers, rank 0 does this; the others help.
    """
    device = find_device(options.device)
    if rank():
        help_out(options.work, options.model, device)
        return output
    model = open_model(options.model, device)
    check_channels(model.architecture)
    check_place(output)
    check_apart(options.work, (output, options.model))
    with open_job(options.work, _facts(options, device), options.resume):
        rows = _rows(options, model)
        check_memory(model.architecture, rows.count, options.max_memory)
        check_device_memory(device, model.architecture, _device_needs(options, model, rows))
        check_disk(model.architecture, rows.count, options.work, None, several=size() > 1)
        with crew_of(options.work, options.model, device, options.quiet) as crew:
            measurement = _measurement(options, model, rows, crew)
        model.check_unchanged()
        write_measurement(output, measurement)
    return output


def open_model(folder: Path, device: torch.device = CPU) -> StreamedModel:
    """The original; says on stderr what in its configuration is corrected."""
    model = StreamedModel(folder, device)
    for note in model.notes:
        print(f"notice: {note}", file=sys.stderr)
    return model


def _rows(options: ConvertOptions, model: StreamedModel) -> Rows:
    """The rows that are asked for, of files that stay as they are while they are read."""
    given = [options.calibration, options.held_out, options.measurement]
    watched = [WatchedFile(Path(path)) for path in given if path is not None and Path(path).is_file()]
    rows = load_rows(options, model.architecture)
    for file in watched:
        file.check()
    return rows


def _device_needs(options: ConvertOptions, model: StreamedModel, rows: Rows) -> DeviceNeeds:
    held_out = 0 if rows.held_out is None else rows.held_out.numel()
    return DeviceNeeds(
        length=rows.calibration.shape[1],
        heads=model.config.num_attention_heads,
        measured=held_out,
        predicted=held_out or rows.calibration.numel(),
        refit=options.refit,
    )


def _check_side_files(model: StreamedModel) -> None:
    """Find faults of the source's config and tokenizer before the work instead of after it.

    What will be written at the end is written to a temporary folder and checked.
    """
    folder, vocabulary = model.folder, model.architecture.vocabulary
    with tempfile.TemporaryDirectory() as name:
        trial = Path(name)
        write_tokenizer(folder, trial, vocabulary)
        ids = special_ids(trial, folder, vocabulary)
        summary = Summary(None, 0.0, 0, 0, 0, "", ids)
        write_json(
            trial / "config.json", patched_config({**read_config(folder), **model.corrections}, summary)
        )
        generation = generation_config(read_object(folder / "generation_config.json"), ids)
        write_json(trial / "generation_config.json", generation)
        problems = check_tokenizer(trial, vocabulary)
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(map(str, problems[:3]))}")


def _facts(options: ConvertOptions, device: torch.device) -> dict[str, Any]:
    """What the contents of the work folder depend on. Targets have folders of their own in it."""
    asked = options.work_facts()
    return {
        "model": source_facts(options.model),
        **asked,
        "device": None if device == CPU else device_name(device),  # each adds up in its own way
        **arithmetic(device),
        "held_out": asked["held_out"] or f"1/{HELD_OUT_EVERY}",
        "repair": None if options.repair == NO_REPAIR else asdict(options.repair),
    }


def _measurement(options: ConvertOptions, model: StreamedModel, rows: Rows, crew: Crew) -> Measurement:
    path = options.work / MEASUREMENT_NAME
    if not path.exists():
        folder = options.work / "measure"
        folder.mkdir(exist_ok=True)
        crew.note("checking the model's values")
        check_values(model.architecture, model.checkpoint, options.quiet)
        blocks = model.architecture.blocks
        steps = 2 * len(blocks) + 1 + sum(b.experts.count for b in blocks if b.experts)
        with bar(steps, "measure", options.quiet) as shown:
            progress = NotedProgress(shown, crew)
            job = MeasureJob(
                model, rows.calibration, folder, progress, options.seed, options.effort, rows.held_out, crew
            )
            found = measure(job)
        described = {k: _public(v) for k, v in rows.tokens.description.items() if k != "notices"}
        write_measurement(path, found.of(source_facts(options.model), described, rows.held_out_source))
        seal(path)
        shutil.rmtree(folder)
    check_seal(path)
    # read back in the first run too: a resumed one adds up in the file's order
    return read_measurement_of(path, options.model)


def _public(value: Any) -> Any:
    """A value of the tokens' description, without the folder of a file."""
    return plain_name(value) if isinstance(value, str) else value


def _strategies(
    options: ConvertOptions, model: StreamedModel, rows: Rows, measurement: Measurement, crew: Crew
) -> list[Strategy]:
    """The allocation for each target, with its predicted KL, which is kept in the work folder."""
    folder = options.work / "predict"
    shown = rows.calibration if rows.held_out is None else rows.held_out
    predictor = Predictor(model, measurement, shown, folder, options.seed, options.quiet)
    strategies = []
    for target in options.targets:
        strategy = allocate(measurement, target, options.head_bits)
        file = _target_work(options, target) / "predicted.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            crew.note(f"predicting {target} bits per weight")
            kl, stderr = predictor.kl(strategy, options.repair != NO_REPAIR)
            _PREDICTED.write(file, {"kl": kl, "kl_stderr": stderr})
        predicted = _PREDICTED.read(file)
        kl, stderr = predicted.number("kl"), predicted.number_or_none("kl_stderr")
        if not options.quiet:
            error = f" ± {stderr:.2g}" if stderr is not None else ""
            print(f"{target} bits per weight: predicted KL {kl:.4g}{error}", file=sys.stderr)
        strategies.append(replace(strategy, kl=kl))
    if folder.exists():
        shutil.rmtree(folder)
    return strategies


def _target_work(options: ConvertOptions, target: float) -> Path:
    """The part of the work folder that belongs to a target."""
    return options.work / f"{target_name(target)}-h{options.head_bits}"


def _check_place(options: ConvertOptions, target: float) -> None:
    """Find out before the work whether shards were begun otherwise, and say what will be replaced."""
    work, out = _target_work(options, target), options.output(target)
    if was_finished(work):
        return
    check_begun(work, options.max_shard_bytes)
    if check_foreign(out) and (out / "config.json").exists() and not is_begun(work):
        print(
            f"notice: {out}: holds an earlier result, which goes when the first shard of this one comes",
            file=sys.stderr,
        )


def _one_target(
    options: ConvertOptions,
    model: StreamedModel,
    rows: Rows,
    measurement: Measurement,
    strategy: Strategy,
    crew: Crew,
) -> Converted:
    started = time.monotonic()
    out = options.output(strategy.target_bpw)
    work = _target_work(options, strategy.target_bpw)
    if not is_finished(work, out):
        strategy_path = work / STRATEGY_NAME
        if strategy_path.exists():
            check_seal(strategy_path)
            if read_strategy(strategy_path)[0] != strategy:
                raise ValueError(f"{strategy_path}: made by another version; start over with --resume never")
        write_strategy(strategy_path, strategy)
        seal(strategy_path)
        groups = {name: option.groups for name, option in strategy.choices.items()}
        title = f"quantize {strategy.target_bpw}"
        model.check_unchanged()
        shards = FillingShards(
            work,
            out,
            model.architecture,
            model.checkpoint,
            {name: parse_groups(text) for name, text in groups.items()},
            options.max_shard_bytes,
            _REPLACED,
        )
        with bar(len(groups), title, options.quiet) as shown:
            job = QuantizeJob(
                model,
                rows.calibration,
                work,
                measurement,
                groups,
                NotedProgress(shown, crew),
                options.effort,
                options.repair,
                rows.held_out,
                options.refit,
                shards,
                crew,
            )
            measured = quantize_model(job)
        crew.note(f"writing {out.name}")
        side_files = _write_output(options, model, rows, strategy, measured, shards, out)
        write_measurement(out / MEASUREMENT_NAME, measurement)
        needed = peak_memory()  # before the system counts what verifying maps of the result
        report = verify(out)
        if not report.ok:
            raise CheckpointError(f"{out}: the result fails verification: {'; '.join(report.faults[:3])}")
        note_finished(work, out, side_files)
        job.discard_states()  # first, since states say that the linears before them are there
        shards.forget()
    else:
        needed = peak_memory()
        if not options.quiet:
            print(f"{out}: already finished; kept as it is, with the shards it has", file=sys.stderr)
    _, outcome = read_strategy(out / STRATEGY_NAME)
    measured_kl = outcome.measured["kl"] if outcome is not None and outcome.measured else None
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return Converted(
        out,
        strategy.target_bpw,
        strategy.bpw,
        strategy.kl,
        measured_kl,
        size,
        time.monotonic() - started,
        needed,
    )


def peak_memory() -> int:
    """Peak memory of this process, in bytes.

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
    shards: FillingShards,
    out: Path,
) -> tuple[str, ...]:
    """Write a result; returns the names of the side files that were copied along."""
    model.check_unchanged()
    notes: list[str] = [*model.notes, *rows.tokens.description.get("notices", []), *shards.finish()]
    try:
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
            corrections=model.corrections,
        )
        side_files = copy_side_files(options.model, out)
        skipped = side_files.skipped
        notes += [f"left behind: {name} ({why})" for name, why in skipped.items() if why != "a hidden file"]
        write_record(out, options, strategy.target_bpw, shards.facts)
        model.check_unchanged()
    except CheckpointError:
        (out / CHECKSUMS_NAME).unlink()  # so that nobody takes the result for a finished one
        model.check_unchanged()  # which tells more than what follows from a change
        raise
    write_strategy(out / STRATEGY_NAME, strategy, Outcome(rows.held_out_source, measured, notes))
    return side_files.copied
