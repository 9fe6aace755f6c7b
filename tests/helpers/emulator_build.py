"""Builds csrc/cuda with csrc/emulator for the host, once a state of the sources, under build/emulator."""

import fcntl
import hashlib
import shutil
import subprocess

from places import CSRC

BUILD = CSRC.parent / "build" / "emulator"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",  # lines, for the sanitizers' reports
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
INCLUDES = tuple(f"-I{CSRC / folder}" for folder in (".", "include", "common", "cuda"))


def build(sanitized=False):
    """The path of the emulated library; None without a C++ compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    flags = (*FLAGS, *(SANITIZE if sanitized else ()))
    sources = sorted((CSRC / "cuda").rglob("*.cu"))
    sources += [path for ending in ("cu", "cpp") for path in sorted((CSRC / "emulator").glob(f"*.{ending}"))]
    headers = [p for f in ("cuda", "emulator", "common", "include") for p in sorted((CSRC / f).rglob("*.*h"))]
    state = hashlib.sha256(" ".join(flags).encode())
    for path in (*sources, *headers):
        state.update(path.read_bytes())
    folder = BUILD / state.hexdigest()[:16]
    library = folder / "libdbrxq_emulated.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _compile(compiler, flags, sources, library)
    return library


def _compile(compiler, flags, sources, library):
    folder, objects = library.parent, []
    for source in sources:
        objects.append(folder / f"{source.name}.o")
        command = [compiler, *flags, *INCLUDES, "-x", "c++", "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    partial = folder / f"{library.name}.partial"
    subprocess.run([compiler, *flags, "-shared", *objects, "-o", partial], check=True)
    partial.rename(library)
