"""Memory of an extraction and a calibration against the decoder's size, with the vocabulary of Gemma 3 (262,144 words).

    python benchmarks/memory_use.py                      # decoder of 0.3 GB: tied table 262144 x 256, four layers
    python benchmarks/memory_use.py --model FOLDER       # another model folder

Each stage runs in a process of its own, and its peak is what the system counted (`ru_maxrss`: pages of mapped weights
count). The weights are random: nothing here says how well a guard works, and a calibration that finds none still shows its
memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

VOCABULARY, WIDTH, LAYERS = 262_144, 256, 4
STAGES = ("open", "extract", "answer", "calibrate", "prove")
_PAIRS, _PROMPTS = 32, 8


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path)
    options.add_argument("--stage", choices=STAGES)
    args = options.parse_args()
    if args.stage is not None:
        _run(args.stage, args.model)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or large_vocabulary(Path(temporary) / "model")
        size = sum(path.stat().st_size for path in folder.rglob("*.onnx*"))
        print(f"decoder: {size / 1e6:.0f} MB")
        for stage in STAGES:
            command = [sys.executable, __file__, "--model", str(folder), "--stage", stage]
            found = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            peak, base = found["peak"], found["imports"]
            times = f"{(peak - base) / size:.2f} times the decoder without {base / 1e6:.0f} MB of imports"
            print(f"{stage:>9}: {peak / 1e6:7.0f} MB, {times}, {found['seconds']:.0f} s{found['said']}")


def _run(stage: str, folder: Path) -> None:
    from vlmguard.exporter.calibration.calibrate import calibrate
    from vlmguard.exporter.extraction.extract import extract_all_layers
    from vlmguard.exporter.last_token_model import last_token_model
    from vlmguard.exporter.opened_decoder import dissect_decoder
    from vlmguard.exporter.pipeline import export
    from vlmguard.exporter.prompts.labelled import BUILTIN, prompts_from_anchors, read_anchors
    from vlmguard.graphs.errors import GuardError
    from vlmguard.graphs.layouts import open_package
    from vlmguard.graphs.spec import GuardSpec
    from vlmguard.runtime.decoder_place import DecoderPlace
    from vlmguard.runtime.generation import Request, Sampling
    from vlmguard.runtime.onnxruntime_runner import import_onnxruntime

    import_onnxruntime()
    imports, began, said = _peak(), time.perf_counter(), ""
    package = open_package(folder)
    anatomy = dissect_decoder(package, package.load_decoder())
    model = last_token_model(package, DecoderPlace())
    pairs = read_anchors(BUILTIN)[:_PAIRS]
    if stage == "open":
        model.answer([Request("x")], Sampling(1))
    elif stage == "answer":
        model.answer([Request(pair.harmless) for pair in pairs], Sampling(8))
    elif stage == "prove":
        with tempfile.TemporaryDirectory() as out:
            directions = Path(out) / "d.safetensors"
            _write_random_directions(directions, anatomy.width, anatomy.layer_count)
            spec = GuardSpec(mode="project", layers=(1, 2))
            export(folder, Path(out) / "guarded", directions=directions, spec=spec, allow_no_effect=True)
    else:
        found = extract_all_layers(model, anatomy, pairs)
        if stage == "calibrate":
            prompts = prompts_from_anchors(read_anchors(BUILTIN, "calibration")[:_PROMPTS], model.sees)
            try:
                calibrate(model, anatomy, found, prompts, GuardSpec(mode="restore"))
            except GuardError as refused:
                said = f" ({str(refused)[:60]}...)"
    print(json.dumps({"imports": imports, "peak": _peak(), "seconds": time.perf_counter() - began, "said": said}))


def _peak() -> int:
    """Bytes; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write_random_directions(path: Path, width: int, layers: int) -> None:
    from vlmguard.graphs.directions import Directions, LayerDirections, directions_bytes

    random = np.random.default_rng(0)
    rows = (np.linalg.qr(random.normal(size=(width, 2)))[0].T.astype(np.float32) for _ in range(layers))
    found = {number: LayerDirections(np.ascontiguousarray(ssd)) for number, ssd in enumerate(rows)}
    path.write_bytes(directions_bytes(Directions(width, found)))


# The decoder


def large_vocabulary(folder: Path) -> Path:
    """A model folder in the onnx-community layout: a text decoder with a KV cache whose table is its head too."""
    import onnx
    from onnx import numpy_helper
    from shapes import _write_tokenizer

    random = np.random.default_rng(0)
    weights = {"table": random.standard_normal((VOCABULARY, WIDTH), np.float32) / 16}
    for layer in range(LAYERS):
        for name, shape in (("q", (WIDTH, 64)), ("k", (WIDTH, 64)), ("v", (WIDTH, 64)), ("o", (64, WIDTH))):
            weights[f"{name}{layer}"] = random.standard_normal(shape, np.float32) * shape[0] ** -0.5
        weights[f"u{layer}"] = random.standard_normal((WIDTH, 512), np.float32) * WIDTH**-0.5
        weights[f"d{layer}"] = random.standard_normal((512, WIDTH), np.float32) * 512**-0.5
    caches = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    inputs = "".join(f', float[B, 1, P, 64] "past_key_values.{name}"' for name in caches)
    outputs = "".join(f', float[B, 1, T, 64] "present.{name}"' for name in caches)
    body = ["y_in = Gather(table, input_ids)", "heads = Constant<value_ints = [1]>()"]
    stream = "y_in"
    for n in range(LAYERS):
        body += [
            f"q_{n} = MatMul({stream}, q{n})",
            f"k_{n} = MatMul({stream}, k{n})",
            f"v_{n} = MatMul({stream}, v{n})",
            f"qh_{n} = Unsqueeze(q_{n}, heads)",
            f"kh_{n} = Unsqueeze(k_{n}, heads)",
            f"vh_{n} = Unsqueeze(v_{n}, heads)",
            f'"present.{n}.key" = Concat<axis = 2>("past_key_values.{n}.key", kh_{n})',
            f'"present.{n}.value" = Concat<axis = 2>("past_key_values.{n}.value", vh_{n})',
            f'kt_{n} = Transpose<perm = [0, 1, 3, 2]>("present.{n}.key")',
            f"s_{n} = MatMul(qh_{n}, kt_{n})",
            f"p_{n} = Softmax<axis = -1>(s_{n})",
            f'c_{n} = MatMul(p_{n}, "present.{n}.value")',
            f"ch_{n} = Squeeze(c_{n}, heads)",
            f"a_{n} = MatMul(ch_{n}, o{n})",
            f"m_{n} = Add({stream}, a_{n})",
            f"w_{n} = MatMul(m_{n}, u{n})",
            f"t_{n} = Tanh(w_{n})",
            f"f_{n} = MatMul(t_{n}, d{n})",
            f"y_{n} = Add(m_{n}, f_{n})",
        ]
        stream = f"y_{n}"
    body += ["head = Transpose<perm = [1, 0]>(table)", f"logits = MatMul({stream}, head)"]
    text = (
        '<ir_version: 9, opset_import: ["" : 18]> '
        f"decoder (int64[B, S] input_ids, int64[B, T] attention_mask{inputs}) => (float[B, S, {VOCABULARY}] logits{outputs}) "
        f"{{ {chr(10).join(body)} }}"
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    (folder / "onnx").mkdir(parents=True)
    onnx.save(model, folder / "onnx" / "model.onnx")
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "vocab_size": VOCABULARY, "num_attention_heads": 4}
    config = {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 64, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    _write_tokenizer(folder)
    return folder


if __name__ == "__main__":
    main()
