"""The guard as people write it in PyTorch: a forward hook per decoder layer, in eager mode. The others are compared with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.errors import GuardError

Hook = Callable[[object, object, Any], Any]


def restore_hook(layer: Any, threshold: float, device: str = "cpu", dtype: str = "float32") -> Hook:
    """Mode `restore` at the last token: reads the layer's output, computes `w` and gives back `h + w V`.

    Its matrices are tensors of the right device already and its gate a product, so that nothing waits for the host.

    Args:
        layer: `LayerDirections`.
        dtype: of the stream.
    """
    import torch

    kind = getattr(torch, dtype)
    ssd, target, readout = (torch.from_numpy(a).to(device, kind) for a in (layer.ssd, layer.target, layer.readout))

    def restore(module: object, inputs: object, output: Any) -> Any:
        states = output if torch.is_tensor(output) else output[0]
        last = states[:, -1]
        gate = (last @ readout > threshold).to(states.dtype)[:, None]
        changed = states.clone()
        changed[:, -1] = last + (gate * (target - last @ ssd.T)) @ ssd
        return changed if torch.is_tensor(output) else (changed, *output[1:])

    return restore


@contextmanager
def hooked_layers(layers: Sequence[Any], hooks: Sequence[Hook]) -> Iterator[None]:
    """The hooks, one per layer, while the block runs; none at all if there are none."""
    handles = [layer.register_forward_hook(hook) for layer, hook in zip(layers, hooks, strict=bool(hooks))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TorchDecoder:
    """The language model of a LLaVA checkpoint on a GPU, float16.

    Raises:
        GuardError: torch has no GPU here.
    """

    def __init__(self, checkpoint: Path, directions: Path, threshold: float) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        if not torch.cuda.is_available():
            raise GuardError("torch finds no CUDA device; install a torch that has CUDA, on a machine with a GPU")
        self._torch = torch
        self._model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float16).to("cuda").eval()
        self._text = self._model.model.language_model
        layers = read_directions(directions).layers
        self._hooks = [restore_hook(layers[number], threshold, "cuda", "float16") for number in range(len(layers))]

    def prefill(self, embeds: np.ndarray | None) -> Any:
        """The KV cache of a prompt `[1, sequence, d]`."""
        with self._torch.inference_mode():
            return self._text(inputs_embeds=self._placed(embeds), use_cache=True).past_key_values

    def run(self, embeds: np.ndarray | None, cache: Any, hooked: bool) -> np.ndarray:
        """Logits `[1, vocabulary]` after tokens `[1, sequence, d]` on a cache, which is left as it was."""
        length = 0 if cache is None else cache.get_seq_length()
        with self._torch.inference_mode(), hooked_layers(self._text.layers, self._hooks if hooked else ()):
            states = self._text(inputs_embeds=self._placed(embeds), past_key_values=cache, use_cache=True)
            logits = self._model.lm_head(states.last_hidden_state[:, -1])
            if cache is not None:
                cache.crop(length)
            return logits.cpu().numpy()

    def _placed(self, embeds: np.ndarray | None) -> Any:
        assert embeds is not None
        return self._torch.from_numpy(embeds).to("cuda")
