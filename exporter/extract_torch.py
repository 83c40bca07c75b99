"""Directions from a Hugging Face checkpoint, read in torch: no ONNX export is needed to know them.

The states are those that the exported graph has: what leaves each decoder layer at the last token of the same ids. They are
taken by hooks, because transformers' `hidden_states` end with the normed state in place of the last layer's. Prompts of one
length run together, so nothing is padded and no position has to be made up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..graphs.directions import Directions
from ..graphs.errors import AnatomyNotFound, ExtraMissing
from ..runtime.chat import ChatTokenizer
from .checkpoint import load_model, locate, read_config
from .estimators import DEFAULT_ESTIMATOR, ESTIMATORS, require_known
from .extract import Progress, anchor_requests, directions_from_states, read_batches
from .families import find_family
from .kept_states import digest_of, kept_beside
from .prompts import AnchorPair


def extract_from_checkpoint(
    checkpoint: str | Path,
    pairs: Sequence[AnchorPair],
    work: Path,
    rank: int = 4,
    batch_size: int = 16,
    progress: Progress | None = None,
    estimator: str = DEFAULT_ESTIMATOR,
) -> Directions:
    """The SSD of every decoder layer of a checkpoint, in float32 on the CPU.

    Args:
        checkpoint: a folder, or a hub id.
        pairs: anchors.
        work: the output; states are kept in a hidden folder beside it until they are all there.
        rank, batch_size, progress, estimator: as for `extract_all_layers`.

    Returns:
        Directions without a decoder's digest: there is no decoder file yet.

    Raises:
        ExtraMissing: torch is not installed.
        GuardError: no family of ours, or its weights cannot be loaded.
    """
    require_known("estimator", estimator, ESTIMATORS)
    _require_torch()
    folder = locate(checkpoint)
    family = find_family(read_config(folder), str(checkpoint))
    model = load_model(folder, family, "fp32", lambda _: None)
    chat = ChatTokenizer.open(folder)
    requests = anchor_requests(pairs)
    files = [path for path in folder.iterdir() if path.is_file()]
    with kept_beside(work, f"torch {digest_of(files)}") as kept, _last_states(model, str(checkpoint)) as states_of:
        ids = {request.prompt: chat.encode(request.prompt) for request in requests}
        batches = _of_one_length([len(ids[request.prompt]) for request in requests], batch_size)
        states = read_batches(
            lambda batch: states_of([ids[request.prompt] for request in batch]), requests, batches, progress, kept
        )
    return directions_from_states(states, range(states.shape[1]), rank, estimator, None)


@contextmanager
def _last_states(model: Any, checkpoint: str) -> Iterator[Any]:
    """Within, a function from rows of ids of one length to states at the last token, `[rows, layers, d]` float32."""
    import torch

    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise AnatomyNotFound(
            f"{checkpoint}: {type(decoder).__name__} has no list of layers; export it to ONNX and extract from that"
        )
    seen: list[np.ndarray] = []

    def record(module: Any, inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        seen.append(state[:, -1].float().numpy())

    def states_of(rows: Sequence[Sequence[int]]) -> np.ndarray:
        seen.clear()
        with torch.no_grad():
            decoder(input_ids=torch.tensor([list(row) for row in rows]), use_cache=False)
        return np.stack(seen, axis=1)

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield states_of
    finally:
        for hook in hooks:
            hook.remove()


def _of_one_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    alike: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        alike[length].append(index)
    for members in alike.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _require_torch() -> None:
    from importlib.util import find_spec

    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            raise ExtraMissing(f"reading a checkpoint needs {module}, which is not installed; install vlmguard[torch]")
