"""`--gpu-memory` of the verbs that run a model."""

import pytest
from cli_runs import run
from fake_gpu import pretend_gpu
from gpu_limits import room_for
from tiny_output import make_output

from dbrx_quant.runtime.hybrid.gpu_plan import GpuMemory
from dbrx_quant.runtime.model import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_output(tmp_path_factory.mktemp("finished"))


class Seen(Exception):
    """A model was going to be loaded."""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "What is", "--max-new-tokens", 4], (7, 1)),
        (["chat"], (None, 1)),
        (["serve", "--port", 0, "--context", 77], (77, 1)),
        (["serve", "--port", 0], (None, 1)),
        (["eval", "--text", "TEXT", "--cache", ".", "--length", 8, "--windows", 2], (8, 8)),
    ],
)
def test_a_verb_plans_for_the_tokens_that_it_knows_of(
    arguments, expected, folder, tmp_path, capsys, monkeypatch
):
    seen = []

    def note(*_, gpu_memory=None, **options):
        seen.append(gpu_memory)
        raise Seen

    monkeypatch.setattr(load, "load_model", note)
    if arguments[0] == "serve":
        server = pytest.importorskip("dbrx_quant.runtime.talk.server")
        monkeypatch.setattr(server, "build_app", note)
    (tmp_path / "text").write_text("What is a list? " * 20)
    verb, *rest = [tmp_path / "text" if one == "TEXT" else one for one in arguments]
    run(capsys, verb, folder, *rest, "--gpu-memory", "22GB", "--quiet")
    (found,) = seen
    assert isinstance(found, GpuMemory)
    assert found.limit == 22 * 10**9
    assert found.logits == expected[1]
    assert found.context is not None if verb == "generate" else found.context == expected[0]


def test_generate_tells_what_is_where_and_answers(folder, capsys, emulated, monkeypatch):
    pretend_gpu(monkeypatch)
    limit = room_for(folder, 0.55, 2, context=9).limit  # of which the prompt has seven
    arguments = ["generate", folder, "What is", "--max-new-tokens", 2, "--gpu-memory", limit, "--quiet"]
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert out.strip()
    assert "GPU: " in err
    assert "experts on the GPU: 1 of 2 in every block; " in err
    assert "main memory: the other experts, " in err


def test_what_cannot_be_is_one_line_with_the_way_out(folder, capsys, monkeypatch):
    code, _, err = run(capsys, "generate", folder, "What is", "--gpu-memory", "1MB", "--quiet")
    assert code == 1
    assert "gpu memory: 1.00 MB are too little: " in err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run(capsys, "generate", folder, "What is", "--gpu-memory", "1GB", "--quiet")
    assert (code, "device cuda: " in err) == (1, True)
