"""`python -m polytask` is `polytask`."""

import sys

from polytask.cli import main

sys.exit(main())
