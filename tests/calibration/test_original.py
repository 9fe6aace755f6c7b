"""An original that goes through a text a block at a time gives the scores of the one that is loaded whole."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from places import TINY
from small_models import CONFIGS, random_tokens, save_model

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.original import KeptStates, predict
from dbrx_quant.runtime.evaluation.scores import cache_reference, evaluate, missing_windows
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.model.load_dense import load_dense


def changed(original, by=0.02):
    """A model beside the original that is no longer equal to it."""
    model, generator = copy.deepcopy(original), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by * parameter.abs().mean())
    return model


def assert_same_scores(ours, theirs):
    for name in ("kl", "kl_stderr", "ppl", "reference_ppl"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-3, abs=1e-7), name
    one = 1.01 / ours.positions  # what other last bits may change
    assert ours.top1 == pytest.approx(theirs.top1, abs=one)
    assert ours.router_topk == (theirs.router_topk and pytest.approx(theirs.router_topk, abs=one))


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("original"), request.param)


def test_streamed_scores_are_those_of_the_loaded_original(folder, tmp_path):
    original, rows = load_dense(folder), random_tokens(3, 40)
    candidate = changed(original)
    loaded = evaluate(candidate, original, rows)
    streamed = evaluate(candidate, predict(StreamedModel(folder, exact=True), rows, tmp_path), rows)
    assert loaded.kl > 1e-4
    assert loaded.top1 < 1
    assert_same_scores(streamed, loaded)


def test_scores_of_a_trained_dbrx_agree_too(tmp_path):
    original, rows = load_dense(TINY), random_tokens(2, 64)
    candidate = changed(original)
    loaded = evaluate(candidate, original, rows)
    streamed = evaluate(candidate, predict(StreamedModel(TINY, exact=True), rows, tmp_path), rows)
    assert min(loaded.router_topk) < 1
    assert_same_scores(streamed, loaded)


def test_products_are_exact_where_those_of_statistics_are_rounded(tmp_path, monkeypatch):
    monkeypatch.setenv("DBRXQ_PRODUCTS", "bfloat16")
    folder, rows = save_model(tmp_path / "model", "mixtral"), random_tokens(2, 24)
    whole = load_dense(folder)
    with torch.no_grad():
        logits = whole(rows).logits
    ours = predict(StreamedModel(folder, exact=True), rows, tmp_path)
    for row, theirs in zip(rows, logits, strict=True):
        torch.testing.assert_close(ours(row).logits, theirs, rtol=1e-4, atol=1e-4)


def test_one_block_at_a_time_is_in_memory(tmp_path, monkeypatch):
    folder, alive, most = save_model(tmp_path / "model", "mixtral"), [], []
    block = StreamedModel.block

    def counted(self, index):
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))
        live = block(self, index)
        alive.append(weakref.ref(live))
        return live

    monkeypatch.setattr(StreamedModel, "block", counted)
    predict(StreamedModel(folder, exact=True), random_tokens(2, 24), tmp_path)
    assert most == [0, 0]


def test_steps_are_attention_and_each_expert_of_every_block(tmp_path):
    seen = []
    model = StreamedModel(save_model(tmp_path / "model", "mixtral"), exact=True)
    predict(model, random_tokens(1, 8), tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = sum(1 + block.experts.count for block in model.architecture.blocks)
    assert seen == [(step + 1, total) for step in range(total)]


def test_a_row_that_it_was_not_taken_through_is_refused(tmp_path):
    model = StreamedModel(save_model(tmp_path / "model", "llama"), exact=True)
    ours = predict(model, random_tokens(1, 8), tmp_path)
    with pytest.raises(ValueError, match="was not taken through"):
        ours(random_tokens(1, 8, seed=9)[0])


def test_states_that_are_not_finite_name_their_block(tmp_path):
    def overflow(tensors):
        for name in tensors:
            if "layers.1.self_attn" in name and name.endswith(("v_proj.weight", "o_proj.weight")):
                tensors[name] *= 1e25

    model = StreamedModel(save_model(tmp_path / "model", "llama", change=overflow), exact=True)
    with pytest.raises(ValueError, match="original: output of block 1: NaN or infinity"):
        predict(model, random_tokens(1, 8), tmp_path)


# --- going on after an interruption


class Stopped(BaseException):
    pass


def stop_in_block(model, block):
    first = sum(1 + b.experts.count for b in model.architecture.blocks[:block])

    def progress(done, total):
        if done > first + 1:
            raise Stopped

    return progress


@pytest.fixture
def mixtral(tmp_path):
    return StreamedModel(save_model(tmp_path / "model", "mixtral"), exact=True)


@pytest.fixture
def blocks_run(monkeypatch):
    run, block = [], StreamedModel.block
    monkeypatch.setattr(StreamedModel, "block", lambda self, i: (run.append(i), block(self, i))[1])
    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def same_outputs(ours, theirs, rows):
    for row in rows:
        (a, chosen_a), (b, chosen_b) = ours(row), theirs(row)
        assert torch.equal(a, b)
        assert all(torch.equal(x, y) for x, y in zip(chosen_a, chosen_b, strict=True))


def test_a_stopped_walk_goes_on_behind_the_last_finished_block(mixtral, blocks_run, tmp_path):
    rows, kept = random_tokens(3, 24), KeptStates(tmp_path, "a")
    whole = predict(mixtral, rows, tmp_path)
    with pytest.raises(Stopped):
        predict(mixtral, rows, tmp_path, kept, stop_in_block(mixtral, 1))
    assert names(tmp_path) == [".states-001.safetensors.sha256", "states-001.safetensors"]
    blocks_run.clear()
    same_outputs(predict(mixtral, rows, tmp_path, kept), whole, rows)
    assert blocks_run == [1]
    blocks_run.clear()
    same_outputs(predict(mixtral, rows[1:], tmp_path, kept), whole, rows[1:])  # the first is in the cache
    assert blocks_run == []
    kept.discard()
    assert names(tmp_path) == []


@pytest.mark.parametrize("case", ["another original", "other rows", "damaged", "no checksum"])
def test_states_that_do_not_fit_are_made_anew(case, mixtral, blocks_run, tmp_path):
    rows = random_tokens(2, 24)
    predict(mixtral, rows, tmp_path, KeptStates(tmp_path, "a"))
    path = tmp_path / "states-002.safetensors"
    kept, now = KeptStates(tmp_path, "b" if case == "another original" else "a"), rows
    if case == "other rows":
        now = random_tokens(2, 24, seed=5)
    elif case == "damaged":
        path.write_bytes(path.read_bytes()[:-5] + b"12345")
    elif case == "no checksum":
        Path(tmp_path / ".states-002.safetensors.sha256").unlink()
    blocks_run.clear()
    again = predict(mixtral, now, tmp_path, kept)
    assert blocks_run == [0, 1]
    same_outputs(again, predict(mixtral, now, tmp_path), now)


def test_a_cache_is_of_one_original(mixtral, tmp_path):
    rows, cache = random_tokens(2, 24), tmp_path / "cache"
    cache_reference(predict(mixtral, rows, tmp_path), rows, cache, original="a")
    assert missing_windows(rows, cache, original="a") == []
    assert missing_windows(rows, cache) == []
    (cache / "window-00001.safetensors").unlink()
    assert missing_windows(rows, cache, original="a") == [1]
    with pytest.raises(CheckpointError, match=r"window-00000\.safetensors: made from another original"):
        missing_windows(rows, cache, original="b")
