"""Olive with the pass VLMGuard: the guarded decoder of each mode says what our own export's says; what later passes do to it.

Run by `run.sh`, in Olive's environment; writes build/integrations/olive.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from olive.workflows import run

import vlmguard
from integrations.replay import BUILD, Agreement, CaseFolder, Feeds, mode_folders, replay, write_result
from vlmguard.graphs.anatomy import guarded_layers
from vlmguard.graphs.directions import Directions, LayerDirections, directions_bytes
from vlmguard.graphs.graph_io import load_graph
from vlmguard.plugins.olive import GuardRefused, package_config

HERE, WORK = Path(__file__).parent, BUILD / "olive"
ROOT = HERE.parents[1]
SOURCE = ROOT / "examples" / "tiny_vlm" / "onnx-community"
OUT = WORK / "check"
# Passes behind the guard. The second rounds every weight to 8 bits; the thresholds were calibrated before (docs/plugins.md).
AFTER = {"OnnxPeepholeOptimizer": {}, "OnnxDynamicQuantization": {}}
TIDIED = 1e-4  # of a logit: what a pass may change that only rearranges


def main() -> int:
    refuses()
    from_a_checkpoint()
    agreements = {mode: as_exported(mode, cases) for mode, cases in mode_folders()}
    told = "; ".join(after_the_guard(name, settings) for name, settings in AFTER.items())
    note = f"verified where the pass left it. Passes behind it (mode restore) leave no guard.json to verify: {told}"
    return write_result("olive", "Olive (pass VLMGuard)", version("olive-ai"), agreements, note)


def as_exported(mode: str, cases: CaseFolder) -> Agreement:
    """The shipped workflow, for another mode: its folder verifies, and its decoder gives the cases' logits."""
    workflow = json.loads((HERE / "workflow.json").read_text(encoding="utf-8"))
    out = OUT / mode
    olive(workflow | {"passes": {"guard": guard_of(cases)}}, out)
    found = vlmguard.verify(out, SOURCE)
    assert found.ok and found.manifest.plan["mode"] == mode, found
    parts = cases.content["model"]
    return replay(cases, *(session(out / parts[part]) for part in ("decoder", "embed_tokens", "vision_encoder")))


def after_the_guard(name: str, settings: dict[str, Any]) -> str:
    """The decoder alone, guarded, then one more pass; in words."""
    cases = dict(mode_folders())["restore"]
    decoder = OUT / "bare" / "model.onnx"
    decoder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SOURCE / cases.content["model"]["decoder"], decoder)
    out = OUT / name
    model = {"type": "ONNXModel", "model_path": str(decoder)}
    olive({"input_model": model, "passes": {"guard": guard_of(cases), "after": {"type": name, **settings}}}, out)
    agreement = replay(cases, session(out / "model.onnx"))
    try:
        vlmguard.verify(out)
    except vlmguard.GuardError:
        pass
    else:
        raise AssertionError(f"{name} rewrote the decoder, and verify says that it is what was proved")
    assert name != "OnnxPeepholeOptimizer" or (agreement.same_tokens and agreement.largest_difference < TIDIED)
    same = "the same answers" if agreement.same_tokens else "OTHER answers"
    return f"{name} {same}, {agreement.largest_difference:.1e}"


def from_a_checkpoint() -> None:
    """`checkpoint.json`: OnnxConversion, VLMGuard, OnnxPeepholeOptimizer; the guard is in what comes out, and edits."""
    checkpoint, directions = WORK / "llama", WORK / "llama-directions.safetensors"
    save_tiny_llama(checkpoint)
    random = np.random.default_rng(0)
    ssd = {n: np.linalg.qr(random.normal(size=(64, 2)))[0].T.astype(np.float32).copy() for n in (1, 2)}
    directions.write_bytes(directions_bytes(Directions(64, {n: LayerDirections(rows) for n, rows in ssd.items()})))
    workflow = json.loads((HERE / "checkpoint.json").read_text(encoding="utf-8"))
    out = OUT / "llama"
    olive(workflow, out)
    del workflow["passes"]["guard"]
    olive(workflow, OUT / "llama-unguarded")
    guarded, unguarded = (session(folder / "model.onnx") for folder in (out, OUT / "llama-unguarded"))
    assert guarded_layers(load_graph(out / "model.onnx").graph) == (1, 2)
    ids = random.integers(3, 96, (2, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(9)[None].repeat(2, 0)}
    feeds |= {
        f"past_key_values.{n}.{kind}": np.zeros((2, 2, 0, 16), np.float32)
        for n in range(3)
        for kind in ("key", "value")
    }
    moved = np.abs(guarded(feeds)["logits"] - unguarded(feeds)["logits"])[:, -1].max()
    assert moved > 1e-3, moved


def refuses() -> None:
    """Directions of another width: Olive stops with our sentence and leaves no model; the command line exits with 1."""
    OUT.mkdir(parents=True, exist_ok=True)
    wrong = OUT / "wrong.safetensors"
    wrong.write_bytes(directions_bytes(Directions(32, {3: LayerDirections(np.eye(1, 32, dtype=np.float32))})))
    workflow = json.loads((HERE / "workflow.json").read_text(encoding="utf-8"))
    workflow["passes"] = {"guard": {"type": "VLMGuard", "mode": "project", "layers": [3], "directions": str(wrong)}}
    out = OUT / "refused"
    try:
        olive(workflow, out)
    except GuardRefused as refused:
        said = str(refused)
    else:
        raise AssertionError("Olive guarded the tiny VLM with directions of another width")
    assert said == (
        "VLMGuard: the directions have width 32, the decoder has 128; were they extracted from another model?"
    ), said
    assert not list(out.rglob("*.onnx"))
    config, passes = OUT / "refused.json", OUT / "passes.json"
    config.write_text(json.dumps(workflow | {"output_dir": str(out)}))
    passes.write_text(json.dumps(package_config()))
    command = [Path(sys.executable).with_name("olive"), "run", "--config", config, "--package-config", passes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr, (done.returncode, done.stderr[-500:])
    assert not list(out.rglob("*.onnx"))


def guard_of(cases: CaseFolder) -> dict[str, Any]:
    """The pass with a mode's own settings and directions."""
    manifest = json.loads((cases.folder / "model" / "guard.json").read_text(encoding="utf-8"))
    directions = cases.folder / "model" / "directions.safetensors"
    return {"type": "VLMGuard", "directions": str(directions), **manifest["spec"]}


def olive(workflow: dict[str, Any], out: Path) -> None:
    settings = {"output_dir": str(out), "cache_dir": str(WORK / "cache"), "log_severity_level": 3}
    run(workflow | settings, package_config=package_config())


def session(path: Path) -> Callable[[Feeds], Feeds]:
    opened = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in opened.get_outputs()]
    taken = {value.name for value in opened.get_inputs()}
    return lambda feeds: dict(
        zip(names, opened.run(None, {name: fed for name, fed in feeds.items() if name in taken}), strict=True)
    )


def save_tiny_llama(folder: Path) -> None:
    """A random checkpoint of three layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval().save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
