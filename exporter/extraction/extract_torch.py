"""Extracts directions from a Hugging Face checkpoint in torch, without an ONNX export.

The states are those of the exported graph: the output of each decoder layer at the last token of the same ids. Hooks read them,
because the last of transformers' `hidden_states` is normalised. A batch has prompts of one length, so there is no padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...graphs.directions import Directions
from ...graphs.errors import AnatomyNotFound, ExtraMissing
from ...graphs.extras import install_command
from ...graphs.progress import CountCallback, ignore_progress
from ...runtime.chat.chat import ChatTokenizer
from ...runtime.generation import Request
from ..checkpoints.convert import load_model, locate, read_config
from ..checkpoints.float16_range import decoder_layers
from ..executors import ExecutorFactory, local_executors, when_needed
from ..families import find_family
from ..prompts.labelled import AnchorPair
from .estimators import DEFAULT_ESTIMATOR, ESTIMATORS, require_known
from .extract import anchor_requests, directions_from_states, read_batches
from .kept_states import digest_of, kept_beside


def extract_from_checkpoint(
    checkpoint: str | Path,
    pairs: Sequence[AnchorPair],
    work: Path,
    rank: int = 4,
    batch_size: int = 16,
    report_count: CountCallback | None = None,
    estimator: str = DEFAULT_ESTIMATOR,
    executors: ExecutorFactory = local_executors,
) -> Directions:
    """The SSD of every decoder layer of a checkpoint, in float32 on the CPU.

    Args:
        checkpoint: a folder, or a hub id.
        pairs: anchors.
        work: the output; states are kept in a hidden folder beside it until they are all there.
        rank, batch_size, report_count, estimator, executors: as for `extract_all_layers`.

    Returns:
        Directions without a decoder's digest: there is no decoder file yet.

    Raises:
        ExtraMissing: torch is not installed.
        GuardError: no family of ours, or its weights cannot be loaded.
    """
    require_known("estimator", estimator, ESTIMATORS)
    _require_torch()
    folder = locate(checkpoint)
    find_family(read_config(folder), str(checkpoint))
    worker_spec = TorchStates(folder.absolute(), _threads())
    chat = ChatTokenizer.open(folder)
    requests = anchor_requests(pairs)
    with kept_beside(work, f"torch {digest_of(worker_spec.files())}") as kept:
        batches = _of_one_length([len(chat.encode(request.prompt)) for request in requests], batch_size)
        states = read_batches(when_needed(worker_spec), requests, batches, report_count, kept, executors(worker_spec))
    return directions_from_states(states, range(states.shape[1]), rank, estimator, None)


@dataclass(frozen=True)
class TorchStates:
    """Reads states in torch in another process.

    Attributes:
        folder: of the checkpoint.
        threads: of torch; sums are split among them, so that another number rounds in another way.
    """

    folder: Path
    threads: int

    def files(self) -> list[Path]:
        return [path for path in sorted(self.folder.iterdir()) if path.is_file()]

    def open(self) -> Callable[[Sequence[Request]], np.ndarray]:
        """From texts of one length in tokens to states at their last token, `[texts, layers, d]` float32."""
        import torch

        torch.set_num_threads(self.threads)
        family = find_family(read_config(self.folder), str(self.folder))
        decoder = load_model(self.folder, family, "fp32", ignore_progress).get_decoder()
        layers = decoder_layers(decoder, decoder.config.num_hidden_layers)
        if layers is None:
            raise AnatomyNotFound(
                f"{self.folder}: {type(decoder).__name__} has no list of layers; export it to ONNX and extract from that"
            )
        chat = ChatTokenizer.open(self.folder)
        seen: list[np.ndarray] = []

        def record(module: Any, inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            seen.append(state[:, -1].float().numpy())

        def states_of(batch: Sequence[Request]) -> np.ndarray:
            seen.clear()
            with torch.no_grad():
                decoder(input_ids=torch.tensor([chat.encode(request.prompt) for request in batch]), use_cache=False)
            return np.stack(seen, axis=1)

        for layer in layers:
            layer.register_forward_hook(record)
        return states_of


def _of_one_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    alike: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        alike[length].append(index)
    for members in alike.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _require_torch() -> None:
    from importlib.util import find_spec

    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            raise ExtraMissing(
                f"reading a checkpoint needs {module}, which is not installed; run: {install_command('torch')}"
            )
