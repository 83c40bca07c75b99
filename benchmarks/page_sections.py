"""Sections of docs/performance.md: one function per result file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from page_words import Parts, goal_words, interval_cells, markdown_table, ratio_cells

from vlmguard.graphs.modes import MODES

PRECISIONS = ("int4", "fp32")


@dataclass(frozen=True)
class Section:
    """One result file, its required parts, and the function that writes its section."""

    name: str
    parts: tuple[str, ...]
    told: Callable[[Parts], list[str]]


def _rewriting(parts: Parts) -> list[str]:
    ours = parts["export"]
    rows = [
        [name, str(one["runs"]), f"{one['wall']['median']:.2f}", f"{one['work']['median']:.2f}", *_sizes(one)]
        for name, one in parts.items()
    ]
    digests = parts["export with digests"]
    speed = digests["bytes"] / digests["work"]["median"] / 1e9
    return [
        "## Rewriting a large model",
        f"A float16 decoder of {ours['layers']} layers, width {ours['width']}, {ours['bytes'] / 1e9:.1f} GB of weights in a "
        "sparse file; mode `restore` in every layer, rank 4; a new process per run. `wall` includes the start of Python and "
        "the imports, `work` does not. Hard-linked weights do not count as written; the blocks of a reflink would.",
        markdown_table(["run", "runs", "wall s", "work s", "peak memory MB", "written MB"], rows),
        "\n".join(
            (
                goal_words("guarded without digests", ours["wall"]["median"], 2.0, "{:.2f} s", ours["wall"]),
                goal_words("peak memory", ours["peak"] / 1e6, 300.0, "{:.0f} MB"),
                goal_words("written", ours["written"] / 1e6, 20.0, "{:.1f} MB", strictly=True),
            )
        ),
        f"With digests the exporter reads and hashes every byte: {speed:.2f} GB/s over the whole work. The file is sparse, so "
        "this is the processor's speed, not a disk's.",
        *_by_default(parts),
    ]


def _by_default(parts: Parts) -> list[str]:
    """Sentences about the cost of an export with default options, including the proof."""
    said = []
    if whole := parts.get("export by default"):
        cpu = f"; {whole['cpu']:.0f} s of them are processor time" if "cpu" in whole else ""
        said.append(
            "*export by default* is `vlmguard-export MODEL --directions FILE --mode restore`: it includes the proof and all "
            f"digests. The machine's load was {whole['machine']['load']:.0f}, so the seconds are an upper bound"
            f"{cpu}. The proof is `{whole['proved'].replace(': ', '`: ', 1)}: each guard is cut out of the file and run "
            "alone, without loading the decoder's weights."
        )
    if inside := parts.get("export by default, weights inside"):
        said.append(
            f"*weights inside* is a float16 decoder of {inside['layers']} layers, width {inside['width']}, whose "
            f"{inside['bytes'] / 1e9:.2f} GB of weights are inside its one file. The proof is "
            f"`{inside['proved'].replace(': ', '`: ', 1)}."
        )
    return said


def _sizes(one: Mapping[str, Any]) -> list[str]:
    return [f"{one['peak'] / 1e6:.0f}", f"{one['written'] / 1e6:.1f}"]


def _inference(parts: Parts) -> list[str]:
    first = parts["int4/decode"]
    blocks = [
        "## The guard at inference",
        f"{first['shape']}; random weights, onnxruntime-genai's builder, ONNX Runtime on the CPU. `align` in the later two "
        "thirds of the layers is what an export without options writes; a calibrated `restore` has 1 to 3 layers. `open` is "
        "the forced state of every gate. Every subject is opened several times, in a random order; intervals are over "
        "openings.",
    ]
    for precision in PRECISIONS:
        for phase in ("decode", "prefill"):
            part = parts[f"{precision}/{phase}"]
            blocks += [
                f"### {precision}, {phase}: {work_words(part)}",
                markdown_table(_INFERENCE_COLUMNS, _inference_rows(part)),
            ]
        opened = parts[f"{precision}/opening"]["rows"]
        blocks += [
            f"### {precision}, opening a session",
            markdown_table(
                ["guard", "ratio", "median's 95%", "p10 to p90", "pairs", "ms"],
                [[row["name"], *ratio_cells(row["ratio"]), f"{row['ms']['median']:.0f}"] for row in opened],
            ),
        ]
    nodes = [
        [
            f"{name.removesuffix('/nodes')}: {row['name']}",
            f"{row['share']:.2%}",
            *(f"{row[number]:.0f}" for number in ("guard_us", "all_us", "guard_nodes")),
        ]
        for name, part in parts.items()
        if name.endswith("/nodes")
        for row in part["rows"]
    ]
    if nodes:
        blocks += [
            "### By node",
            "From ONNX Runtime's profiler, the median of each node's calls: the guard's nodes against all others. This is "
            "not wall time: it omits the time between nodes and includes the profiler's own cost for each small node.",
            markdown_table(["run", "guard / others", "guard us", "all us", "guard's nodes"], nodes),
        ]
    goals = [line for part in PRECISIONS for phase in ("decode", "prefill") for line in _goals(parts, part, phase)]
    goals += [_opening_goal(parts, precision) for precision in PRECISIONS]
    return [*blocks, "\n".join(goals)]


def _goals(parts: Parts, precision: str, phase: str) -> list[str]:
    """The goals of one part, its resolution first: smaller differences mean nothing."""
    rows, part = parts[f"{precision}/{phase}"]["rows"], f"{precision} {phase}"
    finest = max(row["resolution"] for row in rows if "resolution" in row)
    said = [goal_words(f"{part}, resolution (unguarded against itself)", finest, 0.005, "{:.2%}")]
    guarded = [row for row in rows if "mode" in row]
    for what, limit, chosen in (
        ("the default guard", 1.005, [row for row in guarded if row["mode"] == "align"]),
        ("every layer", 1.01, [row for row in guarded if row["mode"] != "align" and row["layers"] == "all"]),
    ):
        worst = max(chosen, key=lambda row: row["ratio"]["median"])
        named = f"{part}, {what} (`{worst['name']}`)"
        said.append(goal_words(named, worst["ratio"]["median"], limit, "{:.4f}x", worst["ratio"]))
    return said


def _opening_goal(parts: Parts, precision: str) -> str:
    guarded = [row for row in parts[f"{precision}/opening"]["rows"] if row["guarded"]]
    slowest = max(guarded, key=lambda row: row["ratio"]["median"])
    named = f"{precision} opening (`{slowest['name']}`)"
    return goal_words(named, slowest["ratio"]["median"], 1.05, "{:.3f}x", slowest["ratio"])


def work_words(part: Mapping[str, Any]) -> str:
    return f"{part['tokens']} token{'s' if part['tokens'] > 1 else ''}" + (
        f" on a cache of {part['past']}" if part["past"] else ""
    )


_INFERENCE_COLUMNS = [
    "guard",
    "ratio",
    "median's 95%",
    "p10 to p90",
    "pairs",
    "ms",
    "unguarded ms",
    "file MB",
]


def _inference_rows(part: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for row in part["rows"]:
        grown = (
            f"+{(row['bytes'] - part['unguarded_bytes']) / 1e6:.2f}"
            if "bytes" in row
            else f"{part['unguarded_bytes'] / 1e6:.1f}"
        )
        times = [f"{row[name]['median']:.2f}" for name in ("ms", "unguarded_ms")]
        rows.append([row["name"], *ratio_cells(row["ratio"]), *times, grown])
    return rows


def _hooks(parts: Parts) -> list[str]:
    part = parts["hooks"]
    speeds = [[row["name"], *interval_cells(row["tokens_per_second"], "{:.2f}")] for row in part["rows"]]
    ratios = [[f"time of {row['subject']} / {row['baseline']}", *ratio_cells(row["ratio"])] for row in part["ratios"]]
    return [
        "## Compared with PyTorch with forward hooks",
        f"{part['shape']}, float32, `restore` in every layer, rank {part['rank']}, gates open; {part['tokens']} tokens one at "
        f"a time on a cache of {part['past']}. torch is eager, because hooks require it. The logits of the two guarded "
        f"sides differ by {part['logits_apart']:.0e} of the largest.",
        markdown_table(["subject", "tokens/s", "median's 95%", "p10 to p90", "calls"], speeds),
        markdown_table(["pair", "ratio", "median's 95%", "p10 to p90", "pairs"], ratios),
    ]


def _supervisors(parts: Parts) -> list[str]:
    prefill = parts["prefill"]
    columns = ["method", "ratio", "median's 95%", "p10 to p90", "pairs", "ms", "unguarded ms"]
    blocks = [
        "## Mode align: a text-only pass, or paired rows",
        f"{prefill['shape']}, float32, the later two thirds of the layers, rank {prefill['rank']}; {prefill['text']} tokens of "
        f"text and {prefill['image']} of an image. Prefill is all work until the first token: `input` runs the text-only "
        "prompt and then the prompt, `rows` runs one call of two rows of the prompt's length.",
    ]
    for name in ("prefill", "decode"):
        part = parts[name]
        before = f"{part['unguarded_ms']['median']:.2f}"
        rows = [[r["name"], *ratio_cells(r["ratio"]), f"{r['ms']['median']:.2f}", before] for r in part["rows"]]
        blocks += [f"### {name}", markdown_table(columns, rows)]
    blocks += _requests(parts["request"])
    return [
        *blocks,
        "`input` adds the text's own tokens, so it is cheaper if an image has more tokens than its text. `rows` adds a second "
        "prompt of the same length; it is for runtimes that accept no further inputs.",
    ]


def _requests(part: Mapping[str, Any]) -> list[str]:
    """Whole requests."""
    before = f"{part['unguarded_ms']['median']:.0f}"
    rows = [[r["name"], *ratio_cells(r["ratio"]), f"{r['ms']['median']:.0f}", before] for r in part["rows"]]
    goals = [
        goal_words(f"a whole request in mode `{row['name']}`", row["ratio"]["median"], 1.1, "{:.4f}x", row["ratio"])
        for row in part["rows"]
        if row["name"] in MODES
    ]
    return [
        f"### request: {part['text']} tokens of text, {part['image']} of an image, {part['steps']} of the answer",
        markdown_table(["mode", "ratio", "median's 95%", "p10 to p90", "pairs", "ms", "unguarded ms"], rows),
        "\n".join(goals),
        "What both prompts begin with, a role and a system prompt, is computed twice. A cache that both use would save that "
        "part of one prefill, and needs a graph whose cache can be cut; it is not built.",
    ]


def _extraction(parts: Parts) -> list[str]:
    blocks = [
        "## Extracting directions",
        "Hidden states of all layers in one tapped pass, compared with the same forward passes without taps, batch by batch.",
        markdown_table(
            ["model", "prompts", "batches", "bare s", "tapped s", "SVD s", "tapped / bare", "batches' p10 to p90"],
            [
                [part["model"], str(part["prompts"]), str(part["batches"])]
                + [f"{part[name]:.2f}" for name in ("bare_seconds", "tapped_seconds", "svd_seconds")]
                + [f"{part['total_ratio']:.3f}", f"{part['ratio']['p10']:.3f} to {part['ratio']['p90']:.3f}"]
                for part in (parts["tiny-vlm"], parts["decoder"])
            ],
        ),
    ]
    goals = [
        goal_words(f"{part['prompts']} prompts, {part['model'].partition(':')[0]}", part["total_ratio"], 1.1, "{:.3f}x")
        for part in (parts["tiny-vlm"], parts["decoder"])
    ]
    return [*blocks, "\n".join(goals)]


def _spellings(parts: Parts) -> list[str]:
    blocks = [
        "## Variants of the guard's arithmetic",
        f"{parts['last/decode']['sites']} fused skip-norms with a small MLP between, `restore` in "
        "float32: microseconds per guarded site. `shipped` is the variant that vlmguard writes; the others compute the same "
        "result.",
    ]
    for name, part in parts.items():
        rows = [
            [row["name"], str(row["rank"]), f"{row['nodes']:.0f}", *interval_cells(row["us"], "{:.1f}")]
            for row in part["rows"]
            if row["name"] != "unguarded"
        ]
        columns = ["variant", "rank", "nodes", "us per site", "median's 95%", "p10 to p90", "pairs"]
        blocks += [f"### positions {name.replace('/', ', ')}", markdown_table(columns, rows)]
    return blocks


SECTIONS = (
    Section("rewriting", ("export", "export with digests", "onnx", "onnx_ir"), _rewriting),
    Section(
        "inference", tuple(f"{p}/{phase}" for p in PRECISIONS for phase in ("decode", "prefill", "opening")), _inference
    ),
    Section("hooks", ("hooks",), _hooks),
    Section("supervisors", ("prefill", "decode", "request"), _supervisors),
    Section("extraction", ("tiny-vlm", "decoder"), _extraction),
    Section("spellings", tuple(f"{p}/{phase}" for p in ("last", "all") for phase in ("decode", "prefill")), _spellings),
)
