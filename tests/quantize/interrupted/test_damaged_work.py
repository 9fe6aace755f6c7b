"""A damaged work file is named and made anew, and the result has the bytes of an undisturbed conversion."""

import re
import shutil

import pytest
from small_models import save_model, save_random_tokens

from dbrx_quant.calibration.text.tokens import load_saved
from dbrx_quant.quantize import second_pass
from dbrx_quant.quantize.budget.measure import Measurer
from dbrx_quant.quantize.conversion import convert
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.quantize.solve.stage import StageSolver
from dbrx_quant.runtime.files.errors import CheckpointError

TARGET = 4.0
DAMAGES = (
    lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :],
    lambda data: data[: len(data) // 3],
    lambda data: b"",
    lambda data: data + b" ",
    lambda data: b"[" * 100_000,
)


class Stopped(BaseException):
    """Stands for a death of the process: nothing may catch it."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    tokens = save_random_tokens(folder / "tokens.safetensors", 16, 8)
    return {
        "model": save_model(folder / "model", "dbrx"),
        "targets": (TARGET,),
        "calibration": str(tokens),
        "held_out": str(save_random_tokens(folder / "others.safetensors", 2, 8, seed=1)),
        "quiet": True,
    }


def run(asked, out):
    (result,) = convert(ConvertOptions(out=out, **asked))
    return {path.name: path.read_bytes() for path in result.folder.iterdir()}


@pytest.fixture(scope="module")
def plain(asked, tmp_path_factory):
    return run(asked, tmp_path_factory.mktemp("plain") / "out")


def stopped(asked, folder, module, function, calls):
    """The work folder of a conversion that dies at a call of a function."""
    original, left = getattr(module, function), [calls]

    def stop(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, stop)
        with pytest.raises(Stopped):
            run(asked, folder / "out")
    return folder / "out.work"


MOMENTS = {
    "measuring": (Measurer, "measure", 12),
    "quantizing": (StageSolver, "_solve", 14),
    "comparing": (second_pass, "distance", 0),
    "writing": (second_pass, "_read_distance", 0),
}


@pytest.fixture(scope="module")
def works(asked, tmp_path_factory):
    return {name: stopped(asked, tmp_path_factory.mktemp(name), *how) for name, how in MOMENTS.items()}


def kind_of(inner):
    """The path of a work file in its folder without numbers and names of linears."""
    parent, _, name = inner.rpartition("/")
    name = "N" + inner[inner.rindex(".") :] if parent.endswith("linears") else name
    return re.sub(r"\d+", "N", f"{parent}/{name}").lstrip("/")


def kinds(work):
    """Kind → some of its files: the last, and the first linear, whose block is finished."""
    found = {}
    for path in sorted(work.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            found.setdefault(kind_of(str(path.relative_to(work))), []).append(path)
    return {kind: {paths[0 if "linears" in kind else -1], paths[-1]} for kind, paths in found.items()}


@pytest.mark.parametrize("moment", MOMENTS)
def test_one_damaged_file_of_any_kind_is_named_and_made_anew(moment, works, asked, plain, tmp_path, capsys):
    tried = [path for paths in kinds(works[moment]).values() for path in sorted(paths)]
    assert len(tried) >= 6
    for i, path in enumerate(tried):
        out, work = tmp_path / f"{i}", tmp_path / f"{i}.work"
        shutil.copytree(works[moment], work)
        damaged = work / path.relative_to(works[moment])
        damaged.write_bytes(DAMAGES[i % len(DAMAGES)](damaged.read_bytes()))
        assert run(asked, out) == plain, damaged
        assert f"notice: {damaged}: damaged since it was written" in capsys.readouterr().err
        shutil.rmtree(work)


def test_everything_that_is_read_again_is_among_them(works):
    found = {kind for work in works.values() for kind in kinds(work)}
    target = "N.Nbpw-hN"
    assert found >= {
        *("job.json", "tokens.safetensors", "held-out.safetensors", "measurement.json"),
        *(
            "measure/states-N.safetensors",
            "measure/gradients-N.safetensors",
            "measure/coverage-N.json",
            "measure/linears/N.json",
        ),
        *(f"{target}/{name}.json" for name in ("predicted", "strategy", "distance")),
        *(f"{target}/{name}-N.safetensors" for name in ("states", "original", "middle")),
        f"{target}/linears/N.safetensors",
    }


def test_all_files_damaged_at_once_are_made_anew_but_what_it_was_started_with_is_refused(
    works, asked, plain, tmp_path
):
    work = tmp_path / "out.work"
    shutil.copytree(works["comparing"], work)
    for path in work.rglob("*"):
        if path.is_file() and not path.name.startswith(".") and path.name != "job.json":
            path.write_bytes(DAMAGES[0](path.read_bytes()))
    assert run(asked, tmp_path / "out") == plain
    (work / "job.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"job\.json: damaged .* --resume never"):
        run(asked | {"seed": 1}, tmp_path / "out")


def test_a_linear_that_went_missing_from_a_finished_block_is_solved_again(works, asked, plain, tmp_path):
    work = tmp_path / "out.work"
    shutil.copytree(works["quantizing"], work)
    linears = sorted((work / "4.0bpw-h6" / "linears").glob("*.layers.0.*.safetensors"))
    assert len(linears) > 10, "the first block is finished"
    linears[3].unlink()
    assert run(asked, tmp_path / "out") == plain


def test_a_linear_damaged_while_others_are_solved_is_an_error_and_not_a_result(
    asked, plain, tmp_path, monkeypatch
):
    original, out = second_pass.HeadStage, tmp_path / "out"

    def damage(*arguments):
        linear = next((tmp_path / "out.work" / "4.0bpw-h6" / "linears").glob("*w2.safetensors"))
        linear.write_bytes(DAMAGES[0](linear.read_bytes()))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(second_pass, "HeadStage", damage)
        with pytest.raises(
            CheckpointError, match=r"w2\.safetensors: damaged since .*run the same command again"
        ):
            run(asked, out)
    assert not list(out.glob("*"))
    assert run(asked, out) == plain


def test_tokens_that_come_out_otherwise_than_the_damaged_ones_are_refused(
    works, asked, tmp_path, monkeypatch
):
    work = tmp_path / "out.work"
    shutil.copytree(works["quantizing"], work)
    (work / "tokens.safetensors").write_bytes(b"")
    other = save_random_tokens(tmp_path / "other.safetensors", 16, 8, seed=3)
    monkeypatch.setattr(
        "dbrx_quant.quantize.rows.load_tokens",
        lambda *_: load_saved(other),
    )
    with pytest.raises(CheckpointError, match=r"tokens\.safetensors: was damaged, .*--resume never"):
        run(asked, tmp_path / "out")
