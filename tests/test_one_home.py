"""What has one home in the package, and does not grow a second one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("graphs", "runtime", "exporter", "apps", "plugins", "benchmarks")
SOURCES = [ROOT / "__init__.py", ROOT / "cli.py", *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]

# What is written: a pattern, and the files that may match it.
HOMES = {
    "the table of element types": (
        r"[\"']tensor\((float|double|u?int|bool|\{)|DataType\.FLOAT16: *(np\.|ml_dtypes|\")",
        {"graphs/dtypes.py"},
    ),
    "the longest sequence of a model, as its configs declare it": (
        r"\[?[(\"]max_position_embeddings\", \"n_positions|get\(\"max_position_embeddings",
        {"graphs/package.py"},
    ),
    "how a few rows are chosen of many": (
        r"linspace\(0, len\(|\[::-?-?step\]|:: *max\(1, -\(-len",
        {"exporter/prompts/thinning.py"},
    ),
    # the decoder itself (prompts a token a call), the end of a prompt, and a roll on fixed tokens; every answer is the loop's
    "calls of a decoder after its first one": (
        r"(session|decoder|self)\.step\(",
        {
            "runtime/decode_loop.py",
            "runtime/decoder.py",
            "exporter/calibration/align_trial.py",
            "exporter/proof/prove_closed.py",
            "benchmarks/gpu.py",
        },
    ),
    "the tokens of an answer, row by row": (r"(zip|enumerate)\((\w+, )?step\.tokens", {"runtime/decode_loop.py"}),
    "the user's cache folder": (r"XDG_CACHE_HOME", {"graphs/user_cache.py"}),
    # see `families/transformers_class.py`
    "what makes a type checker read every model of transformers": (
        r"(?m)^\s*(import transformers( |$|\.\w)|from transformers import )",
        {"benchmarks/hooks.py", "benchmarks/shapes.py", "benchmarks/torch_decoder.py"},  # pyright does not read these
    ),
    "the clock": (r"\btime\.(time|gmtime|localtime|strftime)\(|\bdatetime\.(now|utcnow|today)\(", {"graphs/clock.py"}),
    "what SOURCE_DATE_EPOCH means": (r"environ.*SOURCE_DATE_EPOCH|= \"SOURCE_DATE_EPOCH\"", {"graphs/clock.py"}),
    "the manifest's writer": (r"\.to_text\(\)\.encode\(\)", {"graphs/manifest.py"}),
}


@pytest.mark.parametrize("what", HOMES)
def test_one_home(what: str) -> None:
    pattern, homes = HOMES[what]
    assert len(SOURCES) > 250
    found = {path for path in SOURCES if re.search(pattern, path.read_text(encoding="utf-8"))}
    assert {path.relative_to(ROOT).as_posix() for path in found} == homes
