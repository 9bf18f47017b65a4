import os
import sys

import pytest

from skill_hf.cli.text import Parser, align, print_result, shorten


def test_first_column_starts_at_the_left():
    rows = [["a", "10", "1"], ["long", "1", "200"]]
    assert align(rows) == ["a      10     1", "long    1   200"]
    assert align(rows, gap=" ") == ["a    10   1", "long  1 200"]


def test_long_and_hostile_names():
    assert shorten("a\x1b[2J\nb", 20) == "a?[2J?b"
    assert shorten("x" * 40 + "end", 20) == "xxxxx..." + "x" * 9 + "end"


def test_wrong_options_are_one_line():
    with pytest.raises(ValueError, match="the following arguments are required: model; --help lists all options"):
        parser = Parser()
        parser.add_argument("model")
        parser.parse_args([])


def test_a_reader_that_has_seen_enough(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        print_result("text")  # and nothing when the stream is closed
