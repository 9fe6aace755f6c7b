"""Injects faults into real conversions, resumes them, and compares the results with an undisturbed one's.

    python -m dbrx_quant.scripts.faults.inject MODEL --log faults.jsonl [--faults 200] [CONVERT'S OPTIONS]

A trial is a conversion in a folder of its own that one fault happens to (`faults.py`): a kill, a stop, the
death of one of two workers, an error of one call to the system or of all later ones, a disk that is full, a
file of the work folder or of the result that is damaged. Then the same command runs undisturbed and in one
process, as its user would run it again.

    sound      the result has the bytes of an undisturbed conversion
    refused    the second run named a damaged file, and without that file the result has those bytes
    LOST       it never came to a result
    WRONG      a result with other bytes was called finished or verified, or an error was no proper one

A proper error says what went wrong, without a traceback and with a documented exit code. A full disk is a
small file system in memory, which takes the right to mount one; without it these trials are left out, and
said to be.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dbrx_quant.runtime.files.sealed import sha256
from dbrx_quant.scripts.faults.faults import CALLS, Fault, Reference, bytes_below, damage_a_file, draw_fault
from dbrx_quant.scripts.terminal.arguments import positive
from dbrx_quant.scripts.terminal.output import print_table, quiet_on_closed_pipe, say

SHARES = {
    "kill": 22,
    "stop": 8,
    "worker": 8,
    "error": 35,
    "full": 5,
    "work": 14,
    "result": 8,
}  # of a hundred trials
DOCUMENTED = (0, 1, 2, 3, 75, 130)
TIMEOUT = 600  # seconds of a run
VOUCHED = (  # by `verify`, beside the shards; what else lies there may be edited, or is the original's
    "checksums.json",
    "config.json",
    "conversion.json",
    "generation_config.json",
    "measurement.json",
    "model.safetensors.index.json",
    "strategy.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code, and what it said on stderr."""

    code: int
    said: str

    @property
    def proper(self) -> bool:
        """Whether it ended as documented, with no traceback."""
        return self.code in DOCUMENTED and "Traceback" not in self.said and bool(not self.code or self.said)


class Bench:
    """Trials of one conversion.

    Args:
        model: the original.
        options: of `convert`, without the folders.
        root: for the folders of the trials.
    """

    def __init__(self, model: Path, options: Sequence[str], root: Path) -> None:
        self._model, self._options, self._root = model, options, root
        self._library = build(root)
        folder = root / "reference"
        folder.mkdir()
        started, peak = 0.0, 0
        process = self._start(folder, self._preload(folder, FAULTS_LOG=str(root / "calls")))
        while process.poll() is None:
            if not started and _work(folder).exists():
                started = time.monotonic()
            peak = max(peak, bytes_below(folder))
            time.sleep(0.005)
        seconds = time.monotonic() - started
        ended = _end_of(process)
        if ended.code:
            raise RuntimeError(f"the undisturbed conversion failed: {ended.said}")
        letters = Counter((root / "calls").read_text())
        calls = {call: letters[chr(ord("a") + number)] for number, call in enumerate(CALLS)}
        self.reference = Reference(seconds, calls, peak)
        self._expected = _contents(folder / "out")

    def trial(self, fault: Fault, number: int) -> dict[str, object]:
        """What came of a fault, JSON-ready."""
        folder = self._root / f"trial-{number}"
        folder.mkdir()
        with _disk(folder, fault.size) as full:
            verdict, said = self._judged(folder, fault, full)
        if verdict in ("sound", "refused"):
            shutil.rmtree(folder)
        return {"trial": number, "kind": fault.kind, "fault": str(fault), "verdict": verdict, "said": said}

    def _judged(self, folder: Path, fault: Fault, full: "_Disk | None") -> tuple[str, str]:
        first, damaged = self._disturbed(folder, fault)
        killed = fault.kind in ("kill", "work", "worker")
        unheard = (
            fault.kind == "stop" and first.code == -signal.SIGTERM
        )  # while the interpreter starts or ends
        if not (first.proper or killed or unheard):
            return "WRONG", f"exit code {first.code}: {first.said}"
        if first.code == 0 and fault.kind != "result" and not self._same(folder):
            return "WRONG", "finished with other bytes"
        if damaged and fault.kind == "result" and (wrong := self._unseen(folder, damaged)):
            return "WRONG", wrong
        if full:
            full.grow()
        again = _end_of(self._start(folder, {}))
        if again.code == 0:
            return ("sound" if self._same(folder) else "WRONG"), first.said or again.said
        if not again.proper:
            return "WRONG", again.said
        if damaged is None or damaged.name not in again.said:
            return "LOST", again.said
        shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink(missing_ok=True)
        last = _end_of(self._start(folder, {}))
        if last.code:
            return "LOST", last.said
        return ("refused" if self._same(folder) else "WRONG"), again.said

    def _disturbed(self, folder: Path, fault: Fault) -> tuple[Ended, Path | None]:
        """The run that the fault happens to, and the file that was damaged after it."""
        environment = self._preload(folder, **fault.environment) if fault.environment else {}
        process = self._start(folder, environment, workers=2 if fault.kind == "worker" else 1)
        if fault.kind in ("kill", "stop", "work", "worker"):
            while process.poll() is None and not _work(folder).exists():
                time.sleep(0.002)
            try:
                process.wait(fault.after)
            except subprocess.TimeoutExpired:
                if fault.kind == "worker":
                    os.kill(worker(process.pid, fault.rank), signal.SIGKILL)
                else:
                    process.send_signal(signal.SIGTERM if fault.kind == "stop" else signal.SIGKILL)
        ended = _end_of(process)
        if fault.kind == "work" and _work(folder).exists():
            return ended, damage_a_file(_work(folder), fault)
        if fault.kind == "result":
            return ended, damage_a_file(folder / "out", fault)
        return ended, None

    def _unseen(self, folder: Path, damaged: Path) -> str:
        """What is wrong if `verify` calls a damaged result sound, or ends improperly; else nothing."""
        ended = _end_of(_process(["verify", str(folder / "out"), "--quiet"], {}))
        if not ended.proper:
            return ended.said
        if ended.code == 0 and (damaged.suffix == ".safetensors" or damaged.name in VOUCHED):
            return f"verify calls a result sound whose {damaged.name} is damaged"
        return ""

    def _same(self, folder: Path) -> bool:
        return _contents(folder / "out") == self._expected

    def _start(self, folder: Path, environment: dict[str, str], workers: int = 1) -> "subprocess.Popen[str]":
        arguments = ["convert", str(self._model), str(folder / "out"), *self._options, "--quiet"]
        return _process(arguments, environment, workers)

    def _preload(self, folder: Path, **environment: str) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "FAULTS_ROOT": str(folder), **environment}


class _Disk:
    """A small file system in memory."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        options = f"size={size},mode=700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "faults", str(folder)], check=True)

    def grow(self) -> None:
        """Make room, as somebody would who finds the disk full."""
        subprocess.run(["mount", "-o", "remount,size=4g", str(self._folder)], check=True)

    def close(self) -> None:
        """Remove it with what is in it."""
        subprocess.run(["umount", str(self._folder)], check=True)


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[_Disk | None]:
    """A disk of that size at the folder; none where the size is 0."""
    if not size:
        yield None
        return
    disk = _Disk(folder, size)
    try:
        yield disk
    finally:
        disk.close()


def _may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _disk(Path(folder), 65536):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def build(root: Path) -> Path:
    """The library that makes calls fail."""
    source, library = Path(__file__).with_name("faulty_io.c"), root / "faulty_io.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def _work(folder: Path) -> Path:
    return folder / "out.work"


def worker(torchrun: int, rank: int) -> int:
    """The process of a rank, a child of torchrun; its only other child is the other rank."""
    for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise RuntimeError(f"torchrun ({torchrun}) has no worker of rank {rank}")


def _process(
    arguments: Sequence[str], environment: dict[str, str], workers: int = 1
) -> "subprocess.Popen[str]":
    """The command as processes with one thread each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    return subprocess.Popen(
        [
            sys.executable,
            *(torchrun if workers > 1 else []),
            *("-m", "dbrx_quant.scripts.cli.main", *arguments),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def _end_of(process: "subprocess.Popen[str]") -> Ended:
    try:
        _, said = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
        return Ended(-1, f"still running after {TIMEOUT} s; {said}")
    return Ended(process.returncode, said.strip())


def _contents(folder: Path) -> dict[str, str]:
    """Checksums of all files below a folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def kinds(count: int, among: Collection[str] = SHARES) -> list[str]:
    """The kinds of so many faults, in their shares, the rarest first."""
    total, due = sum(SHARES[kind] for kind in among), list[str]()
    for kind in sorted(among, key=lambda kind: SHARES[kind]):
        due += [kind] * max(1, round(count * SHARES[kind] / total))
    return due


def _kinds(text: str) -> list[str]:
    """Kinds on the command line."""
    found = text.split(",")
    if unknown := [kind for kind in found if kind not in SHARES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SHARES)}")
    return found


@quiet_on_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials; 1 if one was lost or wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", type=Path, help="a small model's folder")
    parser.add_argument("--faults", metavar="N", type=positive, default=200, help="(default: %(default)s)")
    parser.add_argument(
        "--kinds", metavar="KIND[,KIND...]", type=_kinds, default=list(SHARES), help="(default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--jobs", metavar="N", type=positive, default=1, help="trials side by side")
    parser.add_argument("--log", metavar="FILE", type=Path, required=True, help="gets a line for each trial")
    parser.add_argument(
        "--folder", metavar="DIR", type=Path, help="for the trials (default: a temporary one)"
    )
    arguments, options = parser.parse_known_args(argv)
    chosen = kinds(arguments.faults, arguments.kinds)
    if "full" in chosen and not _may_mount():
        say("no disks of a chosen size: mounting them is not allowed here; these trials are left out")
        chosen = [kind for kind in chosen if kind != "full"]
    root = Path(tempfile.mkdtemp(prefix="faults-", dir=arguments.folder))
    bench, counts = Bench(arguments.model, options, root), Counter[tuple[str, str]]()
    say(f"undisturbed: {bench.reference}")
    faults = [draw_fault(kind, bench.reference, arguments.seed + n) for n, kind in enumerate(chosen)]
    with ThreadPoolExecutor(arguments.jobs) as pool, arguments.log.open("a", encoding="utf-8") as log:
        for result in pool.map(bench.trial, faults, range(len(faults))):
            log.write(json.dumps(result) + "\n")
            log.flush()
            counts[str(result["kind"]), str(result["verdict"])] += 1
    verdicts = ("sound", "refused", "LOST", "WRONG")
    rows = [[kind, *(str(counts[kind, verdict]) for verdict in verdicts)] for kind in dict.fromkeys(chosen)]
    print_table(f"{len(faults)} faults", ["fault", *verdicts], rows)
    bad = sum(counts[kind, verdict] for kind in SHARES for verdict in ("LOST", "WRONG"))
    if not bad:
        shutil.rmtree(root)
    else:
        say(f"the folders of the {bad} bad trials are in {root}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
