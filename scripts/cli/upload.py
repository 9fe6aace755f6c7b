"""`dbrx-quant upload`: quantized folders onto the Hub, a branch each, with a model card."""

import argparse
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_quant.runtime.output.progress import counter
from dbrx_quant.scripts.terminal.arguments import add_quiet_argument
from dbrx_quant.scripts.terminal.output import bytes_text, print_json, print_table, say
from dbrx_quant.scripts.terminal.verb import UsageError, Verb

if TYPE_CHECKING:
    from dbrx_quant.quantize.publish.release import Release
    from dbrx_quant.quantize.publish.upload import Contents, Sent

CHECK_FAILED = 3
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "folders",
        metavar="DIR",
        nargs="+",
        type=Path,
        help="quantized folders, or the parent of several that convert --bpw a,b,c wrote",
    )
    parser.add_argument("repository", metavar="REPO", help="NAMESPACE/NAME on the Hub; created if needed")
    parser.add_argument("--revision", metavar="BRANCH", help="of one DIR (default: its target, like 3.0bpw)")
    parser.add_argument(
        "--base-model", metavar="ORG/NAME", help="the original's id (default: as the folders say)"
    )
    parser.add_argument(
        "--card", type=Path, metavar="FILE", help="the original's README.md (default: that in DIR)"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--replace-card", action="store_true", help="overwrite a README.md that isn't ours")
    parser.add_argument(
        "--dry-run", action="store_true", help="show branches, files and card; contact nobody, send nothing"
    )
    add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Upload, or say what uploading would do; 3 where a folder is not sound."""
    if not _REPOSITORY.fullmatch(arguments.repository) or Path(arguments.repository).is_dir():
        raise UsageError(f"the last argument is a repository, NAMESPACE/NAME: {arguments.repository}")
    from dbrx_quant.quantize.publish.release import find_checkpoints, gather

    folders = find_checkpoints(arguments.folders)
    if arguments.revision and len(folders) > 1:
        raise UsageError("--revision names the branch of one folder; without it each gets its own")
    release = gather(arguments.repository, folders, arguments.base_model, arguments.card, arguments.revision)
    _warn_of_surprises(release)
    if not _all_sound(folders, arguments.quiet):
        return CHECK_FAILED
    return _dry_run(arguments, release) if arguments.dry_run else _upload(arguments, release)


def _warn_of_surprises(release: "Release") -> None:
    """Note what is not uploaded, and what the files reveal about this machine."""
    from dbrx_quant.quantize.measurement import MEASUREMENT_NAME
    from dbrx_quant.quantize.publish.release import files_that_mention

    folders = list(release.folders.values())
    for folder in folders:
        inner = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
        if inner:
            say(f"note: {folder}: folders in it are not uploaded: {', '.join(inner)}")
        home = f"{Path.home()}/"
        if found := files_that_mention(folder, home):
            say(f"note: {folder}: reveals paths below {home}: {', '.join(found)}")
    if not release.measurement and all((folder / MEASUREMENT_NAME).exists() for folder in folders):
        say(f"note: the folders' {MEASUREMENT_NAME} differ: each goes to its own branch, none to main")


def _all_sound(folders: list[Path], quiet: bool) -> bool:
    """Verify the folders; False, with the faults on stdout, if one is not to be published."""
    from dbrx_quant.runtime.folder.verify import verify

    sound = True
    for folder in folders:
        with counter(f"verify {folder.name}", "B", quiet) as progress:
            report = verify(folder, progress=progress)
        for warning in report.warnings:
            say(f"warning: {folder}: {warning}")
        for fault in report.faults:
            print(f"{folder}: {fault}")
        sound &= report.ok
    if not sound:
        say("dbrx-quant: nothing was uploaded: folders that `verify` rejects are not published")
    return sound


def _dry_run(arguments: argparse.Namespace, release: "Release") -> int:
    """Show everything that would go up, the repository taken to be new."""
    from dbrx_quant.quantize.publish.repository import NOTHING
    from dbrx_quant.quantize.publish.source_card import CARD_NAME
    from dbrx_quant.quantize.publish.upload import branch_contents, main_contents

    with tempfile.TemporaryDirectory() as name:
        contents = [branch_contents(release, branch) for branch in release.branches if branch.name != "main"]
        contents.append(main_contents(release, NOTHING, Path(name), say))
        listed = [_listing(branch) for branch in contents]
        if arguments.json:
            print_json(
                {
                    "dry_run": True,
                    "repository": release.repository,
                    "base_model": release.model.base_model,
                    "private": arguments.private,
                    "gated": bool(release.model.card.gate),
                    "branches": listed,
                }
            )
            return 0
        for branch, facts in zip(contents, listed, strict=True):
            title = f"branch {branch.name}: {bytes_text(branch.total_bytes)}"
            rows = [[path, bytes_text(size), origin] for path, size, origin in facts["files"]]
            print_table(title, ["file", "size", "from"], rows)
        for branch in contents:
            print(f"{'=' * 20} {CARD_NAME} of {branch.name} {'=' * 20}\n{branch.card}")
    kind = "private" if arguments.private else "public"
    gate = "; access must be requested, as for the original" if release.model.card.gate else ""
    print(f"dry run: nothing was sent or requested; a new repository would be {kind}{gate}")
    return 0


def _listing(contents: "Contents") -> dict[str, Any]:
    from dbrx_quant.quantize.publish.card import PICTURE_NAME
    from dbrx_quant.quantize.publish.source_card import CARD_NAME

    made = {PICTURE_NAME: "drawn"}
    files = [
        [path, file.stat().st_size, made.get(path, str(file.parent))] for path, file in contents.files.items()
    ]
    files.append([CARD_NAME, len(contents.card.encode()), "written"])
    return {
        "branch": contents.name,
        "files": sorted(files),
        "bytes": contents.total_bytes,
        "card": contents.card,
    }


def _upload(arguments: argparse.Namespace, release: "Release") -> int:
    from dbrx_quant.quantize.publish.client import Hub
    from dbrx_quant.quantize.publish.release import files_that_mention
    from dbrx_quant.quantize.publish.repository import look
    from dbrx_quant.quantize.publish.upload import publish

    hub = Hub(release.repository, say)
    for folder in release.folders.values():
        if hub.token and (found := files_that_mention(folder, hub.token)):
            raise ValueError(f"{folder / found[0]}: contains your token; remove it before publishing")
    with _bars_hidden(arguments.quiet):
        remote = look(release, hub, private=arguments.private, replace_card=arguments.replace_card)
        progress = (lambda line: None) if arguments.quiet else say
        sent = publish(release, hub, remote, private=arguments.private, notify=progress)
    url = f"{hub.api.endpoint}/{release.repository}"
    if arguments.json:
        branches = [
            {
                "branch": s.branch,
                "sent": list(s.sent),
                "sent_bytes": s.sent_bytes,
                "kept": s.kept,
                "removed": list(s.removed),
                "commit": s.commit,
            }
            for s in sent
        ]
        print_json({"repository": release.repository, "url": url, "branches": branches})
    else:
        print_table(
            url, ["branch", "sent", "size", "there already", "removed", "commit"], [_row(s) for s in sent]
        )
    return 0


def _row(sent: "Sent") -> list[str]:
    return [
        sent.branch,
        f"{len(sent.sent)} files",
        bytes_text(sent.sent_bytes),
        f"{sent.kept} files",
        f"{len(sent.removed)} files",
        sent.commit[:8],
    ]


@contextmanager
def _bars_hidden(quiet: bool) -> Iterator[None]:
    """Show no bars of huggingface_hub when quiet."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            enable_progress_bars()


VERB = Verb(
    "upload",
    "put quantized folders on the Hub, a branch each, with a model card",
    "dbrx-quant upload out/dbrx me/dbrx-instruct-exl2 --base-model databricks/dbrx-instruct --dry-run",
    add_arguments,
    run,
    resumable=True,
)
