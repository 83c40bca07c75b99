"""What all tests share: golden files, which `pytest --update-golden` writes and a person then reviews like code."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).with_name("golden")
# They run integrations/NAME/run.sh in this checkout, each in the one build/integrations/NAME that there is.
IN_THE_CHECKOUT = (
    "integrations/test_runs.py",
    "integrations/test_olive.py",
    "integrations/test_node.py",
    "test_readme.py",
)

# Commands run in the test's own process, where it patches them; `exporter/test_budget.py` is about the default budget.
os.environ |= {"VLMGUARD_MAX_SECONDS": "0", "VLMGUARD_MAX_MEMORY": "0"}
# Lines of progress come where a machine is slow; `exporter/test_terminal.py` is about them.
os.environ |= {"VLMGUARD_PROGRESS_SECONDS": "0"}

# Exports of checkpoints are not kept; `exporter/test_cache.py` is about the cache.
os.environ |= {"VLMGUARD_CACHE": ""}

# A shell that runs the tests in the background has Ctrl-C ignored, and every command that they start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Exporters and graph libraries make millions of small objects that live: a tenth of all the time went to looking through them.
gc.set_threshold(50_000, 20, 100)


# Fixtures that export, calibrate or build something, for seconds to minutes.
MODELS = frozenset(
    {
        "bundled_pictures",
        "conversions",
        "converted",
        "generation_folders",
        "guarded",
        "llava",
        "models",
        "raw_directions",
        "served",
        "vlm",
        "wheel",
        "zoo",
    }
)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of every mode at all positions leave out what no mode can do: `align` edits the prompt's end and nothing else.

    Tests that take one of `MODELS` are marked `models`.
    """
    items[:] = [item for item in items if _is_possible(getattr(getattr(item, "callspec", None), "params", {}))]
    for item in items:
        if MODELS & set(getattr(item, "fixturenames", ())):
            item.add_marker("models")


def _is_possible(params: dict[str, Any]) -> bool:
    """`supervise` at the prompt's end has tests of its own (`graphs/test_prompt_end.py`)."""
    positions = params.get("positions")
    return not isinstance(positions, str) or (positions == "prompt") == (params.get("mode") == "align")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what golden tests compare with, and pass them")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process per file, and per graph of the zoo's matrix: what fixtures make is made once. One for all in the checkout.

    Not by `--dist loadgroup` and marks: pytest-xdist 3.8 renames the tests of a group, which pytest 9.2 does not let it.
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFileOrGraph(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if file.endswith(IN_THE_CHECKOUT):
                return "in the checkout"
            return f"{file}@{test.rpartition('@')[2]}" if file.endswith("zoo/test_matrix.py") else file

    config.option.loadscopereorder = False  # files with many tests are not those that take long; exports come first
    return ByFileOrGraph(config, log)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """`golden("name.json", content)`: plain data equals what the file holds."""

    def compare(name: str, content: Any) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        assert path.is_file(), f"{path} is missing; write it with pytest --update-golden, and look at it"
        assert json.loads(path.read_text(encoding="utf-8")) == content

    return compare
