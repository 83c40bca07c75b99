"""The page: one HTML file with its style, its scripts and plotly.js inside, that reaches for nothing on any network.

Two fences around whatever stands in files (prompts, names): the template escapes every value, and the page's own content
security policy runs only the two scripts whose digests it names, so that a value which slipped through would be inert.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...graphs.modes import MODES, guard_mode
from ...graphs.strict_json import to_strict_json
from . import report_tables
from .data import ReportData
from .figures import SETTING_WORDS, make_figures
from .glossary import explained
from .plotly_js import plotly_js

_HERE = Path(__file__).parent


def make_page(data: ReportData, made: str) -> str:
    """The HTML; the same data and time give the same text.

    Args:
        made: date and time that the page shows.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    figures = make_figures(data)
    library, script = (text.replace("\r\n", "\n") for text in (plotly_js(), _read("page.js")))
    return environment.get_template("page.html").render(
        data=data,
        made=made,
        tables=report_tables,
        setting_words=SETTING_WORDS,
        explained=explained,
        modes={name: guard_mode(name).summary for name in MODES},
        figures=figures,
        figures_json=Markup(in_script(figures)),
        library=Markup(library),
        script=Markup(script),
        style=Markup(_read("page.css")),
        policy=_policy(library, script),
    )


def in_script(content: Any) -> str:
    """JSON for a `<script>` element, escaped so that no prompt can end the element."""
    text = to_strict_json(content, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy(*scripts: str) -> str:
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # plotly.js writes style elements and attributes, and images of its own charts when the user saves one
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
