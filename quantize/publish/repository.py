"""The Hub before an upload: the account, the original and its terms, and what the repository holds."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_quant.quantize.budget.strategy import STRATEGY_NAME
from dbrx_quant.quantize.publish.card import kept_text
from dbrx_quant.quantize.publish.client import Hub, HubError
from dbrx_quant.quantize.publish.release import (
    MAIN,
    Branch,
    Release,
    quantized_config,
    read_branch,
)
from dbrx_quant.quantize.publish.source_card import CARD_NAME, front_matter, read_source_card
from dbrx_quant.runtime.evaluation.record import EVALUATION_NAME
from dbrx_quant.runtime.files.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import RepoFile


@dataclass(frozen=True)
class Remote:
    """What the repository was like before.

    Attributes:
        exists: whether it was there.
        heads: branch → its newest commit.
        others: models on branches that are not being uploaded.
        kept: branch → what somebody wrote below our part of its card.
        gated: whether access to it has to be asked for.
        gate: whether the original's has to be.
    """

    exists: bool
    heads: Mapping[str, str]
    others: tuple[Branch, ...]
    kept: Mapping[str, str]
    gated: bool
    gate: bool


NOTHING = Remote(False, {}, (), {}, False, False)


def look(release: Release, hub: Hub, *, private: bool, replace_card: bool) -> Remote:
    """The account, the original and the repository as they are; nothing is changed.

    Raises:
        HubError: there is no token, or it may not write, or the Hub cannot be asked.
        ValueError: the original's terms are others than the folders say, or the repository is not one to
            upload this to.
    """
    api, repository = hub.api, release.repository
    access = hub.ask(api.whoami).get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        raise HubError(
            f"the token is read-only: create one with write access at {api.endpoint}/settings/tokens and run "
            "`hf auth login` again, or put it into HF_TOKEN, which takes precedence"
        )
    gate = _original_gate(release, hub) or bool(release.model.card.gate)
    info = hub.find(lambda: api.model_info(repository))
    if info is None:
        return Remote(False, {}, (), {}, False, gate)
    if private and not info.private:
        raise ValueError(
            f"{repository} already exists and is public; --private is for new repositories: make it "
            f"private at {api.endpoint}/{repository}/settings first"
        )
    heads = {ref.name: ref.target_commit for ref in hub.ask(lambda: api.list_repo_refs(repository)).branches}
    with tempfile.TemporaryDirectory() as name:
        kept = _kept_texts(release, hub, heads, Path(name), replace_card)
        others = tuple(
            branch
            for head in sorted(set(heads) - set(release.folders))
            if (branch := _remote_branch(hub, head, Path(name) / f"branch-{head}"))
        )
    return Remote(True, heads, others, kept, bool(info.gated), gate)


def remote_files(hub: Hub, branch: str) -> "dict[str, RepoFile]":
    """Path → entry of all files of a branch."""
    from huggingface_hub import RepoFile

    listed = hub.ask(lambda: list(hub.api.list_repo_tree(hub.repository, recursive=True, revision=branch)))
    return {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}


def _original_gate(release: Release, hub: Hub) -> bool:
    """Whether the original is gated on the Hub; its card there must not ask for more than ours says.

    Raises:
        ValueError: it does.
    """
    api, base = hub.api, release.model.base_model
    info = hub.find(lambda: api.model_info(base))
    if info is None:
        return False  # not published, or hidden; its terms are those of the folders
    with tempfile.TemporaryDirectory() as name:
        path = hub.find(lambda: api.hf_hub_download(base, CARD_NAME, local_dir=name), behind_gate=True)
        theirs = read_source_card(Path(path)).terms if path else {}
    ours = release.model.card.terms
    required = [key for key in theirs if key.startswith("extra_") or key == "license"]
    different = [key for key in required if ours.get(key) != theirs[key]]
    if different:
        raise ValueError(
            f"the card of {base} on the Hub has other terms than the folder's README.md "
            f"({', '.join(different)}): run `hf download {base} README.md --local-dir DIR`, look at its "
            "LICENSE files too, and give --card DIR/README.md"
        )
    return bool(info.gated)


def _kept_texts(
    release: Release, hub: Hub, heads: Mapping[str, str], folder: Path, replace_card: bool
) -> dict[str, str]:
    """What people wrote below our text; refuses to write over a card that isn't ours."""
    kept = {}
    for branch in sorted({MAIN, *release.folders} & set(heads)):
        path = _fetch(hub, CARD_NAME, branch, folder / f"card-{branch}")
        text = path.read_text(encoding="utf-8") if path else ""
        facts = front_matter(text, f"{release.repository}, branch {branch}: {CARD_NAME}")
        below = kept_text(text)
        if text.strip() and below is None and not replace_card:
            raise ValueError(
                f"{release.repository}, branch {branch}: has a README.md that this program did not write; "
                "--replace-card puts ours in its place (the old one stays in the history)"
            )
        base = facts.get("base_model")
        if below is not None and base != release.model.base_model and not replace_card:
            raise ValueError(
                f"{release.repository} holds quantizations of {base}, these are of "
                f"{release.model.base_model}; choose another repository"
            )
        kept[branch] = below or ""
    return kept


def _remote_branch(hub: Hub, branch: str, folder: Path) -> Branch | None:
    """What is known about a model that was uploaded before; None if the branch holds none."""
    files = remote_files(hub, branch)
    if "config.json" not in files:
        return None
    for name in ("config.json", STRATEGY_NAME, EVALUATION_NAME):
        if name in files:
            _fetch(hub, name, branch, folder)
    try:
        config = quantized_config(folder)
    except CheckpointError:
        return None  # another kind of model; none of our business
    size = sum(entry.size for path, entry in files.items() if path.endswith(".safetensors"))
    try:
        return read_branch(folder, branch, config, size)
    except CheckpointError as error:
        said = str(error).replace(f"{folder}/", "")
        hub.notify(f"warning: the card leaves out branch {branch} of {hub.repository}: {said}")
        return None


def _fetch(hub: Hub, name: str, branch: str, folder: Path) -> Path | None:
    path = hub.find(lambda: hub.api.hf_hub_download(hub.repository, name, revision=branch, local_dir=folder))
    return Path(path) if path else None
