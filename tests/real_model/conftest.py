"""The scripts of examples/real_model are imported as they import each other: by their bare names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "real_model"))
