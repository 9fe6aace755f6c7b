"""The shards of a result that is being made: each is written when its linears are finished, which then leave.

A finished linear is a file of the work folder until the last shard that has a part of it is written, so that
the work folder holds about one shard's linears and never the result twice. What is done is told by notes in
the work folder, one a shard: its checksum, and the facts of its linears, whose files are gone. The order

    shard into the result's folder → note → the linears' files are removed

makes a kill at any moment harmless: a shard without a note is written again from the files, files beside a
note are removed. Where shard or note are damaged, its linears count as unfinished, and must come out as they
were: the linears after them were solved on what they decoded to.
"""

import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.exl2.format import GroupMap
from dbrx_quant.runtime.families.facts import Architecture, LinearSpec
from dbrx_quant.runtime.files.atomic import remove_leftovers, write_text
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_file import JsonFile
from dbrx_quant.runtime.files.sealed import flush_seal, remove, seal_again, sha256
from dbrx_quant.runtime.files.watched import ChangedError, WatchedFile
from dbrx_quant.runtime.folder.checksums import Checksum
from dbrx_quant.runtime.shards.linear_files import LinearFiles
from dbrx_quant.runtime.shards.plan import Shard, plan_shards
from dbrx_quant.runtime.shards.write import (
    check_floats,
    check_room,
    rounding_notes,
    withdraw,
    write_lists,
    write_shard,
)

_FOLDER = "shards"
_REMEDY = "start over with --resume never"
_FILE = JsonFile("a note of a finished shard", version=1, remedy=_REMEDY, sealed=True)


@dataclass(frozen=True)
class Facts:
    """What is known of a finished linear: its loss tr(E^T H E) and its energy tr(W^T H W)."""

    loss: float
    energy: float


@dataclass(frozen=True)
class _Note:
    """What is known of a shard that has been written, and is as it was."""

    checksum: Checksum
    linears: Mapping[str, Facts]
    watched: WatchedFile


class FillingShards(LinearFiles):
    """Finished linears, in files of a work folder or in the shards that they have filled.

    Args:
        work: the work folder's part for this result.
        out: the result's folder.
        architecture: what the model consists of.
        checkpoint: the original, for the tensors kept in 16 bits.
        groups: linear → its group map.
        max_shard_bytes: limit of a shard's size.
        replaced: names of files in `out`, shards and their lists aside, that go with an earlier result when
            the first shard of this one comes.

    Raises:
        ValueError: the shards were begun with another limit.
        CheckpointError: the notes are of other shards, or a 16-bit tensor does not fit float16.
        OSError: the disk has no room for the shards that are missing.
    """

    def __init__(
        self,
        work: Path,
        out: Path,
        architecture: Architecture,
        checkpoint: Checkpoint,
        groups: Mapping[str, GroupMap],
        max_shard_bytes: int,
        replaced: Sequence[str] = (),
    ) -> None:
        super().__init__(work / "linears")
        self._work, self._out, self._checkpoint = work, out, checkpoint
        self._limit, self._replaced = max_shard_bytes, tuple(replaced)
        self._shards = plan_shards(architecture, groups, max_shard_bytes)
        self._holders: dict[str, list[Shard]] = {}
        for shard in self._shards:
            for spec in shard.linears:
                self._holders.setdefault(spec.name, []).append(shard)
        self._rounding = check_floats(architecture, checkpoint)
        self._withdrawn = False
        remove_leftovers(out)
        check_begun(work, max_shard_bytes)
        for path in set(_notes_in(work)) - {self._note_path(shard) for shard in self._shards}:
            raise _foreign(path)
        self._notes: dict[str, _Note] = {}
        for shard in self._shards:
            if note := self._sound_note(shard):
                self._notes[shard.name] = note
        for shard in self._shards:
            self._leave(shard)
        check_room(out, self._missing(), self._notes)

    @property
    def facts(self) -> dict[str, Facts]:
        """Those of all linears in shards, by name."""
        return {name: facts for note in self._notes.values() for name, facts in note.linears.items()}

    def unfinished(self, specs: Sequence[LinearSpec]) -> list[LinearSpec]:
        """The given linears that are neither a file nor in shards."""
        return [spec for spec in specs if not self._is_finished(spec)]

    def check(self, specs: Iterable[LinearSpec]) -> None:
        """Raise CheckpointError unless the files or shards of all these linears are as they were written."""
        for spec in specs:
            if self._is_in_shards(spec):
                for shard in self._holders[spec.name]:
                    self._check(shard)
            else:
                super().check([spec])

    def stored(self, spec: LinearSpec) -> dict[str, Tensor]:
        """The tensors of a linear as stored, by suffix.

        Raises:
            CheckpointError: its file or shard is not as it was written.
        """
        if not self._is_in_shards(spec):
            return super().stored(spec)
        self.check([spec])
        tensors = {}
        for shard in self._holders[spec.name]:
            with safe_open(self._out / shard.name, "pt") as opened:
                for tensor in shard.tensors:
                    if tensor.owner.name == spec.name:
                        tensors[tensor.suffix] = opened.get_tensor(tensor.name)
        return tensors

    def fill(self, under_way: Collection[str] = ()) -> None:
        """Write every shard whose linears are all finished, and remove their files.

        Args:
            under_way: names of linears whose files others may be writing or reading; their shards wait.

        Raises:
            CheckpointError: a file is not as it was written.
            OSError: the disk is full.
        """
        for shard in self._missing():
            if not any(spec.name in under_way for spec in shard.linears) and all(
                self._is_finished(spec)
                for spec in reversed(shard.linears)  # the last come last
            ):
                self._write(shard)
                self._leave(shard)

    def finish(self) -> list[str]:
        """Write what tells that the shards are complete: index and checksums.

        Returns:
            What readers of the report should know of the 16-bit tensors, a sentence each.

        Raises:
            CheckpointError: a shard is missing, or not as it was written.
        """
        if missing := self._missing():
            raise CheckpointError(f"{self._out / missing[0].name}: has not been written")
        for shard in self._shards:
            self._check(shard)
        self._withdraw()
        checksums = {shard.name: self._notes[shard.name].checksum for shard in self._shards}
        write_lists(self._out, self._shards, checksums, self._rounding)
        return rounding_notes(self._rounding)

    def forget(self) -> None:
        """Remove what the work folder has of them, once the result is finished."""
        for folder in (self.folder, self._work / _FOLDER):
            if folder.exists():
                shutil.rmtree(folder)

    def _missing(self) -> list[Shard]:
        return [shard for shard in self._shards if shard.name not in self._notes]

    def _is_in_shards(self, spec: LinearSpec) -> bool:
        return all(shard.name in self._notes for shard in self._holders[spec.name])

    def _is_finished(self, spec: LinearSpec) -> bool:
        return self._is_in_shards(spec) or self.path(spec.name).exists()

    def _write(self, shard: Shard) -> None:
        super().check(shard.linears)
        check_room(self._out, [shard], self._notes)
        self._withdraw()
        checksum = write_shard(self._out, shard, self._checkpoint, self.folder)
        facts = {spec.name: self._facts(spec) for spec in shard.linears}
        self._write_note(shard, checksum, facts)
        self._notes[shard.name] = _Note(checksum, facts, WatchedFile(self._out / shard.name))

    def _leave(self, shard: Shard) -> None:
        """Remove the files of linears that are in shards."""
        for spec in shard.linears:
            if self._is_in_shards(spec):
                remove(self.path(spec.name))

    def _withdraw(self) -> None:
        """Remove an earlier result, once."""
        if not self._withdrawn:
            withdraw(self._out, self._notes, self._replaced)
            self._withdrawn = True

    def _facts(self, spec: LinearSpec) -> Facts:
        with safe_open(self.path(spec.name), "pt") as opened:
            metadata = opened.metadata()
        return Facts(float(metadata["loss"]), float(metadata["energy"]))

    def _check(self, shard: Shard) -> None:
        try:
            self._notes[shard.name].watched.check()
        except ChangedError:  # which says that the original has changed
            raise CheckpointError(
                f"{self._out / shard.name}: not as it was written; run the same command again, which makes "
                "its linears anew"
            ) from None

    def _note_path(self, shard: Shard) -> Path:
        return self._work / _FOLDER / f"{Path(shard.name).stem}.json"

    def _write_note(self, shard: Shard, checksum: Checksum, linears: Mapping[str, Facts]) -> None:
        path = self._note_path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {name: vars(one) for name, one in linears.items()}
        content = {"max_shard_bytes": self._limit, "linears": facts, **vars(checksum)}
        write_text(path, _FILE.text(content))
        seal_again(path)
        flush_seal(path)  # before the files go that it stands for

    def _sound_note(self, shard: Shard) -> _Note | None:
        """The note of a shard that has been written, if it is still as it was."""
        note, path = self._note_path(shard), self._out / shard.name
        try:
            fields = _FILE.read(note)
        except FileNotFoundError:
            return None
        checksum = Checksum(fields.text("sha256"), fields.integer("size"))
        facts = {
            name: Facts(one.number("loss"), one.number("energy")) for name, one in fields.objects("linears")
        }
        if checksum.size != shard.size or facts.keys() != {spec.name for spec in shard.linears}:
            raise _foreign(note)
        watched = WatchedFile(path)
        if path.is_file() and sha256(path) == checksum.sha256:
            return _Note(checksum, facts, watched)
        print(f"notice: {path}: not as it was written; its linears are made anew", file=sys.stderr)
        note.unlink()  # its checksum stays, for `seal_again`
        return None


def check_begun(work: Path, max_shard_bytes: int) -> None:
    """Raise ValueError if shards of a result were begun with another limit of their size.

    Args:
        work: the work folder's part for this result.
        max_shard_bytes: the limit.
    """
    for path in _notes_in(work):
        begun = _FILE.read(path).integer("max_shard_bytes", 1)
        if begun != max_shard_bytes:
            raise ValueError(
                f"{work}: its first shards were written with a --max-shard-size of {begun} bytes, now it is "
                f"{max_shard_bytes}; give the earlier one, another --work-dir, or --resume never to discard "
                "that work"
            )


def is_begun(work: Path) -> bool:
    """Whether shards of a result have been written."""
    return (work / _FOLDER).exists()


def _notes_in(work: Path) -> list[Path]:
    return sorted((work / _FOLDER).glob("*.json"))


def _foreign(note: Path) -> CheckpointError:
    return CheckpointError(f"{note}: of another shard than those to come; {_REMEDY}")
