"""Chat templates render as in transformers, and whatever a hostile one does comes to an end."""

import pytest
from tiny_output import CHATML, TOKENIZER_CONFIG, make_tokenizer

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.tokenizer import template
from dbrx_quant.runtime.tokenizer.check import check_tokenizer
from dbrx_quant.runtime.tokenizer.ids import special_ids
from dbrx_quant.runtime.tokenizer.load import load_tokenizer
from dbrx_quant.runtime.tokenizer.template import TemplateError, chat_ids, render

CHAT = [{"role": "user", "content": "Hi, ünïcode 😀"}, {"role": "assistant", "content": "Yes?"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOMB = "{{ 'x' * 10**10 }}"
BOMBS = {
    "a loop": (LOOP, "more than 1 seconds"),
    "a repeated text": (BOMB, "more than 256 MB"),
    "a padded text": ("{{ 'x'.center(10**10) }}", "more than 256 MB"),
    "a wide format": ("{{ '%9999999999d' % 1 }}", "TemplateError|OverflowError|ValueError|256 MB"),
    "a doubled text": (
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "more than 256 MB",
    ),
    "a repeated list": ("{{ ([1] * 10**10) | length }}", "more than 256 MB"),
    "a great power": ("{{ 9 ** (9 ** 9) }}", "more than 1 seconds|256 MB|ValueError"),
    "a long text": ("{{ 'x' * 17000000 }}", "17000000 characters"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a syntax error": ("{% for", "TemplateSyntaxError"),
    "its own error": ("{{ raise_exception('only Latin') }}", "only Latin"),
    "a missing attribute": ("{{ messages[0].a.b }}", "UndefinedError"),
    "the machine": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_template_ends_in_an_error(bomb):
    source, message = BOMBS[bomb]
    with pytest.raises(TemplateError, match=message):
        render(source, CHAT)
    assert render("{{ bos_token }}{{ messages[1].content }}", CHAT, bos_token="<s>") == "<s>Yes?"


def test_a_conversation_has_the_ids_that_transformers_gives_it(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    theirs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert chat_ids(tokenizer, CHAT) == theirs


def test_special_tokens_may_be_named_as_anything_of_ours(tmp_path):
    def ids(name):
        config = {"chat_template": "{{ template }}", "extra_special_tokens": {name: "a"}}
        make_tokenizer(tmp_path / name, config=TOKENIZER_CONFIG | config)
        return chat_ids(load_tokenizer(tmp_path / name), CHAT)

    assert len(ids("template")) == 1
    for name in ("messages", "conversations", "chat_template"):
        with pytest.raises(CheckpointError, match=f"multiple values.*{name}"):
            ids(name)


@pytest.mark.parametrize("in_file", [True, False])
def test_readers_of_a_folder_end_too_and_name_the_file(tmp_path, in_file):
    make_tokenizer(tmp_path, config=TOKENIZER_CONFIG | {"chat_template": CHATML if in_file else BOMB})
    if in_file:
        (tmp_path / "chat_template.jinja").write_text(BOMB)
    file = "chat_template.jinja" if in_file else "tokenizer_config.json"
    assert any(
        problem.file == file and "256 MB" in str(problem) for problem in check_tokenizer(tmp_path, 300)
    )
    assert f"{tmp_path / file}: the chat template cannot be rendered" in special_ids(tmp_path).notes[0]
    with pytest.raises(CheckpointError, match="the chat template cannot be rendered"):
        chat_ids(load_tokenizer(tmp_path), CHAT)
