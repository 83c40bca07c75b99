"""Options with a fixed set of values. Imports nothing heavy: the command line reads these before it runs a command.

`graphs/spec.py` has the choices of a `GuardSpec`, `graphs/new_files.py` those of `--data`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from ..graphs.modes import Mode

WantedMode = Literal["auto", Mode]
WantedProof = Literal["auto", "full", "local", "structure"]
ExporterName = Literal["transformers", "genai", "optimum"]
Precision = Literal["fp32", "fp16", "w16a32", "int4"]
EstimatorName = Literal["svd", "mean", "lda", "logistic"]
ReadoutName = Literal["lda", "logistic", "mean"]


def one_of(choice: Any) -> str:
    """The values of a `Literal` as help shows them: `a|b|c`."""
    return "|".join(get_args(choice))
