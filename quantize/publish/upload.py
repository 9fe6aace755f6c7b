"""Quantized folders onto the Hub: one branch each, then the card on main.

Whatever is already uploaded is found by its hash and not sent again, so that the same call resumes where an
earlier one was cut off; a branch changes in one commit, and at the end it is checked that everything arrived.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_quant.quantize.budget.frontier import frontier, rescaled
from dbrx_quant.quantize.measurement import MEASUREMENT_NAME, read_measurement
from dbrx_quant.quantize.publish.card import (
    PICTURE_NAME,
    branch_card,
    common_evaluation,
    evaluation_of,
    main_card,
)
from dbrx_quant.quantize.publish.client import Hub, HubError
from dbrx_quant.quantize.publish.pictures import SizePoint, error_curve_png
from dbrx_quant.quantize.publish.release import MAIN, Branch, Release, branch_files
from dbrx_quant.quantize.publish.repository import Remote, remote_files
from dbrx_quant.quantize.publish.source_card import CARD_NAME
from dbrx_quant.runtime.folder.checksums import read_checksums

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

Notify = Callable[[str], None]  # called with a line on what is going on

_CHUNK_BYTES = 16 << 20
_CURVE_POINTS = 40
_MARGIN_BPW = 0.5
_WEIGHTS = (".safetensors", ".safetensors.index.json")  # leftovers of an earlier upload would be loaded


@dataclass(frozen=True)
class Contents:
    """What a branch is going to hold.

    Attributes:
        name: of the branch.
        files: path in the repository → the file here.
        card: the text of its README.md.
        digests: path → SHA-256, where known.
    """

    name: str
    files: Mapping[str, Path]
    card: str
    digests: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """Size of all files and the card."""
        return sum(path.stat().st_size for path in self.files.values()) + len(self.card.encode())


@dataclass(frozen=True)
class Sent:
    """What was done to a branch.

    Attributes:
        branch: its name.
        sent: files that were sent.
        sent_bytes: their size.
        kept: number of files that were up already.
        removed: weights of an earlier upload that are gone now.
        commit: the branch's newest.
    """

    branch: str
    sent: tuple[str, ...]
    sent_bytes: int
    kept: int
    removed: tuple[str, ...]
    commit: str


def branch_contents(release: Release, branch: Branch, kept: str = "") -> Contents:
    """The files of a branch with weights."""
    folder = release.folders[branch.name]
    card = branch_card(release.repository, release.model, branch, kept)
    return Contents(
        branch.name, {name: folder / name for name in branch_files(folder)}, card, _digests(folder)
    )


def main_contents(release: Release, remote: Remote, folder: Path, notify: Notify) -> Contents:
    """The files of main; pictures are drawn into `folder`. With weights on main, theirs as well."""
    known = {branch.name: branch for branch in (*remote.others, *release.branches)}
    branches = sorted(known.values(), key=lambda branch: (branch.bpw, branch.name))
    files: dict[str, Path] = {}
    if MAIN in release.folders:
        files |= branch_contents(release, known[MAIN]).files
    home = release.folders[release.branches[0].name]
    files |= {name: home / name for name in release.model.term_files}
    if release.measurement:
        files[MEASUREMENT_NAME] = release.measurement
    if _draw(branches, release, folder / PICTURE_NAME, notify):
        files[PICTURE_NAME] = folder / PICTURE_NAME
    card = main_card(
        release.repository,
        release.model,
        branches,
        picture=PICTURE_NAME in files,
        measurement=MEASUREMENT_NAME in files,
        kept=remote.kept.get(MAIN, ""),
    )
    return Contents(MAIN, files, card, _digests(release.folders[MAIN]) if MAIN in release.folders else {})


def publish(release: Release, hub: Hub, remote: Remote, *, private: bool, notify: Notify) -> list[Sent]:
    """Upload; returns what was done to each branch, main last.

    Args:
        release: what to upload.
        hub: where.
        remote: what `look` found there.
        private: whether a new repository is private; False: as the account does it.
        notify: called with a line on what is being sent.

    Raises:
        HubError: the Hub refused something, or what is there afterwards is not what was sent. What is up
            already stays, and the same call continues with the rest.
        OSError: a file here cannot be read.
    """
    api, repository = hub.api, release.repository
    if not remote.exists:
        hub.ask(lambda: api.create_repo(repository, private=private or None, exist_ok=True))
    if remote.gate and not remote.gated:  # before the first file is there
        hub.notify(f"{repository}: access must be requested, as for {release.model.base_model}")
        hub.ask(lambda: api.update_repo_settings(repository, gated="auto"))
    done = []
    for branch in release.branches:
        if branch.name == MAIN:
            continue
        if branch.name not in remote.heads:
            _create_branch(hub, branch.name)
        contents = branch_contents(release, branch, remote.kept.get(branch.name, ""))
        done.append(_send(hub, contents, f"Upload {branch.bpw:.2f} bits per weight", notify))
    with tempfile.TemporaryDirectory() as name:
        contents = main_contents(release, remote, Path(name), hub.notify)
        done.append(_send(hub, contents, "Upload the model card", notify))
    return done


def _create_branch(hub: Hub, branch: str) -> None:
    """A new branch from the empty repository, so that nothing of main's comes along."""
    api, repository = hub.api, hub.repository
    first = hub.ask(lambda: api.list_repo_commits(repository))[-1].commit_id
    hub.ask(lambda: api.create_branch(repository, branch=branch, revision=first, exist_ok=True))


def _draw(branches: Sequence[Branch], release: Release, path: Path, notify: Notify) -> bool:
    """The picture of error over size: what was measured, and the curve that the measurement predicts."""
    key = common_evaluation(branches)
    measured = [(branch, found) for branch in branches if (found := evaluation_of(branch, key))]
    points = [SizePoint(branch.bpw, found.kl, branch.name) for branch, found in measured if found.kl > 0]
    predicted = _predicted(branches, release)
    if not points and not predicted:
        return False
    try:
        error_curve_png(points, path, predicted=predicted, title=release.model.base_model)
    except ImportError as error:
        notify(f"no picture in the card: {error}")
        return False
    return True


def _predicted(branches: Sequence[Branch], release: Release) -> list[SizePoint]:
    """KL divergence that the measurement predicts over the range that the branches span, and a bit more."""
    if release.measurement is None:
        return []
    measurement = read_measurement(release.measurement)
    low, high = measurement.reachable_bpw
    low = max(low, branches[0].bpw - _MARGIN_BPW)
    high = min(high, branches[-1].bpw + _MARGIN_BPW)
    targets = [low + (high - low) * i / _CURVE_POINTS for i in range(_CURVE_POINTS + 1)]
    curve = frontier(measurement, release.branches[0].head_bits, targets, kind=str)
    line = [(bpw, kl) for bpw, kl in {point.bpw: point.kl for point in curve}.items() if kl > 0]
    known = [(branch.bpw, branch.predicted_kl) for branch in branches if branch.predicted_kl]
    return [SizePoint(bpw, kl) for bpw, kl in rescaled(line, known)]


def _send(hub: Hub, contents: Contents, message: str, notify: Notify) -> Sent:
    """Bring a branch up to date in one commit."""
    api, repository = hub.api, hub.repository
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name)  # holds links, so that the folder goes up as it is but with our card
        (staged / CARD_NAME).write_text(contents.card, encoding="utf-8")
        files = {**contents.files, CARD_NAME: staged / CARD_NAME}
        there = remote_files(hub, contents.name)
        digests = dict(contents.digests)
        missing = _missing(files, there, digests)
        weights = any(path.endswith(_WEIGHTS) for path in files)  # main without any leaves those there alone
        stale = sorted(path for path in there if weights and path.endswith(_WEIGHTS) and path not in files)
        sent_bytes = sum(files[path].stat().st_size for path in missing)
        if missing or stale:
            gone = f", removing {', '.join(stale)}" if stale else ""
            notify(
                f"{contents.name}: sending {len(missing)} of {len(files)} files, {sent_bytes:,} bytes{gone}"
            )
            for path in missing:
                if path != CARD_NAME:
                    (staged / path).symlink_to(files[path].resolve())
            if CARD_NAME not in missing:
                (staged / CARD_NAME).unlink()
            hub.ask(
                lambda: api.upload_folder(
                    repo_id=repository,
                    folder_path=staged,
                    revision=contents.name,
                    commit_message=message,
                    delete_patterns=stale or None,
                )
            )
            lost = _missing(contents.files, remote_files(hub, contents.name), digests)
            if lost:
                raise HubError(
                    f"{repository}, branch {contents.name}: {lost[0]} did not arrive as it was sent; run the "
                    "same command again"
                )
        commit = hub.ask(lambda: api.model_info(repository, revision=contents.name)).sha or ""
    kept = len(files) - len(missing)
    return Sent(contents.name, tuple(missing), sent_bytes, kept, tuple(stale), commit)


def _missing(
    files: Mapping[str, Path], there: "Mapping[str, RepoFile]", digests: dict[str, str]
) -> list[str]:
    """The files that are not there, or not the same; digests that had to be computed are added."""
    return [
        path
        for path, file in sorted(files.items())
        if path not in there or not _same(path, file, there[path], digests)
    ]


def _same(path: str, file: Path, entry: "RepoFile", digests: dict[str, str]) -> bool:
    if entry.lfs is None:
        content = file.read_bytes()
        header = f"blob {len(content)}\0".encode()  # how git names a file's contents
        return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == entry.blob_id
    if entry.lfs.size != file.stat().st_size:
        return False
    if path not in digests:
        hasher = hashlib.sha256()
        with file.open("rb") as stream:
            while piece := stream.read(_CHUNK_BYTES):
                hasher.update(piece)
        digests[path] = hasher.hexdigest()
    return digests[path] == entry.lfs.sha256


def _digests(folder: Path) -> dict[str, str]:
    """What `checksums.json` says, which `verify` has compared with the files."""
    try:
        return {name: checksum.sha256 for name, checksum in read_checksums(folder).items()}
    except FileNotFoundError:
        return {}
