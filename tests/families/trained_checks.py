"""What a guarded checkpoint of a type is checked for, with pictures: tokens as torch's, batches, pairs of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families.trained_checkpoint import END, Batches
from PIL import Image
from torch_hooks import HookedGuard

import vlmguard
from vlmguard.exporter.checkpoints.convert import load_model, read_config
from vlmguard.exporter.checkpoints.float16_range import decoder_layers
from vlmguard.exporter.families import find_family
from vlmguard.exporter.families.generic import decoder_of
from vlmguard.exporter.families.recorded import picture_inputs
from vlmguard.exporter.families.sample_pictures import joined
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import DIRECTIONS_FILE, read_directions
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.progress import ignore_progress
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.chat.turns import Turn
from vlmguard.runtime.decode_loop import rows_of_tokens
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.vlm import VisionLanguageModel

TOKENS = 8  # of an answer


@dataclass
class Trained:
    """A trained checkpoint, its export, and the default export's guarded folder.

    Attributes:
        checkpoint, model, guarded: the folders.
    """

    checkpoint: Path
    model: Path
    guarded: Path

    @cached_property
    def torch_model(self) -> Any:
        family = find_family(read_config(self.checkpoint), str(self.checkpoint))
        return load_model(self.checkpoint, family, "fp32", ignore_progress)

    @cached_property
    def batches(self) -> Batches:
        return Batches(self.torch_model, self.checkpoint)

    @cached_property
    def guard(self) -> HookedGuard:
        """The folder's guard as hooks."""
        manifest, package = read_manifest(self.guarded), open_package(self.model)
        spec = dict(manifest.spec)
        if spec.get("layers") is not None:
            spec["layers"] = tuple(spec["layers"])
        graph = package.load_decoder()
        anatomy = dissect(graph, package.declared_layers)
        plan = plan_guard(graph, anatomy, read_directions(self.guarded / DIRECTIONS_FILE), GuardSpec(**spec))
        assert (plan.mode, list(plan.layers)) == (manifest.plan["mode"], list(manifest.plan["layers"]))
        return HookedGuard(dict(zip(plan.layers, plan.guards, strict=True)), plan.mode, plan.positions)

    def with_torch(self, prompt: str, images: Sequence[Image.Image], guarded: bool) -> list[int]:
        """transformers' greedy answer, with the guard as hooks or without."""
        model, guard = self.torch_model, self.guard
        count = model.config.get_text_config().num_hidden_layers
        layers = decoder_layers(decoder_of(model), count)
        assert layers is not None
        inputs = self._inputs(prompt, images)

        def supervise_no_longer(*_: Any) -> None:
            if guard.positions == "prompt":
                guard.set_call()

        def answer() -> list[int]:
            ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
            return [token for token in ids[inputs["input_ids"].shape[1] :] if token != END]

        with torch.no_grad():
            if not guarded:
                return answer()
            with guard.attached(layers):
                guard.set_call()
                model(**self._inputs(prompt, ()))
                guard.set_call(supervisor=dict(guard.coordinates))
                handle = model.register_forward_hook(supervise_no_longer)
                try:
                    return answer()
                finally:
                    handle.remove()

    def _inputs(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        shown = [self.batches.prepared(image, alone=len(images) == 1) for image in images]
        ids = self.batches.chat.encode_turns([Turn("user", prompt, len(shown))], [tokens for _, tokens in shown])
        given = joined([arrays for arrays, _ in shown]) if shown else {}
        rows = np.array([ids])
        return picture_inputs(self.torch_model, rows, given) | {
            "input_ids": torch.from_numpy(rows),
            "attention_mask": torch.ones(rows.shape, dtype=torch.int64),
        }


def answers(model: VisionLanguageModel, requests: Sequence[Request]) -> list[list[int]]:
    """Tokens of greedy answers, the requests of one kind in one batch."""
    found: dict[int, list[int]] = {}
    for indices in model.groups(requests, 16):
        rows = rows_of_tokens(model.steps([requests[index] for index in indices], Sampling(TOKENS)))
        found |= dict(zip(indices, rows, strict=True))
    return [found[index] for index in range(len(requests))]


def check_tokens(trained: Trained, prompts: Sequence[str], images: Sequence[Image.Image]) -> None:
    """Answers with no, one and two pictures are torch's: unguarded ones, and guarded ones with hooks; in batches too."""
    unguarded, guarded = VisionLanguageModel(open_package(trained.model)), GuardedVLM.open(trained.guarded)
    kinds = (images[:0], images[:1], images[:2])
    requests = [Request(prompt, list(shown)) for shown in kinds for prompt in prompts]
    for model, hooked in ((unguarded, False), (guarded, True)):
        expected = [trained.with_torch(request.prompt, request.images, hooked) for request in requests]
        assert answers(model, requests) == expected, (hooked, expected)
        assert [answers(model, [request])[0] for request in requests[: len(prompts) + 1]] == expected[
            : len(prompts) + 1
        ]


def check_pairs(trained: Trained, prompts: Sequence[str], images: Sequence[Image.Image], folder: Path) -> None:
    """A guard that reads paired rows answers as the one with an input for the supervisor."""
    aligned, rows = folder / "aligned", folder / "rows"
    anchors = trained.checkpoint / "prompts" / "anchors.jsonl"
    vlmguard.export(trained.model, aligned, spec=GuardSpec(mode="align"), anchors=anchors)
    spec = GuardSpec(mode="align", supervisor="rows")
    vlmguard.export(trained.model, rows, spec=spec, directions=aligned / DIRECTIONS_FILE)
    requests = [Request(prompt, image) for image in images for prompt in prompts]
    paired, supervised = GuardedVLM.open(rows), GuardedVLM.open(aligned)
    assert paired.pairs and answers(paired, requests) == answers(supervised, requests)
