"""`dbrx-quant repack`, and `--memory` of the verbs that run a model."""

import json
import re
import shutil

import pytest
from cli_runs import run
from tiny_output import make_output

from dbrx_quant.runtime.folder.repacked_file import REPACKED_NAME
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.library import _native


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_output(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def test_repack_writes_the_file_and_says_what_is_in_it(folder, capsys):
    code, out, _ = run(capsys, "repack", folder, "--quiet")
    assert code == 0
    assert re.fullmatch(rf"{folder}: wrote {REPACKED_NAME}: 21 linears, .* kB\n", out)
    first = (folder / REPACKED_NAME).read_bytes()
    (folder / REPACKED_NAME).write_bytes(b"damaged")
    code, out, _ = run(capsys, "repack", folder, "--json", "--quiet")
    assert json.loads(out) == {"file": REPACKED_NAME, "linears": 21, "bytes": len(first)}
    assert (folder / REPACKED_NAME).read_bytes() == first


def test_repack_needs_a_quantized_folder_and_the_native_kernels(folder, capsys, tmp_path, monkeypatch):
    code, _, err = run(capsys, "repack", tmp_path / "none")
    assert (code, "no such folder; repack writes into it" in err) == (1, True)
    code, _, err = run(capsys, "repack", folder.parent)
    assert code == 1
    assert "config.json" in err
    monkeypatch.setattr(_native, "why_unavailable", lambda: "there is no compiler")
    code, _, err = run(capsys, "repack", folder)
    assert (code, "cannot be used: there is no compiler" in err) == (1, True)


def test_generate_says_what_stays_in_memory_on_stderr_and_gives_the_same_text(folder, capsys):
    with use_activations("int8"):
        arguments = ["generate", folder, "What is", "--max-new-tokens", 4, "--quiet"]
        _, expected, _ = run(capsys, *arguments)
        code, out, err = run(capsys, *arguments, "--memory", "1MB")
        assert (code, out) == (0, expected)
        assert re.search(r"^all 0\.\d MB of weights stay in memory$", err, re.MULTILINE)
        code, _, err = run(capsys, *arguments, "--memory", "1000kB", "--device", "meta")
        assert code == 1
        assert "leave it out" in err


@pytest.mark.parametrize("verb", ["generate", "chat", "serve"])
def test_a_size_without_a_unit_is_not_taken(verb, folder, capsys):
    with pytest.raises(SystemExit):
        run(capsys, verb, folder, "--memory", "20")
    assert "for gigabytes write 20GB" in capsys.readouterr().err
