"""The command line and environment of vLLM's server."""

import importlib.util
import sys

import pytest

from dbrx_quant.runtime.vllm.command import require_vllm, server_command, server_environment


def command(**changes):
    given = {"name": "m", "host": "h", "port": 1, "context": None, "on_cpu": False, "options": ""}
    return server_command("folder", **given | changes)


def test_the_server_is_this_pythons_with_the_folder_and_its_name():
    assert command() == [
        sys.executable,
        *("-m", "vllm.entrypoints.openai.api_server", "--model", "folder", "--served-model-name", "m"),
        *("--host", "h", "--port", "1"),
    ]


def test_a_context_and_a_cpu_add_options_and_the_users_come_last():
    made = command(context=512, on_cpu=True, options="--dtype bfloat16 --x 'a b'")
    assert made[-8:] == ["--max-model-len", "512", "--dtype", "float32", "--dtype", "bfloat16", "--x", "a b"]


def test_open_quotes_in_options_are_an_error():
    with pytest.raises(ValueError, match="--vllm-options"):
        command(options="--x 'a")


def test_the_key_travels_in_the_environment_and_statistics_are_off_unless_wanted():
    assert server_environment({"A": "b"}, "key") == {
        "VLLM_NO_USAGE_STATS": "1",
        "A": "b",
        "VLLM_API_KEY": "key",
    }
    assert server_environment({"VLLM_NO_USAGE_STATS": "0"}, None) == {"VLLM_NO_USAGE_STATS": "0"}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_is_said_what_to_install():
    with pytest.raises(ImportError, match=r"pip install 'dbrx-quant\[vllm\]'"):
        require_vllm()
