"""The frame of the command line: help, nearest names, exit codes, start-up time."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from polytask import __version__, cli


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_alone_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "polytask train" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"polytask {__version__}"


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_an_unknown_option_is_the_users_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--no-such-option"]) == 2
    assert "no-such-option" in capsys.readouterr().err


def test_help_needs_less_than_half_a_second() -> None:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "polytask", "--help"], check=True, capture_output=True
        )
        return time.perf_counter() - start

    assert min(once() for _ in range(3)) < 0.5
