"""Whether onnxruntime-genai generates from guarded folders what onnxruntime does, token for token.

The tiny VLM's language model becomes a genai folder by genai's own builder, and is guarded in each mode with the directions
that the cases have: its states are the same. onnxruntime runs the same guarded graph through `GuardedVLM`; `NumpyDecoder`,
which never saw it, says what both should give.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from safetensors.numpy import load_file

import vlmguard
from integrations.genai.answer import answer, start
from integrations.numpy_vlm import ORACLE_LIMIT, NumpyDecoder
from integrations.replay import BUILD, CASES, Agreement, write_result
from integrations.tiny_vlm import CHECKPOINT, MODES, PROMPTS, calibrated_directions, plan_of, spec_of
from vlmguard.exporter.checkpoints.exporters import export_checkpoint
from vlmguard.exporter.prompts.labelled import read_prompts
from vlmguard.graphs.reference import NO_SUPERVISOR
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.paired_batches import interleaved

ASKED = ("text-harmful-steal-0", "text-harmful-steal-1", "text-harmless-wash-0", "text-harmless-wash-1")
NOTE = (
    "text prompts, of the tiny VLM's language model as genai builds it (fp32); the supervisor is fed with "
    "`Generator.set_model_input`, without it genai refuses to run; `align --supervisor rows` in batches of two: {} tokens, "
    "{:.1e}"
)


def main() -> int:
    directions = calibrated_directions(CASES / "directions")
    prompts = {prompt.id: prompt.prompt for prompt in read_prompts([PROMPTS / "evaluation.jsonl"])}
    folder = BUILD / "genai"
    unguarded = folder / "unguarded"
    build(unguarded)
    agreements = {}
    for mode in MODES:
        out = folder / mode
        shutil.rmtree(out, ignore_errors=True)
        # force: the directions come from the onnx-community graph of the same model
        vlmguard.export(unguarded, out, spec=spec_of(mode, directions), directions=directions, force=True)
        agreements[mode] = compare(out, unguarded, [prompts[one] for one in ASKED])
    rows = folder / "rows"
    shutil.rmtree(rows, ignore_errors=True)
    spec = replace(spec_of("align", directions), supervisor="rows")
    # without an image each prompt is its own text: nothing is to be copied until other texts are put in front
    vlmguard.export(unguarded, rows, spec=spec, directions=directions, force=True, allow_no_effect=True)
    paired = compare_rows(rows, [prompts[one] for one in ASKED])
    assert paired.ok, paired
    note = NOTE.format(paired.tokens, paired.largest_difference)
    return write_result(
        "genai", "onnxruntime-genai (CPU)", version("onnxruntime-genai"), agreements, note, pictures=False
    )


def build(out: Path) -> None:
    """The genai folder of the tiny VLM's language model."""
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

    shutil.rmtree(out, ignore_errors=True)
    whole = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT)
    text = LlamaForCausalLM(whole.config.text_config)
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    with tempfile.TemporaryDirectory() as scratch:
        text.save_pretrained(scratch)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(CHECKPOINT / name, Path(scratch) / name)
        export_checkpoint(scratch, out, "genai", "fp32", None, report_progress=lambda *_: None)


def compare(out: Path, unguarded: Path, prompts: list[str]) -> Agreement:
    """genai against onnxruntime on the same guarded folder, and both against numpy."""
    vlm, model = vlmguard.GuardedVLM.open(out, runtime="onnxruntime-cpu"), og.Model(str(out))
    oracle = NumpyDecoder(CHECKPOINT, plan_of(out, unguarded))
    table = load_file(CHECKPOINT / "model.safetensors")["language_model.model.embed_tokens.weight"]
    worst, count, same = 0.0, 0, True
    for prompt in prompts:
        ids = vlm.chat.encode(prompt)
        if vlm.decoder.supervised:
            require_refusal(model, ids, vlm.decoder.supervisor_input)
        generated = list(answer(model, ids, vlm.decoder.supervisor_input))
        tokens, logits = [token for token, _ in generated], np.stack([row for _, row in generated])
        steps = list(vlm.steps([Request(prompt)], Sampling(max_new_tokens=64)))
        expected = np.stack([vlm.decoder.last_logits(step.outputs)[0] for step in steps])
        same = same and tokens == expected.argmax(-1).tolist()
        if logits.shape == expected.shape:
            worst = float(np.maximum(worst, np.abs(logits - expected).max()))
        count += len(tokens)
        told = None
        if vlm.decoder.supervised:
            told = oracle.run(table[ids], len(ids), np.full(vlm.decoder.supervisor_shape, NO_SUPERVISOR))["coordinates"]
        truth = oracle.run(table[[*ids, *expected.argmax(-1)[:-1]]], len(ids), told)["logits"][len(ids) - 1 :]
        assert np.abs(expected - truth).max() < ORACLE_LIMIT, f"{out.name}: onnxruntime and the numpy oracle differ"
    return Agreement(worst, count, same)


def compare_rows(out: Path, prompts: list[str]) -> Agreement:
    """Each prompt behind another one's text, as one batch that genai's kernels want padded on the right; both rows answer."""
    vlm, model = vlmguard.GuardedVLM.open(out, runtime="onnxruntime-cpu"), og.Model(str(out))
    worst, count, same = 0.0, 0, True
    for text, prompt in zip(prompts, prompts[1:] + prompts[:1], strict=True):
        batches = (vlm.batch([Request(one)]) for one in (text, prompt))
        both = interleaved(*batches, left=False)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=both.ids.shape[1] + 8, do_sample=False, batch_size=2)
        generator = og.Generator(model, params)
        generator.append_tokens(both.ids.astype(np.int32))
        outputs, state = vlm.decoder.prefill(both)
        expected = outputs["logits"][np.arange(2), both.mask.sum(axis=1) - 1]
        for _ in range(8):
            found = np.array(generator.get_logits())[:, -1]
            worst = float(np.maximum(worst, np.abs(found - expected).max()))
            generator.generate_next_token()
            tokens = np.array(generator.get_next_tokens(), np.int64)
            same = same and tokens.tolist() == expected.argmax(-1).tolist()
            count += 1
            if set(tokens.tolist()) & vlm.chat.eos_ids:
                break
            expected = vlm.decoder.step(state, tokens[:, None], None)["logits"][:, -1]
    return Agreement(worst, count, same)


def require_refusal(model: og.Model, ids: list[int], guard: str) -> None:
    """Without its supervisor the folder does not run: there is no guard that is silently off."""
    try:
        start(model, ids, guard, None)
    except Exception as error:  # onnxruntime's, which genai hands on
        assert guard in str(error), error
    else:
        raise AssertionError("genai ran a supervised graph without its supervisor")


if __name__ == "__main__":
    sys.exit(main())
