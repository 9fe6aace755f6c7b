"""Conversions by several processes, and what is done to them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dbrx_quant.scripts.faults.inject import worker

COMMAND = ["-m", "dbrx_quant.scripts.cli.main"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--shutdown-timeout", "10"]


def environment(**more):
    """That of a worker: one thread, and none of the variables that torchrun sets."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in more.items()}}


def convert_words(model, out, tokens, *more):
    words = ["convert", str(model), str(out), "--calibration", str(tokens), "--quiet"]
    return [*words, "--bpw", "3.0,4.0", "--max-shard-size", "250kB", *more]


def torchrun(count, words, *options, **more):
    """The command by so many workers of one machine."""
    given = [*TORCHRUN, "--nproc-per-node", str(count), *options, *COMMAND, *words]
    return _started(given, None, environment(**more))


def by_hand(rank, count, port, words, folder, through=(), **more):
    """One of the workers, as it is started where there is no torchrun; `through` another command."""
    told = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
    return _started([*through, sys.executable, *COMMAND, *words], folder, environment(**told))


def alone(words):
    return _started([sys.executable, *COMMAND, *words], None, environment())


def _started(words, folder, environment):
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=folder, env=environment)


def finished(process):
    """The exit code, stdout and stderr of a process."""
    stdout, stderr = process.communicate(timeout=600)
    return process.returncode, stdout, stderr


def succeed(*processes):
    for process in processes:
        code, _, stderr = finished(process)
        assert code == 0, stderr


def when(process, folder, pattern, count):
    """Wait until there are so many files of a pattern, while a process runs."""
    while sum(1 for _ in Path(folder).glob(pattern)) < count:
        assert process.poll() is None, finished(process)[2]
        time.sleep(0.004)


def kill_worker(process, rank, signal_number=signal.SIGKILL):
    os.kill(worker(process.pid, rank), signal_number)


def contents(folder):
    """Name → bytes of all files in a folder, those below included."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def different(folder, expected):
    """The names of files that are not as in another folder."""
    found, wanted = contents(folder), contents(expected)
    return sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
