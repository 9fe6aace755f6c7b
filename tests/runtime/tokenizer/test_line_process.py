"""Whatever a child does, its parent gets an answer or none, in time, and outlives it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dbrx_quant.runtime.tokenizer import line_process
from dbrx_quant.runtime.tokenizer.line_process import LineProcess

# A child that does what it is asked to: its requests are Python code.
PROGRAM = r"""
import json, os, subprocess, sys, time

def say(text):
    sys.stdout.write(text)
    sys.stdout.flush()

def answer():
    say(json.dumps({"pid": os.getpid()}) + "\n")

sys.stdin.readline()
answer()
for line in sys.stdin:
    exec(json.loads(line))
"""
HANG = "time.sleep(1000)"
LONG = 120  # seconds; nothing that is answered takes it


@pytest.fixture
def process(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(line_process, "_PROGRAM", program)
    made = LineProcess(lambda: "null", 256)
    yield made
    made.close()


def ask(process, code, seconds=LONG):
    return process.exchange(json.dumps(code), seconds)


def gone(pid):
    """Whether a process has ended, or does within a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # and nobody has asked for its status
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("code", "seconds"),
    [
        ("os._exit(0)", LONG),
        ("say('{'); os._exit(0)", LONG),
        ("os.close(1)", LONG),
        ("say('{'); os.kill(os.getpid(), 9)", LONG),
        (HANG, 0.3),
        (f"say('{{'); {HANG}", 0.3),
        ("while True: say('x' * 1000)", 0.3),
        ("subprocess.Popen(['sleep', '9']); say('{'); os._exit(0)", 0.3),  # holds its stdout, as a fork may
    ],
)
def test_a_child_that_gives_no_answer_is_ended_and_the_next_answers(process, code, seconds):
    first = ask(process, "answer()")["pid"]
    assert ask(process, code, seconds) is None
    assert gone(first)
    second = ask(process, "answer()")["pid"]
    assert second not in (first, os.getpid())
    assert ask(process, "answer()")["pid"] == second


def test_long_lines_pass_both_ways(process):
    assert ask(process, f"text = {'x' * 5_000_000!r}; say(json.dumps({{'n': text}}) + '\\n')") == {
        "n": "x" * 5_000_000
    }


def test_a_child_that_does_not_read_keeps_nobody_waiting(process, monkeypatch):
    line_process._PROGRAM.write_text(f"import time; {HANG}")
    monkeypatch.setattr(line_process, "_START_SECONDS", 0.3)
    monkeypatch.setattr(process, "_first", lambda: "x" * 5_000_000)
    assert ask(process, "answer()") is None
    assert process._child.returncode == -signal.SIGKILL


def test_a_child_that_was_killed_while_idle_costs_no_request(process):
    os.kill(ask(process, "answer()")["pid"], signal.SIGKILL)
    process._child.wait()
    assert ask(process, "answer()") is not None


def test_an_answer_that_was_not_waited_for_is_not_taken_for_the_next(process):
    def interrupt(*_):
        raise KeyboardInterrupt

    ask(process, "answer()")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            ask(process, "time.sleep(1); say('{\"late\": 1}\\n'); time.sleep(1000)")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ask(process, "answer()").keys() == {"pid"}


def test_closing_ends_an_exchange_and_every_further_one(process):
    child = ask(process, "answer()")["pid"]
    with ThreadPoolExecutor(1) as pool:
        hung = pool.submit(ask, process, HANG)
        while not process._lock().locked():
            time.sleep(0.01)
        process.close()
        assert hung.result(60) is None
    last = process._child.pid  # another one if it closed before the exchange had looked at its child
    assert gone(child)
    assert gone(last)
    process.start()
    assert process._child.pid == last
    assert ask(process, "answer()") is None


def test_a_fork_has_a_child_of_its_own_even_if_it_was_made_amid_an_exchange(process):
    def in_fork():
        pids.send(ask(process, "answer()")["pid"])
        process.close()

    child = ask(process, "answer()")["pid"]
    fork = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, process, "time.sleep(2); answer()")
        while not process._lock().locked():
            time.sleep(0.01)
        received, pids = fork.Pipe(duplex=False)
        forked = fork.Process(target=in_fork)
        forked.start()
        assert received.poll(60)
        own = received.recv()
        forked.join(60)
        assert forked.exitcode == 0
        assert waiting.result(60) == {"pid": child}
    assert own != child
    assert gone(own)
    assert ask(process, "answer()") == {"pid": child}


BUSY = json.dumps(
    {
        "messages": [],
        "template": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "variables": {},
        "most": None,
        "seconds": 1,
    }
)


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"], ids=["at exit", "killed"])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_no_child_outlives_its_parent(end, busy):
    script = f"""if True:
        import os
        from dbrx_quant.runtime.tokenizer.line_process import LineProcess

        process = LineProcess(lambda: "null", 256)
        assert "error" in process.exchange('{{"seconds": 1}}', 600)
        if {busy}:
            os.write(process._child.stdin.fileno(), {BUSY!r}.encode() + b"\\n")
        print(process._child.pid, flush=True)
        {end}
    """
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=LONG, check=False)
    assert gone(int(done.stdout))


def test_the_program_loads_neither_torch_nor_ours():
    process = LineProcess(lambda: "null", 256)
    try:
        process.exchange('{"seconds": 1}', LONG)
        mapped = Path(f"/proc/{process._child.pid}/maps").read_text()
    finally:
        process.close()
    assert "tokenizers" in mapped
    assert "torch" not in mapped
    assert "dbrx" not in mapped
