"""Errors a user can act on: each names what is wrong, where, and what to do.

`UserError` and its children mean that the input is at fault (the command line prints the message
without a traceback and exits with 2). Everything else is our fault (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolytaskError(Exception):
    """Base of every error that polytask raises on purpose."""


class UserError(PolytaskError):
    """The user's input is at fault; the message says where and what to do. Exit code 2."""


class ConfigError(UserError):
    """A configuration has an unknown key, a wrong type or an impossible combination."""


class DataError(UserError):
    """A file, column, row or cell cannot be used."""


class TaskError(UserError):
    """A task as declared does not fit its data."""


class CheckpointError(UserError):
    """A checkpoint is torn, altered, missing a part, or belongs to another configuration."""


class MergeError(UserError):
    """Models, adapters or task vectors cannot be merged as asked."""


class AdaptError(UserError):
    """Adapters cannot be attached, trained, loaded or folded as asked."""


class NonFiniteError(PolytaskError):
    """A loss or gradient became NaN or infinite; raised before the update touches the weights."""


class MissingExtra(UserError):
    """An optional dependency is needed; the message has the line that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}'. Install it with: "
            f'pip install "polytask[{extra}]"'
        )


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when nothing is close."""
    found = difflib.get_close_matches(str(name), [str(c) for c in choices], n=1, cutoff=0.6)
    return found[0] if found else None


def suggestion(name: str, choices: Iterable[str]) -> str:
    """' Did you mean 'x'?' or the list of choices; ready to append to a message."""
    options = sorted(str(c) for c in choices)
    best = nearest(name, options)
    if best is not None:
        return f" Did you mean '{best}'?"
    shown = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return f" Known: {shown}." if options else ""
