"""The report: its data, its page, its pictures, without a browser."""

import json
import math
import re
import struct
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import report_facts
import tiny_output
from small_models import save_model, save_random_tokens

from dbrx_quant.quantize.budget.strategy import Outcome
from dbrx_quant.quantize.conversion import convert
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.evaluation.record import save_evaluation
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.scripts.cli.main import main
from dbrx_quant.scripts.report.charts import Mark, linear_ticks, log_chart, log_ticks
from dbrx_quant.scripts.report.data import LINEAR_COLUMNS, compare, gather, label, measured_kl, read_folder
from dbrx_quant.scripts.report.heatmaps import STEPS, Scale
from dbrx_quant.scripts.report.marks import count_text, digits, percent, perplexity
from dbrx_quant.scripts.report.page import render
from dbrx_quant.scripts.report.sections import bits_scale

VOID = {"meta", "link", "input", "br", "img", "rect", "path", "circle", "polyline"}


class Reader(HTMLParser):
    """Checks that tags are balanced; collects headings, ids, cells, texts and addresses."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.data = [], [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), f"an attribute twice in {tag}: {attributes}"
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [found[key] for key in ("href", "src") if key in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script" and not self.data:
            self.data = text

    def count(self, tag, **attributes):
        return sum(t == tag and attributes.items() <= found.items() for t, found in self.tags)


@pytest.fixture(scope="module")
def measured():
    return report_facts.measurement()


@pytest.fixture(scope="module")
def report(measured):
    return gather(report_facts.folder(measured))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A real conversion to two sizes."""
    folder = tmp_path_factory.mktemp("report")
    tokens = save_random_tokens(folder / "tokens.safetensors", 8, 64)
    model = save_model(folder / "small dbrx", "dbrx")
    options = ConvertOptions(model, folder / "out", (3.0, 4.0), calibration=str(tokens), quiet=True)
    return [result.folder for result in convert(options)]


# --- data


def test_a_converted_folder_gives_every_figure(converted):
    found = gather(read_folder(converted[0]))
    assert label(found).startswith("small dbrx 3.0")
    assert found["errors"] == "measured"
    assert found["headline"]["predicted_kl"] > 0
    assert found["calibration"]["source"] == "tokens.safetensors"
    rows = [dict(zip(LINEAR_COLUMNS, row, strict=True)) for row in found["linears"]["rows"]]
    assert all(value is not None for row in rows[:-1] for key, value in row.items() if key != "expert")
    assert len(found["coverage"]) == found["model"]["blocks"]
    alone = math.fsum(kl for block in found["block_kl"] for kl in block["kl"].values())
    assert alone == pytest.approx(math.fsum(row["nats"] for row in rows), rel=1e-6)
    assert 0.5 < alone / found["headline"]["predicted_kl"] < 2, "all errors at once cost more or less"
    json.dumps(found, allow_nan=False)


def test_the_curve_falls_and_passes_near_the_folders_own_point(report):
    sizes, errors = zip(*report["curve"], strict=True)
    assert list(sizes) == sorted(set(sizes))
    assert list(errors) == sorted(errors, reverse=True)
    at = min(range(len(sizes)), key=lambda i: abs(sizes[i] - report["headline"]["bpw"]))
    assert errors[at] == pytest.approx(report["headline"]["predicted_kl"], rel=0.1)


def test_what_each_bit_bought_adds_up_to_the_curve(report):
    steps, weights = report["bits_bought"], report["model"]["weights"]
    for step, after in pairwise(steps):
        assert (step["to_bpw"], step["to_kl"]) == (after["from_bpw"], after["from_kl"])
    for step in steps:
        assert sum(step["bits"].values()) == pytest.approx((step["to_bpw"] - step["from_bpw"]) * weights)
        assert step["to_kl"] < step["from_kl"]
        assert set(step["bits"]) <= {"attention", "w1", "v1", "w2"}


def test_a_folder_of_another_converter_has_what_can_be_known(tmp_path):
    out = tiny_output.make_output(tmp_path)
    (out / "measurement.json").write_text('{"measurement": {}, "last_module_idx": 7}')
    found = gather(read_folder(out))
    assert (found["errors"], found["curve"], found["bits_bought"], found["block_kl"]) == (None, [], [], [])
    assert found["model"]["experts"] == tiny_output.EXPERTS
    assert measured_kl(found) is None
    page = Reader(render(found))
    assert "bits" in page.ids
    assert "curve" not in page.ids


@pytest.mark.parametrize("name", ["strategy.json", "measurement.json"])
@pytest.mark.parametrize("content", ["{", '{"linears": []}', '{"linears": {"lm_head": {"bits": 1}}}'])
def test_a_damaged_file_is_named(name, content, tmp_path):
    out = tiny_output.make_output(tmp_path)
    (out / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        read_folder(out)


def test_a_measurement_of_another_model_is_refused(measured):
    folder = report_facts.folder(measured)
    more = {**measured.linears, "model.layers.99.self_attn.q_proj": measured.linears["lm_head"]}
    other = replace(measured, linears=more)
    with pytest.raises(CheckpointError, match=r"another model than the shards: model\.layers\.99"):
        gather(replace(folder, measurement=other))


def test_without_a_record_errors_are_predicted(measured):
    found = gather(replace(report_facts.folder(measured), record=None))
    assert found["errors"] == "predicted"
    assert label(found) == "made/3.0bpw"
    row = dict(zip(LINEAR_COLUMNS, found["linears"]["rows"][3], strict=True))
    assert row["error"] == pytest.approx(row["nats"] / measured.linears[row["name"]].energy, rel=1e-3)


def test_the_measured_divergence_is_that_of_the_most_tokens(measured):
    short = report_facts.evaluation(0.5, 3.0, "short.txt") | {"tokens": 100}
    folder = report_facts.folder(measured)
    found = gather(replace(folder, evaluations=[short, *folder.evaluations]))
    assert measured_kl(found) == (folder.evaluations[0]["kl"], "wiki.txt")
    held_out = gather(replace(folder, evaluations=[], outcome=Outcome(None, {"kl": 0.25}, [])))
    assert measured_kl(held_out) == (0.25, "held-out calibration rows")


def test_differences_are_subtracted_linear_by_linear(measured):
    low, high = (gather(report_facts.folder(measured, bpw)) for bpw in (3.0, 4.0))
    found = compare([low, high])["differences"][0]["bpw"]
    assert found == [
        round(b[4] - a[4], 4) for a, b in zip(low["linears"]["rows"], high["linears"]["rows"], strict=True)
    ]
    other = gather(report_facts.folder(report_facts.measurement(experts=0)))
    assert compare([low, other])["differences"][0]["bpw"] is None


# --- page


def test_the_page_is_whole_and_needs_no_other_file(report):
    page = Reader(render(report))
    assert all(address.startswith(("#", "data:,")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\(|@import|https?:", render(report))
    assert page.count("h1") == page.count("main") == page.count("nav") == 1


def test_the_scale_of_bits_holds_every_linear(report):
    scale = bits_scale(report)
    bits = [row[4] for row in report["linears"]["rows"][:-1]]
    assert scale.low <= min(bits)
    assert max(bits) <= scale.high < max(bits) + 0.5


def test_the_page_holds_the_same_data_as_json(report):
    assert json.loads(Reader(render(report)).data) == json.loads(json.dumps(report))


def test_every_linear_has_a_cell_for_its_bits_and_one_for_its_error(report):
    page = Reader(render(report))
    cells = [found["data-i"] for tag, found in page.tags if tag == "td" and "data-i" in found]
    linears, experts = len(report["linears"]["rows"]) - 1, 6 * 16
    assert len(cells) == 2 * linears + experts  # coverage has a cell for each expert
    assert set(cells) == {str(i) for i in range(linears)}


def named(measured, name):
    """Data where everything that comes from outside says `name`."""
    folder = report_facts.folder(measured, model=name)
    folder = replace(
        folder,
        name=name,
        evaluations=[report_facts.evaluation(0.1, 3.0, name)],
        outcome=Outcome(None, None, [name]),
        record=replace(folder.record, command=name, versions={name: name}),
    )
    data = gather(folder)
    return data, compare([data, gather(replace(folder, record=None))])


@pytest.mark.parametrize(
    "hostile", ["</script><script>alert(1)<!--", "\"'><b onload=x>&amp;", "${x}`{{y}}\\"]
)
def test_hostile_names_stay_text(hostile, measured):
    plain = re.sub(r"\S", "x", hostile)
    for data, harmless in zip(named(measured, hostile), named(measured, plain), strict=True):
        page, expected = Reader(render(data)), Reader(render(harmless))
        assert json.loads(page.data) == json.loads(json.dumps(data))
        assert [(tag, found.keys()) for tag, found in page.tags] == [
            (tag, found.keys()) for tag, found in expected.tags
        ]


def test_a_dense_model_has_no_coverage_and_one_map(measured):
    found = gather(report_facts.folder(report_facts.measurement(blocks=3, experts=0)))
    page = Reader(render(found))
    assert "coverage" not in page.ids
    assert page.count("table", role="grid") == 2


def test_several_reports_are_compared(measured):
    reports = [gather(report_facts.folder(measured, bpw, f"made/{bpw}")) for bpw in (3.0, 2.5, 4.0)]
    page = Reader(render(compare(reports)))
    assert {"numbers", "curve", "differences"} <= set(page.ids)
    assert [found["data-difference"] for _, found in page.tags if "data-difference" in found] == ["0", "1"]
    assert "dbrx-mini at 3.00, 2.50 and 4.00 bits" in render(compare(reports))
    strangers = compare([reports[0], gather(report_facts.folder(report_facts.measurement(experts=0)))])
    assert "there is nothing to subtract" in render(strangers)


# --- the verb


def test_the_verb_writes_the_page_and_prints_the_same_data(converted, tmp_path, capsys):
    save_evaluation(converted[1], report_facts.evaluation(0.02, 4.0))
    assert main(["report", str(converted[1]), "-o", str(tmp_path / "page.html"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(Reader((tmp_path / "page.html").read_text()).data) == printed
    assert printed["evaluations"] == [report_facts.evaluation(0.02, 4.0)]


def test_the_verb_compares_folders(converted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, converted)]) == 0
    out, err = capsys.readouterr()
    assert (out, err.split()[0]) == ("", "report.html")
    data = json.loads(Reader(Path("report.html").read_text()).data)
    assert [report["headline"]["target_bpw"] for report in data["reports"]] == [3.0, 4.0]


def test_json_alone_writes_no_page(converted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(converted[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format_version"] == 1
    assert list(tmp_path.iterdir()) == []


def test_the_verb_writes_pictures(converted, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = ["report", "-o", str(tmp_path / "page.html"), "--png", str(tmp_path / "png")]
    assert main([*command, str(converted[0])]) == 0
    assert main([*command, *map(str, converted)]) == 0
    found = sorted((tmp_path / "png").iterdir())
    names = ["bits", "blocks", "bought", "coverage", "curve", "difference-1", "error"]
    assert [path.name for path in found] == [f"{name}.png" for name in names]
    for path in found:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", content[16:24])) > 200


def test_pictures_without_matplotlib_are_an_error_in_one_line(converted, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(converted[0]), "--png", str(tmp_path / "png"), "--json"]) == 1
    err = capsys.readouterr().err
    assert "dbrx-quant[plots]" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "png").exists()


# --- numbers


def test_numbers_are_short():
    assert [perplexity(value) for value in (None, 1e300, 13.3561)] == ["> 1e308", "1.000e+300", "13.36"]
    found = [digits(value) for value in (0.031234, 71.58, 1234.5, 0, 2.1e-8, 0.000752)]
    assert found == ["0.0312", "71.6", "1,234", "0", "2.10e-08", "0.000752"]
    assert [percent(value) for value in (0.978759, 0.00039, 0.0)] == ["97.88 %", "0.039 %", "0 %"]
    assert [count_text(count) for count in (4096, 10223616, 131e9)] == [
        "4,096",
        "10.2 million",
        "131 billion",
    ]


def test_names_of_marks_that_lie_close_stand_one_above_the_other():
    marks = [Mark(3.0, kl, "tip", "measured", f"text {i}") for i, kl in enumerate((0.0101, 0.01, 0.0102))]
    page = log_chart("curve", [[(2.0, 0.1), (4.0, 0.001)]], marks, "bits", "nats")
    at = sorted(float(y) for y in re.findall(r'class="name" x="[\d.]+" y="([\d.]+)">text', page))
    assert len(at) == 3
    assert min(b - a for a, b in pairwise(at)) >= 16


def test_ticks_are_round_and_inside():
    assert log_ticks(0.0003, 0.03) == pytest.approx([0.0005, 0.001, 0.002, 0.005, 0.01, 0.02])
    assert len(log_ticks(1e-9, 1.0)) <= 10
    assert linear_ticks(2.1, 5.1) == [2.5, 3.0, 3.5, 4.0, 4.5, 5.0]


def test_a_scale_reaches_from_its_first_step_to_its_last():
    linear, log = Scale(2.0, 6.0), Scale(1.0, 100.0, logarithmic=True)
    assert [linear.step(value) for value in (1.0, 2.0, 4.0, 6.0, 9.0)] == [0, 0, STEPS // 2, STEPS, STEPS]
    assert [log.step(value) for value in (0.0, 1.0, 10.0, 100.0)] == [0, 0, STEPS // 2, STEPS]
    assert Scale(3.0, 3.0).step(3.0) == 0
