"""What the documentation says must work: configurations parse, Python runs, commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from polytask import cli, systems
from polytask.configs import parse
from polytask.merge import config as merging
from polytask.merge import mergekit
from polytask.pipeline import learned, parse_config
from polytask.pipeline.localize_config import LocalizeConfig
from polytask.pipeline.pretraining_config import PretrainRunConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for number, (language, text) in enumerate(BLOCK.findall(page.read_text("utf-8"))):
            if language in languages:
                found.append((f"{page.name}:{number}", text))
    return found


def cases(*languages: str) -> pytest.MarkDecorator:
    found = blocks(*languages)
    return pytest.mark.parametrize("text", [t for _, t in found], ids=[n for n, _ in found])


@cases("yaml")
def test_every_configuration_parses(text: str) -> None:
    values = yaml.safe_load(text)
    if {"corpus", "objective", "model"} & set(values) and "tasks" not in values:  # pretrain
        whole = {"corpus": "texts", "objective": "ul2r", **values}
        assert parse(PretrainRunConfig, whole, "the page").corpus
    elif "finetuned" in values:  # polytask localize
        assert LocalizeConfig(**values).sparsity
    elif "merge_method" in values:  # polytask merge
        assert mergekit.recipe_of(values).parts
    elif values.get("method") == learned.METHOD:
        assert learned.learning_of(values, Path()).recipe.parts
    elif "method" in values:
        assert merging.recipe_of(merging.parse_config(values)).parts
    else:
        assert parse_config(values).tasks


@pytest.mark.slow
@cases("python")
def test_every_python_example_runs(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "example", "exec"), {"__name__": "__example__"})


COMMANDS = [
    (name, line.split("#")[0].strip())
    for name, text in blocks("bash", "text")
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("polytask ")
]


@pytest.mark.parametrize(("name", "line"), COMMANDS, ids=[f"{n} {c}" for n, c in COMMANDS])
def test_every_command_and_option_exists(
    name: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = shlex.split(line)[1:]
    assert command in cli.COMMANDS
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    if command in ("graft", "infer", "mixture"):  # have commands of their own
        assert cli.main([command, rest[0], "--help"]) == 0
        shown += capsys.readouterr().out
    if command == "run":  # a system's own settings are options too
        shown += " ".join(f"--{field}" for field in systems.load(rest[0]).config.model_fields)
    for word in rest:
        if word.startswith("--"):
            assert word.split("=")[0] in shown, f"{command} has no option {word}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [c for n, c in COMMANDS if n.startswith("README")], ids=lambda line: line
)
def test_readme_commands_run(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the files a reader would have; training is cut short, nothing else is changed."""
    monkeypatch.chdir(tmp_path)
    make_my_data(tmp_path)
    arguments = shlex.split(line)[1:]
    short = ["--set", "train.steps=3", "--set", "train.progress=false", "--set", "model.dim=32"]
    if arguments[:2] != ["train", "--init"]:
        assert cli.main(["train", "--init", "my_data/"]) == 0
    if arguments[0] == "predict":
        assert cli.main(["train", "my_data/polytask.yaml", *short]) == 0
    if arguments[0] == "train" and "--init" not in arguments:
        arguments += short
    assert cli.main(arguments) == 0, capsys.readouterr().err


def make_my_data(folder: Path) -> None:
    """stars.csv with text and a label, and new.csv to predict on."""
    (folder / "my_data").mkdir()
    good, bad = "it was great and lovely", "it was broken and dull"
    lines = [f"{good if i % 2 else bad} {i},{'five' if i % 2 else 'one'}" for i in range(80)]
    (folder / "my_data" / "stars.csv").write_text("\n".join(["body,stars", *lines]) + "\n")
    (folder / "new.csv").write_text("body\nso lovely\nso dull\n")
