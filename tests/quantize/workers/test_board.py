"""What workers tell each other, and whom they name when nothing comes."""

import threading

import pytest
import torch.distributed as dist

from dbrx_quant.quantize.workers.board import Board, WorkerError, patience
from dbrx_quant.quantize.workers.exchange import Exchange
from dbrx_quant.quantize.workers.joining import _compare
from dbrx_quant.quantize.workers.peers import Peers
from dbrx_quant.quantize.workers.ranks import is_helper, rank, size, speaker


@pytest.fixture
def boards(monkeypatch):
    monkeypatch.setenv("DBRXQ_WORKER_PATIENCE", "0.5")
    store = dist.HashStore()
    return [Board(store, number, 3) for number in range(3)]


def test_what_one_worker_puts_the_others_take_and_the_wait_is_counted(boards):
    first, second, _ = boards
    threading.Timer(0.2, first.put, ["key", {"a": [1, 2.5]}]).start()
    assert second.take("key", [0], "a key") == {"a": [1, 2.5]}
    assert second.waited > 0.1
    assert first.take("key", [1], "a key") == {"a": [1, 2.5]}
    assert first.waited == 0


def test_a_worker_that_gives_no_sign_is_named_with_what_it_does(boards):
    first, second, _ = boards
    second.note("solve, block 3, expert 1")
    with pytest.raises(WorkerError, match=r"rank 1 on \S+ gives no sign: solve, block 3, expert 1 since 20"):
        first.take("key", [1], "a key")
    with pytest.raises(WorkerError, match="rank 2 has not joined"):
        first.take("key", [2], "a key")


def test_signs_of_life_keep_patience(boards):
    first, second, _ = boards
    stop = threading.Event()

    def live():
        for step in range(12):
            second.note(f"step {step}")
            if stop.wait(0.1):
                return
        second.put("key", "at last")

    thread = threading.Thread(target=live)
    thread.start()
    try:
        assert first.take("key", [1], "a key") == "at last"
    finally:
        stop.set()
        thread.join()


def test_a_note_is_what_it_was_after_waiting(boards):
    first, second, _ = boards
    second.note("solve, block 0, expert 1")
    threading.Timer(0.1, first.put, ["key", None]).start()
    second.take("key", [0], "a key")
    assert first._note_of(1)["what"] == "solve, block 0, expert 1"


def test_the_first_worker_to_fail_is_told_to_all_that_wait(boards):
    first, second, third = boards
    second.fail(ValueError("no such tensor"))
    third.fail(ValueError("rank 1 has failed"))
    with pytest.raises(WorkerError, match=r"^rank 1 on \S+ has failed: no such tensor$"):
        first.take("key", [1], "a key")
    with pytest.raises(WorkerError, match=r"^rank 1 on"):
        first.check()


def test_a_stop_is_told_as_one(boards):
    boards[1].fail(KeyboardInterrupt())
    with pytest.raises(WorkerError, match=r"rank 1 on \S+ has failed: stopped by a signal"):
        boards[0].check()


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_patience_is_a_number_of_seconds(text, monkeypatch):
    monkeypatch.setenv("DBRXQ_WORKER_PATIENCE", text)
    with pytest.raises(ValueError, match=f"DBRXQ_WORKER_PATIENCE={text}: expected a number of seconds"):
        patience()
    monkeypatch.delenv("DBRXQ_WORKER_PATIENCE")
    assert patience() > 3600


def test_workers_that_compute_otherwise_are_refused_by_name(boards):
    own = {"threads (OMP_NUM_THREADS)": 1, "torch": "2.13.0", "model": {"files": ["5-abc"]}}
    boards[1].put("member/1", {"host": "left", "facts": own})
    boards[2].put("member/2", {"host": "right", "facts": {**own, "threads (OMP_NUM_THREADS)": 2}})
    with pytest.raises(WorkerError, match=r"rank 2 on right computes .*THREADS\) is 2, on rank 0 1$"):
        _compare(boards[0], own)
    boards[2].put("member/2", {"host": "right", "facts": {**own, "model": {"files": ["5-abd"]}}})
    with pytest.raises(WorkerError, match="rank 2 on right has another model"):
        _compare(boards[0], own)
    boards[2].put("member/2", {"host": "right", "facts": own})
    _compare(boards[0], own)


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "a/../../x.json"])
def test_a_file_of_another_worker_stays_in_the_work_folder(boards, name, tmp_path):
    with pytest.raises(WorkerError, match="no path in the work folder"):
        Exchange(boards[0], tmp_path, [1]).absolute(name)


def test_a_small_file_that_another_worker_tells_of_comes_with_its_text_where_folders_differ(boards, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    peers = [Peers(b, Exchange(b, folder, [1])) for b, folder in zip(boards, folders, strict=False)]
    folders[0].mkdir()
    (folders[0] / "x.json").write_text("{}\n")
    peers[0].announce(folders[0] / "x.json")
    peers[1].wait_for(folders[1] / "x.json")
    assert (folders[1] / "x.json").read_text() == "{}\n"
    assert (folders[1] / ".x.json.sha256").exists()


def test_a_process_is_alone_unless_torchrun_says_otherwise(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), size(), speaker(), is_helper()) == (0, 1, "", False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert (rank(), size(), speaker(), is_helper()) == (0, 1, "", False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (rank(), is_helper()) == (0, False)
    assert speaker().startswith("rank 0 on ")
    monkeypatch.setenv("RANK", "1")
    assert (rank(), is_helper()) == (1, True)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK=2: expected a number below WORLD_SIZE=2"):
        rank()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE=many: expected a whole number"):
        size()
