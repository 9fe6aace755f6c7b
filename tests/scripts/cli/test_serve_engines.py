"""`dbrx-quant serve --engine vllm`: what it refuses, and what it becomes."""

import os

import pytest
from quant_models import CONFIGS, build_quantized_folder

from dbrx_quant.runtime.vllm import command
from dbrx_quant.scripts.cli.main import USAGE, main


@pytest.fixture
def folder(tmp_path):
    return build_quantized_folder(CONFIGS["llama"](), tmp_path / "model").path


@pytest.fixture
def became(monkeypatch):
    """The arguments of the program that the process became."""
    made = []
    monkeypatch.setattr(command, "require_vllm", lambda: None)
    monkeypatch.setattr(os, "execve", lambda *arguments: made.extend(arguments))
    return made


@pytest.mark.parametrize(
    "option",
    [["--queue", "3"], ["--memory", "1GB"], ["--device", "cuda"], ["--allow-host", "a.b"], ["--json"]],
)
def test_what_vllm_has_nothing_like_is_refused(folder, capsys, option):
    assert main(["serve", str(folder), "--engine", "vllm", *option]) == USAGE
    assert f"{option[0]}: vLLM has nothing like it" in capsys.readouterr().err


def test_options_for_vllm_are_refused_without_it(folder, capsys):
    assert main(["serve", str(folder), "--vllm-options=--x"]) == USAGE
    assert "only with --engine vllm" in capsys.readouterr().err


def test_the_process_becomes_the_server_with_the_key_in_its_environment(folder, became):
    main(["serve", str(folder), "--engine", "vllm", "--port", "0", "--name", "n", "--api-key", "k"])
    program, line, environment = became
    assert line[:5] == [program, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    assert line[line.index("--served-model-name") + 1] == "n"
    assert int(line[line.index("--port") + 1]) > 0
    assert environment["VLLM_API_KEY"] == "k"
    assert "k" not in line


def test_an_unsound_folder_is_refused_before_vllm_starts(folder, became, capsys):
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    assert main(["serve", str(folder), "--engine", "vllm", "--port", "0"]) == 1
    assert "model.safetensors" in capsys.readouterr().err
    assert not became
