"""Any number of workers ends with the bytes of one process, wherever their files are and whoever dies."""

import os
import signal
import socket
import subprocess

import pytest
from small_models import save_model, save_random_tokens
from worker_runs import (
    alone,
    by_hand,
    convert_words,
    different,
    finished,
    kill_worker,
    succeed,
    torchrun,
    when,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of 4 experts a block and 4,096 weights a matrix, tokens, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("workers")
    save_model(folder / "model", "dbrx", std=0.2)
    save_random_tokens(folder / "tokens.safetensors", 16, 32)
    succeed(alone(words(folder, folder / "plain")))
    return folder


def words(place, out, *more):
    return convert_words(place / "model", out, place / "tokens.safetensors", *more)


def test_two_workers_write_the_bytes_of_one(place, tmp_path):
    succeed(torchrun(2, words(place, tmp_path / "out")))
    assert different(tmp_path / "out", place / "plain") == []
    assert not (tmp_path / "out.work" / ".exchange").exists()


def test_workers_without_a_shared_folder_send_each_other_their_files(place, tmp_path):
    """Each has a folder of its own; the result is rank 0's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    succeed(*(by_hand(i, 2, port, words(place, "out"), folder) for i, folder in enumerate(folders)))
    assert different(folders[0] / "out", place / "plain") == []
    assert [path for path in folders[1].rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_work_goes_on_with_another_number_of_workers(first, then, place, tmp_path):
    def start(count):
        given = words(place, tmp_path / "out")
        return alone(given) if count == 1 else torchrun(count, given)

    begun = start(first)
    when(begun, tmp_path, "out.work/3.0bpw-h6/linears/*.safetensors", 4)
    begun.send_signal(signal.SIGTERM)
    assert finished(begun)[0] != 0
    succeed(start(then))
    assert different(tmp_path / "out", place / "plain") == []


def test_an_error_of_a_worker_is_told_with_its_rank_and_ends_the_run(place, tmp_path):
    code, stdout, stderr = finished(torchrun(2, words(place, tmp_path / "out", "--max-memory", "1MB")))
    assert code != 0
    assert not stdout
    assert f"dbrx-quant: error: rank 0 on {socket.gethostname()}: " in stderr
    assert "--max-memory allows" in stderr


KILLED = {
    "at the start": (1, "job.json", 1),
    "measuring": (1, "measure/linears/*.json", 7),
    "measuring further": (2, "measure/linears/*.json", 20),
    "quantizing": (3, "3.0bpw-h6/linears/*.safetensors", 5),
    "quantizing the second target": (2, "4.0bpw-h6/linears/*.safetensors", 4),
    "rank 0 while measuring": (0, "measure/linears/*.json", 12),
    "rank 0 while quantizing": (0, "3.0bpw-h6/linears/*.safetensors", 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLED)
def test_torchrun_starts_workers_again_of_which_one_was_killed(moment, place, tmp_path):
    rank, pattern, count = KILLED[moment]
    running = torchrun(4, words(place, tmp_path / "out"), "--max-restarts", "1")
    when(running, tmp_path / "out.work", pattern, count)
    kill_worker(running, rank)
    succeed(running)
    assert different(tmp_path / "out", place / "plain") == []


@pytest.mark.slow
def test_a_worker_that_stalls_is_named_with_what_it_was_doing(place, tmp_path):
    running = torchrun(2, words(place, tmp_path / "out"), DBRXQ_WORKER_PATIENCE=20)
    when(running, tmp_path / "out.work", "measure/linears/*.json", 5)
    kill_worker(running, 1, signal.SIGSTOP)
    code, _, stderr = finished(running)
    assert code != 0
    host = socket.gethostname()
    assert f"error: rank 0 on {host}: rank 1 on {host} gives no sign: " in stderr
    assert " since 20" in stderr
    succeed(torchrun(2, words(place, tmp_path / "out", "--resume", "must")))
    assert different(tmp_path / "out", place / "plain") == []


def run(*given):
    return subprocess.run(given, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them, and no folder that both see."""
    names = [f"dbrxq-{os.getpid()}-{side}" for side in "ab"]
    try:
        run("ip", "netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need ip and root")
    try:
        run("ip", "netns", "add", names[1])
        run(*f"ip -n {names[0]} link add wire type veth peer name wire netns {names[1]}".split())
        for number, name in enumerate(names, 1):
            run(*f"ip -n {name} addr add 10.77.0.{number}/24 dev wire".split())
            for device in ("lo", "wire"):
                run(*f"ip -n {name} link set {device} up".split())
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_machines_with_nothing_but_a_network_between_them_write_the_bytes_of_one(place, tmp_path, hosts):
    for host in hosts:
        (tmp_path / host).mkdir()
    told = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "wire"}
    running = [
        by_hand(number, 2, 29500, words(place, "out"), tmp_path / host, ("ip", "netns", "exec", host), **told)
        for number, host in enumerate(hosts)
    ]
    succeed(*running)
    assert different(tmp_path / hosts[0] / "out", place / "plain") == []
