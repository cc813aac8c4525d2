"""Makes the examples of the model's tests importable here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "models" / "neuro"))
sys.path.insert(0, str(Path(__file__).parent))
