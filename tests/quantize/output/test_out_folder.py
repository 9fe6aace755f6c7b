"""Folders of results: unfit ones are refused before the work, one process at a time, done means looked at."""

import os
import shutil
import subprocess
import sys

import pytest
from small_models import save_model, save_random_tokens
from tiny_output import cut, delete, flip

from dbrx_quant.quantize import conversion
from dbrx_quant.quantize.conversion import convert, measure_model
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.lock import LOCK_NAME, locked
from dbrx_quant.runtime.folder.verify import verify


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("source") / "model", "llama")
    for name in ("LICENSE", "README.md"):
        (folder / name).write_text(f"the original's {name}")
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return save_random_tokens(tmp_path_factory.mktemp("tokens") / "tokens.safetensors", 4, 16)


def asked(model, tokens, out, *targets, **more):
    return ConvertOptions(
        model=model, out=out, targets=targets or (4.0,), calibration=str(tokens), quiet=True, **more
    )


def a_file(out):
    out.write_text("precious")


def below_a_file(out):
    out.parent.rmdir()
    out.parent.write_text("precious")


def a_dangling_link(out):
    out.symlink_to(out.parent / "nowhere" / "out")


def a_loop(out):
    out.symlink_to(out)


def foreign_shards(out):
    out.mkdir()
    (out / "output.safetensors").write_text("precious")


def a_model_of_others(out):
    out.mkdir()
    (out / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (out / "model.safetensors").write_text("precious")


def exllamav2s(out):
    a_model_of_others(out)
    (out / "config.json").write_text('{"quantization_config": {"quant_method": "exl2", "version": "0.2.8"}}')


def a_folder_in_the_place_of_a_file(out):
    (out / "tokenizer.json").mkdir(parents=True)


def a_lock_that_is_a_link(out):
    out.mkdir()
    (out.parent / "victim").write_text("precious")
    (out / LOCK_NAME).symlink_to(out.parent / "victim")


def a_lock_that_is_a_pipe(out):
    out.mkdir()
    os.mkfifo(out / LOCK_NAME)


def a_lock_that_is_a_folder(out):
    (out / LOCK_NAME).mkdir(parents=True)


REFUSED = {
    a_file: "not a folder",
    below_a_file: "not a folder",
    a_dangling_link: "a link that leads nowhere",
    a_loop: "a link that leads nowhere",
    foreign_shards: r"output\.safetensors: not written by this converter",
    a_model_of_others: "a model that this converter has not written",
    exllamav2s: "a model that this converter has not written",
    a_folder_in_the_place_of_a_file: r"tokenizer\.json: a folder, where a file of the result belongs",
    a_lock_that_is_a_link: r"\.lock: a link or no file",
    a_lock_that_is_a_pipe: r"\.lock: a link or no file",
    a_lock_that_is_a_folder: r"\.lock: a link or no file",
}


def everything(folder):
    """Paths and contents of all files in a folder, links as links."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_text()
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("targets", [(4.0,), (4.0, 5.0)])
def test_an_unfit_place_is_refused_before_the_work_and_left_as_it_is(make, targets, model, tokens, tmp_path):
    out = tmp_path / "results" / "out"
    options = asked(model, tokens, out, *targets, work_dir=tmp_path / "work")
    place = options.output(targets[-1])
    place.parent.mkdir(parents=True)
    make(place)
    before = everything(tmp_path)
    with pytest.raises((ValueError, OSError), match=REFUSED[make]) as refused:
        convert(options)
    assert str(place.parent) in str(refused.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("make", [a_file, a_dangling_link, a_lock_that_is_a_link, a_lock_that_is_a_pipe])
def test_an_unfit_work_folder_is_refused_and_left_as_it_is(make, model, tokens, tmp_path):
    make(tmp_path / "work")
    before = everything(tmp_path)
    with pytest.raises((ValueError, OSError), match=REFUSED[make]):
        convert(asked(model, tokens, tmp_path / "out", work_dir=tmp_path / "work"))
    assert everything(tmp_path) == before


def test_names_that_are_too_long_are_refused_before_the_work(model, tokens, tmp_path):
    for options in (
        asked(model, tokens, tmp_path / ("o" * 300), work_dir=tmp_path / "work"),
        asked(model, tokens, tmp_path / "out", work_dir=tmp_path / ("w" * 300)),
    ):
        with pytest.raises(OSError, match="name too long"):
            convert(options)
    with pytest.raises(OSError, match="name too long"):
        measure_model(asked(model, tokens, tmp_path / "m", work_dir=tmp_path / "w"), tmp_path / ("m" * 300))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written_is_found_before_the_work(model, tokens, tmp_path, monkeypatch):
    original = os.open

    def read_only(path, flags, *more, **named):
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path / "out")):
            raise OSError(30, "Read-only file system", str(path))
        return original(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"Read-only file system.*out"):
        convert(asked(model, tokens, tmp_path / "out", work_dir=tmp_path / "work"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["no/such/folder/m.json", "", "work/m.json"])
def test_a_measurement_that_cannot_be_written_there_is_refused_before_the_work(name, model, tokens, tmp_path):
    output = tmp_path / name
    (tmp_path / "work").mkdir()
    with pytest.raises((OSError, ValueError), match=r"no folder|a folder; give|lies in the work folder"):
        measure_model(asked(model, tokens, tmp_path / "m", work_dir=tmp_path / "work"), output)
    assert [path.name for path in tmp_path.rglob("*")] == ["work"]


@pytest.mark.parametrize("make", [a_file, a_dangling_link, lambda path: path.mkdir(), os.mkfifo])
def test_a_measurement_that_cannot_be_read_is_refused_before_the_work(make, model, tokens, tmp_path):
    make(tmp_path / "given.json")
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match=r"given\.json: (not a|no such) measurement"):
        convert(asked(model, tokens, tmp_path / "out", measurement=tmp_path / "given.json"))
    assert everything(tmp_path) == before


@pytest.mark.parametrize("work", ["out", "out/..", "."])
def test_a_work_folder_around_a_result_or_the_model_is_refused(work, model, tokens, tmp_path):
    with pytest.raises(ValueError, match="lies in the work folder"):
        convert(asked(model, tokens, tmp_path / "out", work_dir=tmp_path / work))
    with pytest.raises(ValueError, match="lies in the work folder"):
        convert(asked(model, tokens, tmp_path / "out", work_dir=model.parent))


def test_two_conversions_do_not_write_one_folder(model, tokens, tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom dbrx_quant.runtime.files.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    pipe, out = subprocess.PIPE, tmp_path / "out"
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for place in (out, tmp_path / "link"):
            (tmp_path / "link").is_symlink() or (tmp_path / "link").symlink_to(out)
            with pytest.raises(ValueError, match="another process is working in this folder"):
                convert(asked(model, tokens, place, work_dir=tmp_path / "work"))
        other.stdin.close()
    assert not (tmp_path / "work").exists()
    with locked(out / "5.0bpw"), pytest.raises(ValueError, match=r"5\.0bpw: another process"):
        convert(asked(model, tokens, out, 4.0, 5.0))


@pytest.fixture(scope="module")
def done(model, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    convert(asked(model, tokens, folder / "out"))
    return folder


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


FILES = (
    *(
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    *("special_tokens_map.json", "strategy.json", "conversion.json", "measurement.json", "checksums.json"),
    "LICENSE",
)


@pytest.mark.parametrize("damage", [flip, cut, delete])
@pytest.mark.parametrize("name", FILES)
def test_a_finished_result_is_looked_at_and_what_is_damaged_is_made_anew(
    name, damage, done, model, tokens, tmp_path, capsys
):
    for folder in ("out", "out.work"):
        shutil.copytree(done / folder, tmp_path / folder)
    damage(tmp_path / "out" / name)
    with pytest.MonkeyPatch.context() as patch:
        if not name.endswith(".safetensors"):
            patch.setattr(conversion, "quantize_model", None)  # small files do not cost another quantization
        convert(asked(model, tokens, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(done / "out")
    assert f"notice: {tmp_path / 'out' / name}: not as it was written" in capsys.readouterr().err


def test_a_lost_copy_of_a_lost_file_costs_another_quantization(done, model, tokens, tmp_path, capsys):
    for folder in ("out", "out.work"):
        shutil.copytree(done / folder, tmp_path / folder)
    for copy in tmp_path.rglob("tokenizer.json"):
        copy.unlink()
    convert(asked(model, tokens, tmp_path / "out"))
    assert "tokenizer.json: not as it was written; this target is quantized again" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(done / "out")


def test_what_people_add_to_a_result_stays(done, model, tokens, tmp_path):
    for folder in ("out", "out.work"):
        shutil.copytree(done / folder, tmp_path / folder)
    (tmp_path / "out" / "README.md").write_text("my card")
    (tmp_path / "out" / "evaluation.json").write_text('{"format_version": 1, "evaluations": []}')
    before = contents(tmp_path / "out")
    convert(asked(model, tokens, tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    assert verify(tmp_path / "out").ok
