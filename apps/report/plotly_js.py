"""plotly.js, from the installed Python package: one copy goes into the page, so that it opens without a network."""

from __future__ import annotations

from importlib.util import find_spec

from ...graphs.errors import ExtraMissing
from ...graphs.extras import install_command


def require_plotly() -> None:
    """Raises:
    ExtraMissing: plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise ExtraMissing(f"plotly is not installed; run: {install_command('report')}")


def plotly_js() -> str:
    """The whole library, minified."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
