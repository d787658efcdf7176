"""Measured schedules: their text, and what a backend without any says."""

from pathlib import Path

import marlinq
import pytest
from gptq_writer import make_layer
from marlinq.errors import InvalidArgumentError, UnsupportedError

LINE = "A GPU, 8 multiprocessors | sm90 | w4 g128 | 4096x4096 | 9-16 | sm90 tiles features=128\n"


def test_text(tmp_path: Path) -> None:
    schedules = marlinq.Schedules(f"# measured\n\n{LINE}{LINE}")
    assert len(schedules) == 2
    assert schedules.text == 2 * LINE
    assert repr(schedules) == "<marlinq.Schedules, 2 lines>"
    path = tmp_path / "schedules.txt"
    path.write_text(schedules.text)
    assert marlinq.Schedules.read(path).text == schedules.text
    assert marlinq.Schedules.read(str(path)).text == schedules.text
    assert len(marlinq.Schedules()) == 0


def test_what_is_no_schedule() -> None:
    with pytest.raises(InvalidArgumentError, match=r"schedules: line 2: .*expected 6: device"):
        marlinq.Schedules(f"{LINE}A GPU | sm90")
    with pytest.raises(FileNotFoundError):
        marlinq.Schedules.read("missing.txt")


def test_the_cpu_has_none() -> None:
    layer = make_layer(64, 256)
    arrays = layer.arrays()
    with pytest.raises(UnsupportedError, match="backend 'cpu' does not support schedules"):
        marlinq.load_gptq(**arrays, schedules=marlinq.Schedules(LINE))
    linear = marlinq.load_gptq(**arrays)
    with pytest.raises(UnsupportedError, match="backend 'cpu' does not support tune"):
        linear.tune([1])
