"""How close quantized models stay to their original: sizes beside other tools, and one change at a time.

    python -m dbrx_quant.scripts.dev.bench_quality MODEL --calibration FILE --held-out FILE --text FILE
        --work DIR [--study sizes,scales,…] [--targets 2.5,3.0,4.25] [--peers FILE] [--plot DIR]
        [--record DIR]

Measures once for each setting, quantizes each variant (`quality_variants`) to each target, loads the result
as a user would and scores it: on the held-out text, or, for the table of sizes, on the test text. What is
finished is in DIR/results.json; a second run with the same DIR goes on from there. After a change of the
program start with a new DIR.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.text.tokens import HELD_OUT_EVERY, load_tokens
from dbrx_quant.quantize.budget.predict import Predictor
from dbrx_quant.quantize.first_pass import MeasureJob, measure
from dbrx_quant.quantize.measurement import (
    Measurement,
    read_measurement,
    source_facts,
    write_measurement,
)
from dbrx_quant.quantize.output.config import write_configs
from dbrx_quant.quantize.second_pass import QuantizeJob, quantize_model
from dbrx_quant.quantize.solve.repair import NO_REPAIR
from dbrx_quant.runtime.evaluation.scores import evaluate, windows
from dbrx_quant.runtime.files.atomic import fingerprint, write_json
from dbrx_quant.runtime.folder.inspect import inspect_folder
from dbrx_quant.runtime.kernels.float_matmul import fast_products
from dbrx_quant.runtime.library import _native
from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.model.load_dense import load_dense
from dbrx_quant.runtime.output.progress import Progress
from dbrx_quant.runtime.shards.write import write_shards
from dbrx_quant.runtime.tokenizer.fix import write_tokenizer
from dbrx_quant.scripts.dev.bench_record import add_record_argument, record
from dbrx_quant.scripts.dev.quality_report import compare, plot, show
from dbrx_quant.scripts.dev.quality_variants import LENGTH, STUDIES, Setting, Variant
from dbrx_quant.scripts.terminal.output import hide_loading_bar, print_json, quiet_on_closed_pipe, say

T = TypeVar("T")


@contextmanager
def replaced(patches: Mapping[str, Any]) -> Iterator[None]:
    """Inside the `with` block other objects stand under these full names."""
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        yield


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """A result, and the seconds it took by the clock and by the processor (all its cores)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


class Bench:
    """One model with its texts, tokens, measurements and finished results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder: Path = arguments.work
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = StreamedModel(arguments.model)
        self.original = load_dense(arguments.model)
        self.results: dict[str, Any] = {}
        self.facts = self._facts()
        if self._file.exists():
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            if kept["facts"] != self.facts:
                raise ValueError(
                    f"{self._file}: made with another model, other texts or settings; use another --work"
                )
            self.results = kept["results"]

    @property
    def _file(self) -> Path:
        return self.folder / "results.json"

    def _facts(self) -> dict[str, Any]:
        given = self.arguments
        files = {"calibration": given.calibration, "held-out": given.held_out, "test": given.text}
        return {
            "model": source_facts(given.model),
            **{name: fingerprint(file) for name, file in files.items()},
            "windows": {"held-out": given.held_out_windows, "test": given.text_windows},
            "window_length": given.length,
            "head_bits": given.head_bits,
            "calibration_text": given.calibration_text,
        }

    def tokens(self, setting: Setting) -> Tensor:
        """Calibration tokens [R, L] of a setting."""
        if setting.tokens is None:
            return load_tokens(self.arguments.calibration, self.arguments.model).input_ids
        source, rows = self.arguments.calibration_text, setting.tokens // LENGTH
        if source is None:
            raise ValueError(f"{setting.name}: give --calibration-text to take the tokens from")
        ids = load_tokens(source, self.arguments.model, rows, LENGTH).input_ids
        if len(ids) < rows:
            raise ValueError(f"{source}: {ids.numel()} tokens, {setting.tokens} required; give more text")
        return ids

    def rows(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """Rows to calibrate on, and those that the KL is predicted on: held-out text, or a part left out."""
        ids, given = self.tokens(setting), self.arguments
        if setting.left_out is None:
            return ids, windows(given.model, given.held_out, given.held_out_windows, given.length)
        part = torch.arange(len(ids)) % HELD_OUT_EVERY == setting.left_out
        return ids[~part], ids[part]

    def measurement(self, setting: Setting) -> tuple[Measurement, float]:
        """The measurement of a setting and the seconds it took, made if it is not there yet."""
        file = self.folder / "measurements" / f"{setting.name}.json"
        if not file.exists():
            say(f"measuring: {setting.name}")
            scratch = self._scratch("measure")
            with replaced(setting.patches):
                ids, held_out = self.rows(setting)
                held_out = held_out.view(-1, ids.shape[1])  # windows are some rows each
                job = MeasureJob(self.model, ids, scratch, Progress(), held_out=held_out, **setting.job)
                found, seconds = timed(lambda: measure(job))
            file.parent.mkdir(exist_ok=True)
            write_measurement(file, found.of({}, {"seconds": seconds}, None))
            shutil.rmtree(scratch)
        kept = read_measurement(file)
        return kept, kept.calibration["seconds"]

    def run(self, variant: Variant, target: float, text: str) -> dict[str, Any]:
        """Scores of a variant at a target on one of the texts, from the results or made now."""
        key = f"{variant.name} @ {target}, {text}"
        if key not in self.results:
            measurement, seconds = self.measurement(variant.setting)
            out, result = self._quantize(variant, target, measurement)
            count = self.facts["windows"][text]
            file = self.arguments.held_out if text == "held-out" else self.arguments.text
            rows = windows(self.arguments.model, file, count, self.arguments.length)
            scores = evaluate(load_model(out), self.original, rows).as_dict()
            shutil.rmtree(out.parent)
            self.results[key] = {
                "variant": variant.name, "target": target, "measure": seconds, **result, **scores,
            }  # fmt: skip
            write_json(self._file, {"facts": self.facts, "results": self.results})
            say(f"{key}: KL {scores['kl']:.6f}")
        found: dict[str, Any] = self.results[key]
        return found

    def _quantize(
        self, variant: Variant, target: float, measurement: Measurement
    ) -> tuple[Path, dict[str, Any]]:
        """A checkpoint as `convert` writes it, and its size, predicted KL and seconds."""
        source, architecture, head_bits = (
            self.arguments.model,
            self.model.architecture,
            self.arguments.head_bits,
        )
        strategy = variant.allocation(measurement, target, head_bits)
        groups = {name: option.groups for name, option in strategy.choices.items()}
        (tokens, held_out), scratch = self.rows(variant.setting), self._scratch("quantize")
        watched = held_out if variant.setting.left_out is not None else None
        with replaced({**variant.setting.patches, **variant.patches}):
            job = QuantizeJob(
                self.model, tokens, scratch, measurement, groups, Progress(), held_out=watched, **variant.job
            )
            predictor = Predictor(self.model, measurement, held_out, scratch / "predict")
            (predicted, _), before = timed(lambda: predictor.kl(strategy, job.repair != NO_REPAIR))
            measured, seconds = timed(lambda: quantize_model(job))
        out = scratch / "out"
        write_shards(out, architecture, self.model.checkpoint, scratch / "linears")
        write_tokenizer(source, out, architecture.vocabulary)
        rows, length = tokens.shape
        write_configs(
            source, out, architecture, bits=target, head_bits=head_bits, rows=rows, length=length, dataset=""
        )
        return out, {
            "bpw": inspect_folder(out).bpw,
            "quantize": seconds,
            "sum_kl": strategy.kl,
            "predicted_kl": predicted,
            "predict": before,
            "unseen": measured,
        }

    def _scratch(self, name: str) -> Path:
        """An empty folder: whoever was stopped in it starts again."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


@fast_products()
def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of the studies and targets asked for, JSON-ready."""
    bench = Bench(arguments)
    studies = {}
    for study in arguments.study:
        text = "test" if study == "sizes" else "held-out"
        rows = [bench.run(variant, t, text) for variant in STUDIES[study] for t in arguments.targets]
        if study == "sizes":
            rows = [{**row, "peers": compare(row, arguments.peers)} for row in rows]
        studies[study] = rows
    return {"name": arguments.name, "facts": bench.facts, "studies": studies}


def read_peers(file: Path, name: str) -> dict[str, Any]:
    """Other tools' figures for a model: {"exllamav2": [{"bpw": 2.5, "kl": 1.39, …}, …], "llamacpp": […]}.

    Raises:
        ValueError: the file has nothing for the model.
    """
    everything: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    found = [models for model, models in everything.items() if model.startswith(name)]
    if len(found) != 1:
        raise ValueError(f"{file}: figures for {', '.join(everything)}; choose one with --name")
    return {tool: rows for tool, rows in found[0].items() if isinstance(rows, list)}


@quiet_on_closed_pipe
def main(argv: list[str] | None = None) -> int:
    """Run the studies that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="the original's folder")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="tokens.safetensors")
    parser.add_argument("--held-out", type=Path, required=True, metavar="FILE", help="text for choices")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text of the table of sizes")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for results, also to resume")
    parser.add_argument("--study", type=lambda s: s.split(","), default=["sizes"], help=",".join(STUDIES))
    parser.add_argument(
        "--targets", type=lambda s: [float(t) for t in s.split(",")], default=[2.5, 3.0, 4.25]
    )
    parser.add_argument("--calibration-text", metavar="SOURCE", help="text or set for the study calibration")
    parser.add_argument("--held-out-windows", type=int, default=12)
    parser.add_argument("--text-windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--head-bits", type=int, default=6)
    parser.add_argument("--threads", type=int, help="of the processor (default: all)")
    parser.add_argument("--peers", type=Path, metavar="FILE", help="other tools' figures, JSON")
    parser.add_argument(
        "--name", help="the model's, in the peers' file and in titles (default: its folder's)"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write quality-NAME.png there (matplotlib)")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_record_argument(parser)
    arguments = parser.parse_args(argv)
    arguments.name = arguments.name or arguments.model.resolve().name
    unknown = [study for study in arguments.study if study not in STUDIES]
    if unknown:
        parser.error(f"unknown study {', '.join(unknown)}; known are {', '.join(STUDIES)}")
    arguments.peers = read_peers(arguments.peers, arguments.name) if arguments.peers else {}
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        _native.set_threads(arguments.threads)
    hide_loading_bar(quiet=True)
    report = measure_all(arguments)
    record(f"quality-{arguments.name}", arguments, report)
    if arguments.plot and report["studies"].get("sizes"):
        plot(report, arguments.peers, arguments.plot / f"quality-{arguments.name}.png")
    print_json(report) if arguments.json else show(report, arguments.peers, arguments.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
