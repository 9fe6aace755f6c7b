"""A conversation: what the model sees, where answers end, and that kept keys and values change nothing."""

import pytest
import torch
from scripted_model import scripted_folder
from tiny_output import ADDED, TOKENIZER_CONFIG, make_output, make_tokenizer

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.talk.conversation import Conversation
from dbrx_quant.runtime.talk.text_stream import TextStream
from dbrx_quant.runtime.tokenizer.load import load_tokenizer

SCRIPT = "Hi_you!🙂"


def silent(piece):
    pass


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    folder = scripted_folder(tmp_path_factory.mktemp("scripted") / "model", SCRIPT)
    return load_model(folder), load_tokenizer(folder)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = make_output(tmp_path_factory.mktemp("random"))
    return load_model(folder), load_tokenizer(folder)


@pytest.fixture
def talk(scripted):
    return Conversation(*scripted)


@pytest.fixture
def prompts(scripted, monkeypatch):
    """The texts of all prompts that the model gets."""
    model, tokenizer = scripted
    seen, generate = [], model.generate

    def watching(ids, **options):
        seen.append(tokenizer.decode(ids[0]))
        return generate(ids, **options)

    monkeypatch.setattr(model, "generate", watching)
    return seen


def test_the_answer_ends_with_the_turn(talk):
    pieces = []
    answer = talk.ask("Hello", pieces.append)
    assert (answer.text, answer.stopped, answer.tokens) == (SCRIPT, "turn", len(SCRIPT.encode()) + 1)
    assert pieces == ["H", "i", "_", "y", "o", "u", "!", "🙂"], "whole characters, as they come"
    assert talk.messages == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": SCRIPT},
    ]


def test_the_prompt_has_the_system_prompt_and_what_was_said(talk, prompts):
    talk.system = "Be kind."
    talk.ask("a", silent)
    talk.ask("b", silent)
    assert prompts[1] == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        f"<|im_start|>assistant\n{SCRIPT}<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_was_read_before_is_not_computed_again(talk, prompts, scripted):
    first = talk.ask("a", silent)
    second = talk.ask("b", silent)
    assert first.reused == 0
    assert second.reused == first.prompt_tokens + first.tokens - 1, "all but the token that was never read"
    talk.undo()
    third = talk.ask("c", silent)
    assert third.reused == second.prompt_tokens - 3 - len("c\nassistant\n") + 1, "up to the new message"
    talk.system = "x"
    assert talk.ask("d", silent).reused == 1, "only <|im_start|> is the same"


@pytest.mark.parametrize("mode", ["float", "int8"])
def test_answers_with_kept_keys_are_those_computed_anew(random_model, mode):
    """All that changes the past in between; a model with random weights forgives nothing."""
    with use_activations(mode):  # with rounded ones whole steps run natively
        compare_with_fresh_answers(*random_model)


def compare_with_fresh_answers(model, tokenizer):
    talk = Conversation(model, tokenizer, max_new_tokens=5)
    steps = [
        lambda: talk.ask("one", silent),
        lambda: talk.ask("two 2 two", silent),
        lambda: (talk.undo(), talk.ask("three", silent))[1],
        lambda: talk.retry(silent),
        lambda: (setattr(talk, "system", "s"), talk.ask("four", silent))[1],
        lambda: talk.ask("five", silent),
    ]
    reused = 0
    for step in steps:
        answer = step()
        prompt = talk._encode(talk.messages[talk._first : -1])
        fresh = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), max_new_tokens=5
        )
        made = tokenizer.decode(
            fresh[0, len(prompt) :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert answer.text == made
        assert answer.prompt_tokens == len(prompt)
        reused += answer.reused
    assert reused > 100


def interrupt_after(model, steps, monkeypatch):
    """Ctrl-C within the forward pass after `steps` whole ones, between the two layers."""
    calls = []

    def hook(module, arguments):
        calls.append(1)
        if len(calls) == steps + 1:
            raise KeyboardInterrupt

    return model.transformer.blocks[1].register_forward_pre_hook(hook)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_interruption_keeps_the_text_so_far_and_the_talk_goes_on(steps, scripted, monkeypatch):
    talk = Conversation(*scripted)
    talk.ask("before", silent)
    handle = interrupt_after(scripted[0], steps, monkeypatch)
    try:
        answer = talk.ask("Hello", silent)
    finally:
        handle.remove()
    assert (answer.stopped, answer.text) == ("interrupted", SCRIPT[:steps])
    assert [m["content"] for m in talk.messages[2:]] == ["Hello", *([SCRIPT[:steps]] if steps else [])]
    again = talk.ask("again", silent)
    assert (again.text, again.stopped) == (SCRIPT, "turn")
    lengths = {layer.get_seq_length() for layer in talk._cache.layers}
    assert lengths == {again.prompt_tokens + again.tokens - 1}
    roles = [message["role"] for message in talk.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2), "an unanswered message is not kept"


def test_an_interrupted_answer_can_be_asked_for_again(scripted, monkeypatch):
    talk = Conversation(*scripted)
    handle = interrupt_after(scripted[0], 0, monkeypatch)
    talk.ask("Hello", silent)
    handle.remove()
    assert talk.retry(silent).text == SCRIPT
    assert talk.retry(silent).text == SCRIPT
    assert len(talk.messages) == 2


def test_the_oldest_turns_are_dropped_when_the_context_is_full(talk, prompts):
    talk.system = "Be kind."
    assert talk.context == 128
    answers = [talk.ask(f"message {number}", silent) for number in range(4)]
    assert [answer.dropped for answer in answers] == [0, 0, 1, 1]
    assert max(answer.prompt_tokens for answer in answers) + 128 // 4 <= 128
    assert "message 2" in prompts[-1]
    assert "message 1" not in prompts[-1]
    assert prompts[-1].startswith("<|im_start|>system\nBe kind."), "the system prompt stays"
    assert len(talk.messages) == 8, "what was said is still there"
    talk.undo()
    assert len(talk.messages) == 6


def test_a_message_that_cannot_fit_is_refused_and_not_kept(talk):
    with pytest.raises(ValueError, match=r"that is \d+ tokens, the model takes 128"):
        talk.ask("x" * 200, silent)
    assert talk.messages == []
    assert talk.ask("x" * 80, silent).text == SCRIPT, "this one fits with less room than wanted"


def test_answers_never_leave_the_context(scripted):
    talk = Conversation(*scripted)
    answer = talk.ask("x" * 103, silent)
    assert answer.stopped == "context"
    assert answer.prompt_tokens + answer.tokens == 128


def test_a_longest_answer_is_kept_to(talk):
    talk.max_new_tokens = 4
    answer = talk.ask("Hello", silent)
    assert (answer.text, answer.stopped, answer.tokens) == ("Hi_y", "length", 4)


def test_a_conversation_can_be_set_and_begun_anew(talk):
    said = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    talk.reset(said)
    assert talk.all_messages() == said
    talk.reset()
    assert talk.all_messages() == said[:1], "the system prompt stays"
    talk.reset(said[1:])
    assert talk.all_messages() == said[1:]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}],
        [{"content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    ],
)
def test_messages_that_are_no_conversation_are_refused(talk, messages):
    talk.ask("a", silent)
    before = talk.all_messages()
    with pytest.raises(ValueError, match="message"):
        talk.reset(messages)
    assert talk.all_messages() == before


def test_there_must_be_something_to_take_back_or_to_ask_again(talk):
    with pytest.raises(ValueError, match="there is no message yet"):
        talk.undo()
    with pytest.raises(ValueError, match="there is no message yet"):
        talk.retry(silent)


def test_a_model_without_a_chat_template_is_refused(scripted, tmp_path):
    config = {key: value for key, value in TOKENIZER_CONFIG.items() if key != "chat_template"}
    make_tokenizer(tmp_path / "plain", config=config)
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(scripted[0], load_tokenizer(tmp_path / "plain"))


@pytest.mark.parametrize("seed", range(20))
def test_streamed_text_is_the_whole_text_whatever_the_tokens(scripted, seed):
    """Random bytes: characters cut short, continued by others, special tokens between."""
    _, tokenizer = scripted
    generator = torch.Generator().manual_seed(seed)
    emoji = torch.tensor(tokenizer("é🙂你")["input_ids"])
    ids = torch.cat([torch.randint(0, 261, (40,), generator=generator), emoji, emoji[:3]])
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for number in ids:
        stream.put(number[None])
    stream.end()
    stream.end()
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == stream.text == whole
    assert not any(marker in whole for marker in ADDED)
    assert stream.ids == ids.tolist()
