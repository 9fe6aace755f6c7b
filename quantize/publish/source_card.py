"""What the original's model card says: whose model it is, and the terms on which it may be passed on."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.families import FAMILIES
from dbrx_quant.runtime.files.errors import CheckpointError

CARD_NAME = "README.md"

_CARRIED = re.compile(r"license(_name|_link)?|extra_gated_\w+|language|pipeline_tag")
_TERMS = re.compile(r"(licen[cs]e|notice|copying|copyright|use[-_]policy|acceptable[-_]use)", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*$\r?\n?", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class SourceCard:
    """The front matter of a model card, as far as a quantized model inherits it.

    Attributes:
        base_model: the original's id on the Hub, if the card is that of a quantized model; else None, since
            a card doesn't name its own repository.
        carried: the fields that go over as they are: licence, gate, language, pipeline tag.
    """

    base_model: str | None = None
    carried: dict[str, Any] = field(default_factory=dict)

    @property
    def gate(self) -> dict[str, Any]:
        """What the original asks of those who request access; empty if nothing."""
        return {key: value for key, value in self.carried.items() if key.startswith("extra_gated_")}

    @property
    def terms(self) -> dict[str, Any]:
        """Licence and gate."""
        return {key: value for key, value in self.carried.items() if key.startswith(("license", "extra_"))}

    @property
    def license(self) -> str:
        """The licence's name, as people know it; empty where the card names none."""
        return str(self.carried.get("license_name") or self.carried.get("license") or "")


def read_source_card(path: Path) -> SourceCard:
    """The card in a file; an empty one where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or its front matter is no YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return SourceCard()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    facts = front_matter(text, path)
    carried = {key: value for key, value in facts.items() if _CARRIED.fullmatch(key) and value is not None}
    base = facts.get("base_model") if facts.get("base_model_relation") == "quantized" else None
    if isinstance(base, list):
        base = base[0] if len(base) == 1 else None
    return SourceCard(str(base) if base else None, carried)


def front_matter(text: str, path: Path | str = CARD_NAME) -> dict[str, Any]:
    """The YAML at the head of a card; empty where it has none.

    Raises:
        CheckpointError: it is no YAML mapping; the message names `path`.
    """
    import yaml

    found = _FRONT_MATTER.match(text)
    if not found:
        return {}
    try:
        facts = yaml.load(found[1], _loader())
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path}: the front matter is not YAML: {error}") from error
    if facts is None:
        return {}
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path}: the front matter is not a YAML mapping")
    return {str(key): value for key, value in facts.items()}


@cache
def _loader() -> Any:
    """PyYAML's safe loader, with booleans as the Hub reads them: `no` is Norwegian, not false (YAML 1.2)."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is untyped
        yaml_implicit_resolvers = {  # noqa: RUF012  (as in its parent class)
            first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")
    )
    return Loader


def dump_front_matter(facts: Mapping[str, Any]) -> str:
    """The facts as YAML, in their order; texts of several lines stay readable."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        pass

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return str(yaml.dump(dict(facts), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6))


def term_files(names: Collection[str]) -> list[str]:
    """The files among `names` that hold a licence, a notice or a policy."""
    return sorted(name for name in names if _TERMS.match(name))


def term_faults(card: SourceCard, names: Collection[str]) -> list[str]:
    """What is missing before the model may be passed on, a sentence each; empty if all is there.

    Args:
        card: the original's.
        names: files that go along.
    """
    if not card.license:
        return [
            "its licence is unknown: no README.md of the original with a `license:` in its front matter; put "
            "it into the folder, or give --card FILE"
        ]
    texts = [name.lower() for name in term_files(names)]
    faults = []
    link = str(card.carried.get("license_link") or "")
    if link and "://" not in link and link not in names:
        faults.append(f"its licence is in a file that is not there: {link}; copy it from the original")
    special = card.carried.get("license") == "other" or card.gate
    if special and not any(name.startswith(("licen", "copying")) for name in texts):
        faults.append(
            f"the text of its licence ({card.license}) must be included, and there is no LICENSE file; copy "
            "the original's LICENSE and NOTICE files there"
        )
    required = [family.notice_license for family in FAMILIES if family.notice_license]
    if card.license.startswith(tuple(required)) and not any(name.startswith("notice") for name in texts):
        faults.append(f"its licence ({card.license}) requires the original's NOTICE file; copy it there")
    return faults
