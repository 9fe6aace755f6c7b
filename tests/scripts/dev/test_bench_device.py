"""The bench of a conversion's steps takes each of them on the CPU, and on a device beside it."""

import json

import pytest
from far_device import far_device

from dbrx_quant.scripts.dev import bench_device

SMALL = ["--hidden", "64", "--ffn", "96", "--tokens", "1100"]


def run(capsys, *words):
    code = bench_device.main([*words, *SMALL])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_every_step_has_its_seconds_on_both(capsys):
    with far_device():
        code, out, _ = run(capsys, "--device", "lazy", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["seconds"].keys() == {"cpu", "lazy"}
    assert list(found["seconds"]["cpu"]) == list(found["seconds"]["lazy"])
    assert all(time > 0 for steps in found["seconds"].values() for time in steps.values())


def test_the_cpu_alone_has_one_column(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert "repair of the down projection" in out
    assert "peak memory" not in out


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_no_such_device_is_an_exit_code(capsys, device):
    code, out, err = run(capsys, "--device", device)
    assert (code, out) == (2, "")
    assert f"device {device}: torch cannot compute there" in err
