"""The pictures are PNG files, the same every time, and say what is missing where they cannot be drawn."""

import struct
import sys

import pytest

from dbrx_quant.quantize.publish.pictures import SizePoint, error_curve_png

POINTS = [SizePoint(4.25, 0.004, "4.25bpw"), SizePoint(2.5, 0.09, "2.5bpw"), SizePoint(3.0, 0.03, "3.0bpw")]


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_the_error_curve_is_a_png_with_the_same_bytes_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    predicted = [SizePoint(2 + i / 10, 0.2 / 4**i) for i in range(20)]
    first = error_curve_png(POINTS, tmp_path / "a.png", predicted=predicted, marked="3.0bpw", title="<$x_{>")
    second = error_curve_png(POINTS, tmp_path / "b.png", predicted=predicted, marked="3.0bpw", title="<$x_{>")
    assert png_size(first) == (1152, 704)
    assert first.read_bytes() == second.read_bytes()
    plain = error_curve_png(POINTS, tmp_path / "c.png")
    assert plain.read_bytes() != first.read_bytes()


def test_a_single_point_and_a_prediction_alone_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert png_size(error_curve_png(POINTS[:1], tmp_path / "a.png"))
    assert png_size(error_curve_png([], tmp_path / "b.png", predicted=POINTS))


@pytest.mark.parametrize(
    ("points", "message"), [([], "no points"), ([SizePoint(3, 0.0, "x")], "x: a KL divergence of 0.0")]
)
def test_nothing_to_draw_is_an_error(points, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        error_curve_png(points, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'dbrx-quant\[plots\]'"):
        error_curve_png(POINTS, tmp_path / "a.png")
