from __future__ import annotations

import pytest

from polytask.errors import ConfigError, MissingExtra, nearest, suggestion
from polytask.registry import Registry


def test_nearest_finds_the_misspelt_name() -> None:
    assert nearest("lable", ["text", "label"]) == "label"


def test_nearest_is_none_when_nothing_is_close() -> None:
    assert nearest("zzz", ["text", "label"]) is None


def test_suggestion_lists_the_choices_when_nothing_is_close() -> None:
    assert suggestion("zzz", ["text", "label"]) == " Known: label, text."


def test_suggestion_is_empty_without_choices() -> None:
    assert suggestion("x", []) == ""


def test_missing_extra_has_the_install_line() -> None:
    assert 'pip install "polytask[neuro]"' in str(MissingExtra("pynwb", "neuro", "reading NWB"))


def test_registry_names_the_nearest_entry() -> None:
    shapes = Registry[int]("shape")
    shapes.add("circle", 1)
    with pytest.raises(ConfigError, match=r"unknown shape 'circel'. Did you mean 'circle'\?"):
        shapes.get("circel")


def test_registry_refuses_a_second_entry_of_one_name() -> None:
    shapes = Registry[int]("shape")
    shapes.add("circle", 1)
    with pytest.raises(ValueError, match="registered already"):
        shapes.add("circle", 2)
