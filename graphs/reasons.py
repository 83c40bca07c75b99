"""The decisive part of a third-party error, as one clause for our own sentences.

Libraries put the reason in different places: onnxruntime behind a status code, a path and a C++ signature, torch behind a
page of advice, onnx_ir in the chained exception, jinja in an attribute. The first 160 characters often hold none of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

LONGEST = 400  # characters of a clause; a longer one loses its middle, because the reason stands at either end
_HEAD = 250
_READ = 3000, 1000  # characters to read at the start and at the end; names in a message may have any length

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# Wrappers that name their own work and leave the reason to the exception behind them (onnx_ir).
_WRAPPED = re.compile(r"^(?:Error calling \w+ with\b|An error occurred when running the '.*?' pass\b)")

# onnxruntime, C++, torch
_MEMORY = re.compile(r"bad_alloc|[Aa]llocate memory|[Oo]ut of memory|not enough memory")

Rewrite = Callable[[re.Match[str]], str]

_SOURCE = r"\.(?:h|hpp|cc|cpp|cu|cuh):\d+ "
# What carries no reason; taken away wherever it stands.
_NOISE: tuple[re.Pattern[str], ...] = (
    re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : "),
    re.compile(r"^Exception during (?:initialization|loading): "),
    re.compile(r"^Load model from .*? failed:\s*(?:Load model .* failed\. )?"),
    # `/onnxruntime_src/core/x.h:91 ns::Function(const T&, bool) const `: a source line with its signature
    re.compile(
        rf"(?:/|[A-Za-z]:\\)\S+{_SOURCE}"
        r"(?:[^()]*::[^()]*(?:\([^()]*\))+(?:::<lambda\([^()]*\)>)?(?: const)?(?: \[with [^\]]*\])? )?"
    ),
    re.compile(rf"\b\w+{_SOURCE}[\w:~]+ "),  # `tensorprotoutils.cc:2201 GetExtDataFromTensorProto `: and its function
    re.compile(r"\s*Please fix either the inputs(?:/outputs)? or the model\.?"),
    re.compile(r"\[ShapeInferenceError\] (?:Inference error\(s\): )?"),
)


def _operator(domain: str, name: str) -> str:
    return f"operator {domain}::{name}" if domain not in ("", "ai.onnx") else f"operator {name}"


def _sizes(found: re.Match[str]) -> str:
    axes = re.findall(r"index: (\d+) Got: (-?\d+) Expected: (-?\d+)", found[2])
    return f"input {found[1]} has the wrong size: " + ", ".join(f"axis {n} is {got}, not {due}" for n, got, due in axes)


def _node(found: re.Match[str]) -> str:
    return f"{found[1]} node {found[2]!r}: {found[3]}"


# Shorter forms of known messages. The first match is used.
_REWRITES: tuple[tuple[re.Pattern[str], Rewrite], ...] = tuple(
    (re.compile(pattern, re.DOTALL), rewrite)
    for pattern, rewrite in (
        # onnxruntime, opening
        (
            r"^Fatal error: (\S*?):(\w+)\(-?\d+\) is not a registered function/op",
            lambda m: f"{_operator(m[1], m[2])} is unknown",
        ),
        (
            r'In Node, \("(.*?)", (\w+), "(.*?)", -?\d+\) : .*?, Error No Op registered for \w+ with domain_version of (\d+)',
            lambda m: f"{_operator(m[3], m[2])} of node {m[1]!r} is unknown in opset {m[4]}",
        ),
        (
            r'In Node, \("(.*?)", (\w+), "(.*?)", -?\d+\) : .*?, Error (.*)',
            lambda m: f"{_operator(m[3], m[2])} of node {m[1]!r}: {m[4]}",
        ),
        (
            r"Opset (\d+) is under development.*official support for domain (\S+) is till opset (\d+)",
            lambda m: f"opset {m[1]} of {m[2]} is newer than the newest that it reads, {m[3]}",
        ),
        (r"^Node \((.*?)\) Op \((\w+)\) (.*)", lambda m: f"{m[2]} node {m[1]!r}: {m[3]}"),
        # onnxruntime, running
        (r"Non-zero status code returned while running (\w+) node\. Name:'(.*?)' Status Message: (.*)", _node),
        (r"Got invalid dimensions for input: (\S+) for the following indices(.*)", _sizes),
        # onnx
        (
            r"No Op registered for (\w+) with domain_version of (\d+)(?: ==> Context: .*?Name: (\S*) OpType)?",
            lambda m: f"operator {m[1]}{f' of node {m[3]!r}' if m[3] else ''} is unknown in opset {m[2]}",
        ),
        (r"^\(op_type:(\w+), node name: (.*?)\): (.*)", _node),
        # torch: the summary behind the advice, without the advice behind the summary
        (
            r"## Exception summary <class '(?:[\w.]+\.)?(\w+)'>: (.*?)(?: consider using | Caused by: | \(Refer to |$)",
            lambda m: f"{m[1]}: {m[2]}",
        ),
        # transformers appends every supported model to the reason
        (r"^(Unrecognized model.*?)\. Should (?:contain|have) .*", lambda m: m[1]),
        # Pillow, for a file in memory
        (r"^cannot identify image file <.*>$", lambda m: "it is in no known image format"),
    )
)


def reason_of(error: BaseException) -> str:
    """The reason in an error: one line of at most about `LONGEST` characters, never empty.

    Args:
        error: raised by another library or Python.
    """
    error = _innermost(error)
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing" if error.args else "a key is missing"
    text = _bounded(str(error))
    said = _rewritten(_one_line(text)) or _rewritten(_one_line(_first_paragraph(text)), default=True)
    line = getattr(error, "lineno", None)  # jinja
    if isinstance(line, int) and said and f"line {line}" not in said:
        said = f"{said}, line {line}"
    return _shortened(said or type(error).__name__)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a lack of memory, so that the file is not at fault."""
    return isinstance(error, MemoryError) or _MEMORY.search(str(error)) is not None


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None and _WRAPPED.match(str(error).strip()):
        error = error.__cause__
    return error


def _rewritten(text: str, default: bool = False) -> str | None:
    for noise in _NOISE:
        text = noise.sub(" ", text).strip()
    text = " ".join(text.split()).removesuffix(".")
    for pattern, rewrite in _REWRITES:
        found = pattern.search(text)
        if found is not None:
            return rewrite(found).strip()
    return text if default else None


def _first_paragraph(text: str) -> str:
    """Up to the first empty line: what follows is advice, a trace or a listing."""
    return re.split(r"\n\s*\n", _ANSI.sub("", text).strip(), maxsplit=1)[0]


def _bounded(text: str) -> str:
    start, end = _READ
    return text if len(text) <= start + end else f"{text[:start]} ... {text[-end:]}"


def _one_line(text: str) -> str:
    return " ".join(_ANSI.sub("", text).split())


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:_HEAD].rstrip()} ... {text[_HEAD - LONGEST :].lstrip()}"
