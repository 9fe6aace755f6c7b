"""Templates and texts in a process that can be stopped: the same results, and bombs cost only themselves."""

import os
import signal

import pytest
from byte_tokenizer import write_tokenizer

from dbrx_quant.runtime.talk.text_process import TextProcess
from dbrx_quant.runtime.tokenizer.load import load_tokenizer
from dbrx_quant.runtime.tokenizer.template import TemplateError

HELLO = [{"role": "user", "content": "Hé\u2028🙂"}, {"role": "assistant", "content": "line\nline"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("t"), bos=True))


@pytest.fixture(scope="module")
def texts(tokenizer):
    with TextProcess(tokenizer, seconds=2, megabytes=256) as made:
        yield made


def test_ids_are_those_of_the_tokenizer_itself(tokenizer, texts):
    assert texts.encode("Hé 🙂\n", 100)[0] == tokenizer("Hé 🙂\n")["input_ids"]
    wanted = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert texts.encode_chat(HELLO, 100) == (wanted, len(wanted))
    assert texts.render(HELLO) == tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, tokenize=False
    )


def test_too_many_ids_are_counted_only(texts):
    assert texts.encode("x" * 100, 100) == (None, 101)


def test_tools_and_variables_reach_the_template(texts, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ tools | length }} {{ thinking }} {{ eos_token }}")
    assert texts.encode_chat(HELLO, 100, [{"name": "f"}], thinking=True)[1] == len("1 True ") + 1
    monkeypatch.setattr(
        tokenizer, "chat_template", {"default": "d", "tool_use": "{{ add_generation_prompt }}"}
    )
    assert texts.render(HELLO) == "d"
    assert texts.encode_chat(HELLO, 100, [{"name": "f"}])[1] == len("True")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 'x' * 10**10 }}", "more than 256 MB"),
        ("{{ '%9999999999d' % 1 }}", "more than 256 MB"),
        (
            "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
            "256 MB",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if", "TemplateSyntaxError"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_what_a_template_does_wrong_is_told_and_the_process_lives(
    texts, tokenizer, monkeypatch, template, told
):
    child = texts._process._child.pid
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(TemplateError, match=told):
        texts.render(HELLO)
    monkeypatch.undo()
    assert texts.encode("x", 9)[1] == 2
    assert texts._process._child.pid == child


def test_one_that_never_ends_is_killed_and_the_next_is_served(texts, tokenizer, monkeypatch):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", endless)
    monkeypatch.setattr(texts, "_seconds", 1)
    with pytest.raises(TemplateError, match="took longer than 1 s"):
        texts.render(HELLO)
    monkeypatch.undo()
    assert texts.encode("x", 9)[1] == 2
    os.kill(texts._process._child.pid, signal.SIGKILL)  # as the kernel does where memory is short
    texts._process._child.wait()
    assert texts.encode("x", 9)[1] == 2


def test_a_closed_one_starts_no_other(tokenizer):
    texts = TextProcess(tokenizer)
    texts.close()
    with pytest.raises(TemplateError):
        texts.encode("x", 9)
