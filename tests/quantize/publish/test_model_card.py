"""The model card: what it carries over, what it says was measured, predicted or not measured."""

import ast
import re
from dataclasses import replace

import pytest

from dbrx_quant.quantize.publish.card import branch_card, kept_text, main_card, size_text
from dbrx_quant.quantize.publish.release import KEPT_OUT, MAIN, Branch, Evaluation, Model
from dbrx_quant.quantize.publish.source_card import (
    SourceCard,
    dump_front_matter,
    front_matter,
    read_source_card,
    term_faults,
)

GATED = """---
license: other
license_name: databricks-open-model-license
license_link: LICENSE.txt
extra_gated_heading: Share your contact information
extra_gated_prompt: |-
  ### Terms of "Use": don't

  Follow the #policy.
extra_gated_fields:
  Birthday: date_picker
  I accept: checkbox
  Country:
    type: select
    options: [no, yes, on]
extra_gated_eu_disallowed: true
language: [en, no]
pipeline_tag: text2text-generation
base_model: databricks/dbrx-base
datasets: [a/b]
---
# DBRX
"""
DBRX = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}}
REPO = "me/dbrx-exl2"


def model(card=None, config=DBRX, **changes):
    facts = {
        "base_model": "databricks/dbrx-instruct",
        "card": SourceCard(None, {"license": "mit"}) if card is None else card,
        "config": config,
        "experts": 16 if config is DBRX else 0,
        "chat": True,
        "term_files": ("LICENSE.txt", "NOTICE.txt"),
        "calibration": {"rows": 128, "length": 2048, "dataset": "/home/someone/secret/wiki.txt"},
        "producer": "dbrx-quant 0.1.0",
    }
    return Model(**{**facts, **changes})


def measured(text="wiki.txt", kl=0.02, **changes):
    facts = {"text": text, "windows": 40, "length": 512, "tokens": 20440, "ppl": 5.5, "ppl_original": 5.25}
    return Evaluation(**{**facts, "kl": kl, "kl_stderr": 0.001, "top1": 0.9, "router_topk": 0.875, **changes})


def branch(target, *evaluations, predicted=0.04):
    return Branch(f"{target}bpw", target, target - 0.0004, 6, int(target * 16.5e9), predicted, evaluations)


def rows(card):
    """Cells of the first table, its head first."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    first = lines[: next((i for i, line in enumerate(lines[2:], 2) if "---" in line), len(lines) + 1) - 1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (first[0], *first[2:])]


def source(tmp_path, text=GATED):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    return read_source_card(tmp_path / "README.md")


def test_licence_and_gate_of_the_source_come_over_with_their_exact_values(tmp_path):
    facts = front_matter(main_card(REPO, model(source(tmp_path)), [branch(3.0)]))
    assert facts["extra_gated_prompt"] == '### Terms of "Use": don\'t\n\nFollow the #policy.'
    assert facts["extra_gated_fields"]["Country"]["options"] == ["no", "yes", "on"]
    assert facts["extra_gated_eu_disallowed"] is True
    assert facts["language"] == ["en", "no"], "no is Norwegian"
    assert facts["pipeline_tag"] == "text2text-generation"
    assert facts["license_name"] == "databricks-open-model-license"
    assert "datasets" not in facts
    assert facts["base_model"] == "databricks/dbrx-instruct"
    assert facts["base_model_relation"] == "quantized"
    assert facts["quantized_by"] == "me"
    assert {"exl2", "dbrx", "moe"} <= set(facts["tags"])


def test_a_card_of_ours_is_read_back_as_that_of_the_same_original(tmp_path):
    first = model(source(tmp_path))
    again = source(tmp_path, branch_card(REPO, first, branch(3.0)))
    assert again.base_model == first.base_model
    assert again.carried == {**first.card.carried}


@pytest.mark.parametrize("text", ["", "# no front matter\n", "---\n---\n", "text\n---\nlicense: mit\n---\n"])
def test_a_card_without_front_matter_says_nothing(tmp_path, text):
    assert source(tmp_path, text).carried == {}
    assert read_source_card(tmp_path / "absent.md") == SourceCard()


def test_front_matter_that_is_no_mapping_names_the_file(tmp_path):
    for text in ("---\n- a\n---\n", "---\na: [\n---\n"):
        with pytest.raises(ValueError, match=r"README\.md: the front matter is not (a YAML mapping|YAML)"):
            source(tmp_path, text)
    assert source(tmp_path, "\ufeff---\r\nlicense: mit\r\n---\r\n# x").carried == {"license": "mit"}


def test_what_is_dumped_is_read_back():
    facts = {
        "a": "no",
        "b": True,
        "c": "x: y\n\n  z",
        "d": ["on", 1, 0.5],
        "e": {"f": "µ"},
        "g": "2024-01-01",
    }
    assert front_matter(f"---\n{dump_front_matter(facts)}---\n") == facts


@pytest.mark.parametrize(
    ("carried", "names", "complaint"),
    [
        ({"license": "mit"}, [], None),
        ({}, ["LICENSE"], "unknown"),
        ({"license": "other"}, ["README.md"], "no LICENSE file"),
        ({"license": "other"}, ["License.md"], None),
        ({"license": "llama3", "extra_gated_prompt": "x"}, ["USE_POLICY.md"], "no LICENSE file"),
        ({"license": "other", "license_link": "TERMS.pdf"}, ["LICENCE"], "not there: TERMS.pdf"),
        ({"license": "other", "license_link": "https://x/y"}, ["COPYING"], None),
        ({"license": "other", "license_name": "databricks-x"}, ["LICENSE"], "NOTICE"),
        ({"license": "other", "license_name": "databricks-x"}, ["LICENSE", "NOTICE.txt"], None),
    ],
)
def test_terms_that_have_to_go_along_are_missed(carried, names, complaint):
    faults = term_faults(SourceCard(None, carried), names)
    assert bool(faults) == (complaint is not None)
    assert complaint is None or complaint in faults[0]


def test_measured_figures_are_shown_and_others_are_said_to_be_predicted_or_not_measured():
    card = main_card(
        REPO, model(), [branch(2.5, predicted=None), branch(3.0, predicted=0.0456), branch(4.0, measured())]
    )
    head, *body = rows(card)
    columns = {name: i for i, name in enumerate(head)}
    assert [row[columns["KL divergence"]] for row in body] == [
        "not measured",
        "0.04560 (predicted)",
        "0.02000 ± 0.00100",
    ]
    assert [row[columns["perplexity"]] for row in body] == ["not measured", "not measured", "5.500"]
    assert [row[columns["same experts"]] for row in body] == ["not measured", "not measured", "87.50 %"]
    assert [row[columns["size"]] for row in body] == ["41.2 GB", "49.5 GB", "66.0 GB"]
    assert "40 windows of 512 tokens, where" in card
    assert "the original's perplexity is 5.250" in card
    assert "was not measured: it is what the conversion expects" in card


def test_where_all_is_measured_nothing_is_called_predicted_and_without_routing_there_is_no_such_column():
    card = main_card(REPO, model(), [branch(3.0, measured(router_topk=None))])
    assert "predict" not in card
    assert "same experts" not in card


def test_figures_of_different_texts_are_not_put_into_one_column():
    wiki, code, own = (
        measured(kl=0.011),
        measured("code.py", kl=0.022, windows=99),
        measured(KEPT_OUT, kl=0.033),
    )
    card = main_card(REPO, model(), [branch(3.0, code, wiki, own), branch(4.0, measured(kl=0.005), own)])
    assert [row[5][:7] for row in rows(card)[1:]] == ["0.01100", "0.00500"], "wiki.txt has both"
    other = card[card.index("Measured on other texts") :]
    assert "| `code.py`, 99 windows of 512 | 3.0bpw |" in other
    assert f"| {KEPT_OUT}, 40 windows of 512 | 4.0bpw |" in other
    assert "0.01100" not in other
    alone = main_card(REPO, model(), [branch(3.0, own), branch(4.0, own, measured())])
    assert [row[5][:7] for row in rows(alone)[1:]] == ["0.03300", "0.03300"]


def test_branches_link_to_their_trees_and_main_says_that_it_holds_no_weights():
    card = main_card(REPO, model(), [branch(3.0), branch(4.0)], picture=True, measurement=True)
    assert f"[3.0bpw](https://huggingface.co/{REPO}/tree/3.0bpw)" in card
    assert "holds no weights" in card
    assert "](error-vs-size.png)" in card
    assert "--measurement measurement.json" in card
    assert "[NOTICE.txt](NOTICE.txt)" in card
    alone = main_card(REPO, model(), [Branch(MAIN, 3.0, 3.0, 6, 10**9, None, ())])
    assert "holds no weights" not in alone
    assert "error-vs-size.png" not in alone
    assert "measurement.json" not in alone


def test_the_calibration_files_folder_is_not_made_public():
    assert "secret" not in main_card(REPO, model(), [branch(3.0)])
    assert "`wiki.txt`" in main_card(REPO, model(), [branch(3.0)])


def test_a_branch_tells_the_command_that_makes_it_again():
    made = replace(branch(3.0), command="dbrx-quant convert databricks/dbrx-instruct OUT --bpw 3.0")
    assert "\n```sh\ndbrx-quant convert databricks/dbrx-instruct OUT" in branch_card(REPO, model(), made)
    assert "Made by" not in branch_card(REPO, model(), branch(3.0))


def test_python_in_the_card_parses_and_imports_the_runtime_before_transformers_loads():
    for chat in (True, False):
        card = branch_card(REPO, model(chat=chat), branch(3.0))
        snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(snippets) == 3
        for snippet in snippets:
            ast.parse(snippet)
        assert f'"{REPO}", "3.0bpw"' in snippets[0]
        assert snippets[1].startswith("import dbrx_quant.runtime")
        assert ("apply_chat_template" in snippets[0]) == chat


def test_a_dense_model_and_one_of_another_converter_are_described_as_such():
    dense = main_card(REPO, model(config={"model_type": "llama"}, chat=False), [branch(3.0)])
    assert "experts of" not in dense
    assert "moe" not in front_matter(dense)["tags"]
    assert "clip_qkv" not in dense
    other = main_card(REPO, model(producer="exllamav2 0.0.20"), [branch(3.0)])
    assert "its own bits" not in other


def test_what_was_written_below_the_line_is_found_again():
    card = main_card(REPO, model(), [branch(3.0)], kept="My *own* words\n\n---\n")
    assert kept_text(card) == "My *own* words\n\n---"
    assert main_card(REPO, model(), [branch(3.0)], kept=kept_text(card) or "") == card
    assert kept_text(main_card(REPO, model(), [branch(3.0)])) == ""
    assert kept_text("# somebody else's\n") is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(1_687_268, "1.69 MB"), (41_250_000_000, "41.2 GB"), (131_900_000_000, "132 GB"), (1.2e12, "1,200 GB")],
)
def test_sizes_have_three_digits(count, text):
    assert size_text(int(count)) == text
