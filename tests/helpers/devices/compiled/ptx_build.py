"""Builds csrc/cuda for one target with nvcc, host code and PTX in one go, under build/ptx."""

import fcntl
import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from places import CSRC

BUILD = CSRC.parent / "build" / "ptx"
STUB = Path(__file__).with_name("runtime_stub.cpp")
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-O0")
INCLUDES = tuple(f"-I{CSRC / folder}" for folder in ("include", "common", "cuda"))
JOBS = 2

_failed: dict[Path, str] = {}  # what did not compile: it takes minutes to find out again


@dataclass(frozen=True)
class Built:
    """What nvcc made for a target: the library of the host code, and the PTX of each source."""

    target: int
    library: Path
    ptx: tuple[Path, ...]

    def texts(self):
        return [path.read_text(encoding="utf-8") for path in self.ptx]


def why_not():
    """Why nothing can be built here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on the path"
    return None if shutil.which("g++") else "g++ is not on the path"


def build(target):
    """The build for compute capability `target`, such as 80.

    Raises:
        RuntimeError: nvcc does not compile the sources for it; the message is nvcc's.
    """
    sources = sorted((CSRC / "cuda").rglob("*.cu"))
    headers = [path for f in ("cuda", "common", "include") for path in sorted((CSRC / f).rglob("*.*h"))]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    state = hashlib.sha256(f"{FLAGS} {target} {version}".encode())
    for path in (*sources, *headers, STUB):
        state.update(path.read_bytes())
    folder = BUILD / f"{target}-{state.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libdbrxq_cuda.so"
    with (folder / "lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (said := _failed.get(folder)) is not None:
            raise RuntimeError(said)
        if not library.is_file():
            try:
                with ThreadPoolExecutor(JOBS) as pool:
                    objects = list(pool.map(lambda source: _compile(source, target, folder), sources))
                _link(objects, library)
            except RuntimeError as error:
                _failed[folder] = str(error)
                raise
    return Built(target, library, tuple(sorted(folder.glob("*/*.ptx"))))


def _compile(source, target, folder):
    own = folder / "-".join(source.relative_to(CSRC / "cuda").with_suffix("").parts)
    own.mkdir(exist_ok=True)
    made = own / "host.o"
    capability = f"arch=compute_{target},code=compute_{target}"
    command = [
        "nvcc",
        *FLAGS,
        *INCLUDES,
        "-gencode",
        capability,
        "--keep",
        "--keep-dir",
        own,
        "-c",
        source,
        "-o",
        made,
    ]
    _run(command, f"{source.name} for compute capability {target}")
    for path in own.iterdir():
        if path.suffix not in (".ptx", ".o"):
            path.unlink()
    return made


def _link(objects, library):
    toolkit = [f"-I{path}" for path in _toolkit_includes()]
    stub = library.with_name("runtime_stub.o")
    _run(["g++", "-std=c++17", "-O1", "-fPIC", *toolkit, "-c", STUB, "-o", stub], STUB.name)
    partial = library.with_suffix(".partial")
    _run(
        ["g++", "-shared", "-Wl,-z,defs", *objects, stub, "-o", partial],
        "linking with the stub of the CUDA runtime",
    )
    partial.rename(library)


def _toolkit_includes():
    """The folders of the toolkit's headers, as nvcc itself finds them."""
    said = subprocess.run(
        ["nvcc", "--dryrun", "-c", STUB], capture_output=True, text=True, check=False
    ).stderr
    found = [line.split('"-I', 1)[1] for line in said.splitlines() if "INCLUDES=" in line and '"-I' in line]
    return [part.strip().strip('"') for part in found[0].split('"-I')] if found else []


def _run(command, what):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr.strip() or done.stdout.strip()}")
