"""Continuous integration draws the same examples every time; elsewhere new ones are looked for.

No deadlines: a first example that imports something, or a busy machine, is not a fault.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("here", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")
