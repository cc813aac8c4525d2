from __future__ import annotations

from pathlib import Path

import pytest

from polytask.configs import Config, load_yaml, parse
from polytask.errors import ConfigError


class Inner(Config):
    rate: float = 0.1


class Outer(Config):
    inner: Inner = Inner()
    named: dict[str, Inner] = {}
    steps: int = 1


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"a.yaml: unknown key 'stpes'. Did you mean 'steps'\?"):
        parse(Outer, {"stpes": 1}, "a.yaml")


def test_an_unknown_nested_key_names_the_nearest_of_its_level() -> None:
    with pytest.raises(ConfigError, match=r"'inner.rtae'. Did you mean 'rate'\?"):
        parse(Outer, {"inner": {"rtae": 1}}, "x")
    with pytest.raises(ConfigError, match=r"'named.a.rtae'. Did you mean 'rate'\?"):
        parse(Outer, {"named": {"a": {"rtae": 1}}}, "x")


def test_a_wrong_type_names_key_and_value() -> None:
    with pytest.raises(ConfigError, match=r"key 'steps' = 'many'.*integer"):
        parse(Outer, {"steps": "many"}, "x")


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"inner.*steps"):
        parse(Outer, {"steps": "many", "inner": {"rate": "fast"}}, "x")


def test_a_key_given_twice_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("tasks:\n  a: 1\n  a: 2\n")
    with pytest.raises(ConfigError, match=r"line 3: 'a' is given twice"):
        load_yaml(path)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "just words"])
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_yaml(tmp_path / "none.yaml")
