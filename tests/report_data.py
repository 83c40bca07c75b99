"""Report data without a model, for the page: any mode, settings and labels, with plausible numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmguard.apps.report.cost import Cost, EngineCost, Latency
from vlmguard.apps.report.data import LayerPoints, ReportData
from vlmguard.apps.report.gates import GateScores
from vlmguard.apps.report.outcomes import mistakes_of, rates_of
from vlmguard.apps.report.score_separation import SSD, TEXT, Separation
from vlmguard.apps.report.sweep import ALPHAS, Strength
from vlmguard.exporter.evaluation.metrics import Evaluation
from vlmguard.exporter.evaluation.records import FirstToken, Record, Reply
from vlmguard.exporter.prompts.formats import SETTINGS
from vlmguard.exporter.prompts.labelled import LabelledPrompt
from vlmguard.graphs.manifest import DecoderRecord, FileRecord, Manifest
from vlmguard.graphs.modes import guard_mode

LABELS = ("harmful", "harmless", "borderline")
DIGEST = "80b8523799754a4574c884259089a66fc8332693a08912209df70b8fe457c709"


def report_data(
    mode: str, settings: Sequence[str] = SETTINGS, texts: int = 6, layers: int = 6, text_refuses: bool = True
) -> ReportData:
    """A guard that refuses what is harmful and one harmless prompt; with an image the unguarded model answers everything.

    Args:
        settings: that the prompts have.
        texts: prompts of each setting and label.
        layers: of the decoder; the last but two and the last but one are guarded.
        text_refuses: whether the unguarded model refuses harmful texts; otherwise there is no gap.
    """
    prompts = tuple(
        LabelledPrompt(f"{setting}-{label}-{n}", f"how to {label} {n}", label, setting)  # type: ignore[arg-type]
        for setting in settings
        for label in LABELS
        for n in range(texts)
    )
    evaluation = Evaluation(prompts, tuple(_record(n, prompt, text_refuses) for n, prompt in enumerate(prompts)))
    drawn = [prompt for prompt in prompts if prompt.label != "borderline"]
    random = np.random.default_rng(0)
    numbers, guarded = tuple(range(layers)), (layers - 3, layers - 2)
    points = [LayerPoints(n, (0.5, 0.2), *random.normal(size=(2, len(drawn), 2))) for n in numbers]
    apart = [
        Separation(layer, along, setting, side, 0.9, 2.0)
        for layer in numbers
        for along in ((TEXT, SSD) if layer in guarded else (TEXT,))
        for setting in settings
        for side in ("unguarded", "guarded")
    ]
    gates = [GateScores(n, setting, 0.5, (1.0, 2.0), (-1.0, 0.0)) for n in guarded for setting in settings]
    refused = tuple((setting, label, 3, 6) for setting in settings for label in LABELS[:2])
    return ReportData(
        name="guarded",
        prompts_file="evaluation.jsonl",
        prompts=prompts,
        max_new_tokens=16,
        manifest=_manifest(mode, guarded),
        layers=numbers,
        points=tuple(points),
        separations=tuple(apart),
        gates=tuple(gates) if guard_mode(mode).has_threshold else (),
        yardstick=evaluation.yardstick,
        rates=tuple(rates_of(evaluation)),
        mistakes=tuple(mistakes_of(evaluation)),
        sweep=tuple(Strength(a, a == 1, refused) for a in ALPHAS) if guard_mode(mode).has_alpha else (),
        cost=_cost(mode),
        anchors_auc=dict.fromkeys(guarded, 1.0),
    )


def _record(number: int, prompt: LabelledPrompt, text_refuses: bool) -> Record:
    as_text = text_refuses and prompt.label == "harmful" and prompt.setting != "typographic"
    after = as_text or prompt.id.endswith("harmless-0")
    has_image = prompt.setting != "text"
    return Record(
        number=number,
        id=prompt.id,
        setting=prompt.setting,
        label=prompt.label,
        intent=prompt.intent,
        base=_reply(as_text and not has_image),
        guarded=_reply(after),
        text_only=_reply(as_text) if has_image else None,
        first_token=FirstToken(unguarded=0.01, text_only=0.02) if has_image and prompt.label == "harmless" else None,
    )


def _reply(refused: bool) -> Reply:
    return Reply(refused=refused, tokens=4, digest="no" if refused else "yes")


def _cost(mode: str) -> Cost:
    engine = EngineCost("onnx/decoder_model_merged.engine", "decode", 41, 40, "layer 3: 7, layer 4: 7")
    latency = Latency("int4/decode", f"{mode} rank 1", "a shape", 1.01, 1.0, 1.02, 40, "a cpu, 2 cores", "2026-01-01")
    return Cost(1000, 20, 1 << 20, 1 << 10, 0, (engine,), (latency,))


def _manifest(mode: str, layers: Sequence[int]) -> Manifest:
    gated = {"tau": 0.5, "target": [2.5]} if guard_mode(mode).has_threshold else {}
    sites = [{"layer": n, "kind": "add", "rank": 1, **gated} for n in layers]
    plan: dict[str, Any] = {
        "mode": mode,
        "positions": "last",
        "lowering": "lowrank",
        "layers": list(layers),
        "sites": sites,
    }
    check = {"name": "inputs and outputs unchanged", "compared": 28, "worst": 0.0, "limit": 0.0, "ok": True, "note": ""}
    path = "onnx/decoder_model_merged.onnx"
    source = {"decoder": "decoder_model_merged.onnx", "sha256": DIGEST}
    return Manifest(
        schema_="vlmguard.guard/2",
        created="2026-01-01T00:00:00+00:00",
        files={path: FileRecord(size=1 << 20, modified_ns=0, sha256=DIGEST)},
        decoders=[DecoderRecord(path=path, source=source, plan=plan, report={}, proof=[check, check])],
        layout="onnx-community",
        proved="full",
        versions={"vlmguard": "0.1.0"},
        spec={"mode": mode, "positions": "last"},
        calibration={"mode": mode, "prompts": 306, "chosen": {"layers": list(layers)}}
        if guard_mode(mode).has_threshold
        else None,
    )
