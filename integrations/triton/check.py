"""Triton serves every mode of the tiny VLM: each graph asked directly (logits), and the front model (tokens, text, stream)."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from urllib.request import urlopen

import numpy as np
from tritonclient import grpc

from integrations.replay import BUILD, Agreement, CaseFolder, mode_folders, replay, write_result
from integrations.triton.client import ask, run_model
from integrations.triton.server import running
from vlmguard.exporter.packaging.triton_config import TritonOptions
from vlmguard.exporter.packaging.triton_repository import package_triton

HOME = BUILD / "triton"


def main() -> int:
    found: dict[str, Agreement] = {}
    server_version = ""
    for mode, folder in mode_folders():
        repository = HOME / mode
        shutil.rmtree(repository, ignore_errors=True)  # Python left its bytecode there
        package_triton(folder.folder / "model", repository, TritonOptions(requests=1))
        with running(repository, HOME) as server, grpc.InferenceServerClient(server.grpc) as client:
            server_version = json.loads(urlopen(f"{server.http}/v2", timeout=10).read())["version"]
            parts = {part: partial(run_model, client, part) for part in ("decoder", "embed_tokens", "vision_encoder")}
            agreement = replay(folder, parts["decoder"], parts["embed_tokens"], parts["vision_encoder"])
            answered = [_same_answer(client, folder, case) for case in folder.content["cases"]]
        found[mode] = replace(agreement, same_tokens=agreement.same_tokens and all(answered))
    note = (
        "Triton's own server, configs, Python backend and streams; its C++ ONNX Runtime backend is in no registry package, "
        f"a stand-in with onnxruntime {version('onnxruntime')} runs the graphs"
    )
    return write_result("triton", "Triton Inference Server (CPU)", server_version, found, note)


def _same_answer(client: grpc.InferenceServerClient, folder: CaseFolder, case: dict) -> bool:
    """The front model gives the expected tokens, whole and in pieces."""
    image = {} if case["image"] is None else {"image": (folder.folder / "images" / case["image"]).read_bytes()}
    # the case's tokens end with the model's own end, which is no part of an answer
    eos = set(folder.content["eos_ids"])
    expected = [token for token in case["tokens"] if token not in eos]
    asked = {"text_input": case["prompt"], "max_tokens": np.int32(len(case["tokens"])), **image}
    (whole,) = ask(client, **asked)
    pieces = ask(client, stream=np.bool_(True), **asked)
    streamed = [token for piece in pieces for token in piece.tokens]
    same = whole.tokens == streamed == expected and whole.text == "".join(piece.text for piece in pieces).strip()
    if not same or whole.text != case["answer"]:
        print(
            f"{folder.folder.name}, {case['name']}: {whole}, streamed {streamed}, expected {expected} {case['answer']!r}"
        )
    return same and whole.text == case["answer"]


if __name__ == "__main__":
    sys.exit(main())
