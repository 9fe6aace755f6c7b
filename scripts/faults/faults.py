"""The faults that can happen to a run of a program, drawn from a seed."""

import errno
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

# In the order of the list in faulty_io.c.
CALLS = ("open", "write", "read", "fsync", "rename", "mkdir", "unlink", "truncate", "map")
ERRORS = {
    "open": (errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.EROFS, errno.EIO),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT, 0),
    "read": (errno.EIO, 0),
    "fsync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.EACCES, errno.ENOSPC),
    "mkdir": (errno.ENOSPC, errno.EACCES),
    "unlink": (errno.EACCES, errno.EIO),
    "truncate": (errno.ENOSPC, errno.EIO),
    "map": (errno.ENOMEM, errno.EACCES),
}
DAMAGES = (
    "bit flipped",
    "cut",
    "emptied",
    "removed",
    "lengthened",
    "garbled",
    "other file's content",
    "folder",
)


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run was like.

    Attributes:
        seconds: from the moment at which its work folder was there.
        calls: to the system below its folder, by kind.
        peak_bytes: that its files took.
    """

    seconds: float
    calls: dict[str, int]
    peak_bytes: int


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: `kill`, `stop` (SIGTERM), `worker` (one of two is killed), `error`, `full`, `work` or `result`.
        after: seconds behind the appearance of the work folder, of a signal.
        rank: of the worker that is killed.
        environment: of a process whose calls fail.
        size: of the disk, in bytes.
        damage: one of DAMAGES.
        seed: of the choice of the file to damage, and of the place in it.
    """

    kind: str
    after: float = 0.0
    rank: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    size: int = 0
    damage: str = ""
    seed: int = 0

    def __str__(self) -> str:
        if self.kind in ("kill", "stop"):
            return f"{self.kind} after {self.after:.2f} s"
        if self.kind == "worker":
            return f"rank {self.rank} of 2 killed after {self.after:.2f} s"
        if self.kind == "error":
            number = int(self.environment["FAULTS_ERRNO"])
            what = errno.errorcode[number] if number else "half of what was asked for"
            stays = " and all later ones" if "FAULTS_STAYS" in self.environment else ""
            return f"{self.environment['FAULTS_OP']} number {self.environment['FAULTS_AT']}{stays}: {what}"
        if self.kind == "full":
            return f"disk of {self.size} bytes"
        return f"{self.damage} ({self.kind}, after {self.after:.2f} s)" if self.after else self.damage


def draw_fault(kind: str, reference: Reference, seed: int) -> Fault:
    """A fault of that kind; the same seed gives the same one."""
    chance = random.Random(f"{kind} {seed}")
    after = chance.uniform(0, reference.seconds)
    if kind in ("kill", "stop"):
        return Fault(kind, after)
    if kind == "worker":
        return Fault(kind, after, rank=chance.randrange(2))
    if kind == "full":
        return Fault(kind, size=int(chance.uniform(0.02, 0.98) * reference.peak_bytes) // 4096 * 4096 + 65536)
    if kind in ("work", "result"):
        damage = chance.choice(DAMAGES)
        return Fault(kind, after if kind == "work" else 0.0, damage=damage, seed=seed)
    call = chance.choice([call for call in CALLS if reference.calls.get(call)])
    environment = {
        "FAULTS_OP": call,
        "FAULTS_AT": str(chance.randint(1, reference.calls[call])),
        "FAULTS_ERRNO": str(chance.choice(ERRORS[call])),
    }
    if environment["FAULTS_ERRNO"] != "0" and chance.random() < 0.5:
        environment["FAULTS_STAYS"] = "1"
    return Fault(kind, environment=environment)


def damage_a_file(folder: Path, fault: Fault) -> Path | None:
    """Damage one file below a folder; which one, or None where there is none."""
    chance = random.Random(f"file {fault.seed}")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    if not files:
        return None
    path, data = chance.choice(files), b""
    if fault.damage in ("bit flipped", "cut", "lengthened", "garbled"):
        data = path.read_bytes()
    at = chance.randrange(max(1, len(data)))
    match fault.damage:
        case "bit flipped":
            path.write_bytes(
                data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :] if data else b""
            )
        case "cut":
            path.write_bytes(data[:at])
        case "emptied":
            path.write_bytes(b"")
        case "removed":
            path.unlink()
        case "lengthened":
            path.write_bytes(data + b"\0")
        case "garbled":
            path.write_bytes(data[:at] + bytes(255 - byte for byte in data[at : at + 512]) + data[at + 512 :])
        case "other file's content":
            path.write_bytes(chance.choice([file for file in files if file != path] or [path]).read_bytes())
        case "folder":
            path.unlink()
            path.mkdir()
        case _:
            raise ValueError(f"no damage is called {fault.damage}")
    return path


def bytes_below(folder: Path) -> int:
    """What the files below a folder take."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:  # renamed or removed while we look
                continue
    return total
