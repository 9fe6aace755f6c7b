"""The small files beside the weights that go with a model: licence, notice, README, vocabulary files."""

from dataclasses import dataclass
from pathlib import Path

from dbrx_quant.quantize.output.record import RECORD_NAME
from dbrx_quant.runtime.evaluation.record import EVALUATION_NAME
from dbrx_quant.runtime.files.atomic import write_parts
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.links import leaves
from dbrx_quant.runtime.folder.checksums import CHECKSUMS_NAME
from dbrx_quant.runtime.tokenizer.fix import TOKENIZER_FILES

LARGEST_BYTES = 64 << 20

_OWN = {
    "config.json",
    "generation_config.json",
    "measurement.json",
    "strategy.json",
    CHECKSUMS_NAME,
    EVALUATION_NAME,
    RECORD_NAME,
    *TOKENIZER_FILES,
}
_WEIGHTS = {
    *(".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz", ".npy"),
    *(".pkl", ".pickle", ".ot", ".tflite", ".mlmodel"),
}


@dataclass(frozen=True)
class CopiedFiles:
    """What became of the source's side files.

    Attributes:
        copied: names of the files now in the output.
        skipped: name → why it was left behind.
    """

    copied: tuple[str, ...]
    skipped: dict[str, str]


def copy_side_files(source: Path, out: Path) -> CopiedFiles:
    """Copy what belongs to the model and is not a weight, byte for byte.

    Left behind, each with its reason: weights in any form and their indexes (a stale index makes readers look
    for tensors that are gone), Python code (it would run with trust_remote_code, describes the unquantized
    model, and is not needed), files that this converter writes itself, files over 64 MB, hidden files (the
    Hub makes its own .gitattributes), subfolders, and links out of the folder, which may point to anything.

    Args:
        source: the original's folder.
        out: the quantized checkpoint's folder; it exists.

    Raises:
        CheckpointError: a file cannot be read.
        OSError: the output cannot be written.
    """
    copied: list[str] = []
    skipped: dict[str, str] = {}
    for path in sorted(source.iterdir()):
        reason = _reason_to_skip(path)
        if reason:
            skipped[path.name] = reason
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        write_parts(out / path.name, (content,))
        copied.append(path.name)
    return CopiedFiles(tuple(copied), skipped)


def _reason_to_skip(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if path.is_dir():
        return "a subfolder"
    if not path.is_file():
        return "not a regular file"
    if path.name.startswith("."):
        return "a hidden file"
    if leaves(path) and suffix not in _WEIGHTS:
        return f"a link to {path.readlink()}, outside of the folder"
    if path.name in _OWN:
        return "written anew"
    if path.name.endswith(".index.json"):
        return "an index of the source's weights"
    if suffix in _WEIGHTS:
        return "weights"
    if suffix in (".py", ".pyc"):
        return "remote code, not needed by the quantized model"
    if path.stat().st_size > LARGEST_BYTES:
        return f"larger than {LARGEST_BYTES >> 20} MB"
    return None
