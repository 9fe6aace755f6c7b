"""The command line of vLLM's own server for an EXL2 folder."""

import importlib.util
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

_SERVER = (
    "vllm.entrypoints.openai.api_server"  # as a module: not every build of vLLM brings a command that runs
)
_KEY = "VLLM_API_KEY"
_NO_STATISTICS = "VLLM_NO_USAGE_STATS"  # vLLM sends some of its users' otherwise


def require_vllm() -> None:
    """Raise ImportError, which says what to install, unless vLLM is there."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed in this environment: pip install 'dbrx-quant[vllm]' for NVIDIA's GPUs; "
            "docs/serving.md says what there is for CPUs"
        )


def server_command(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    context: int | None,
    on_cpu: bool,
    options: str,
) -> list[str]:
    """The command line.

    Args:
        folder: the model.
        name: what clients call it.
        host: where to listen.
        port: likewise.
        context: tokens of prompt and answer; None: the model's own.
        on_cpu: vLLM is built for CPUs: half precision is slow there, so activations are float32.
        options: further ones for vLLM, as a shell has them; they win over those that are set here.

    Raises:
        ValueError: the options end inside of quotes.
    """
    command = [sys.executable, "-m", _SERVER, "--model", str(folder), "--served-model-name", name]
    command += ["--host", host, "--port", str(port)]
    if context is not None:
        command += ["--max-model-len", str(context)]
    if on_cpu:
        command += ["--dtype", "float32"]
    try:
        return command + shlex.split(options)
    except ValueError as error:
        raise ValueError(f"--vllm-options {options!r}: {error}") from None


def server_environment(environment: Mapping[str, str], api_key: str | None) -> dict[str, str]:
    """The server's environment: without statistics, and with the clients' key, which nobody sees here."""
    made = {_NO_STATISTICS: "1", **environment}
    return made if api_key is None else {**made, _KEY: api_key}
