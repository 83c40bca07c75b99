"""The tiny VLM's language model in numpy, guarded by `graphs/reference.py`: what the cases' expectations are anchored to.

A Llama decoder straight from the checkpoint's weights, one row, float64, the whole sequence at once. It shares nothing with
the exported graph or a runtime: an error of the exporter, of the rewriter or of onnxruntime does not show up on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from vlmguard.graphs.plan import GuardPlan
from vlmguard.graphs.reference import gate, guard

# float64 against float32 over 6 layers: the largest seen is 6e-6. Another target of the guard is off by more than 0.1.
ORACLE_LIMIT = 1e-4


class NumpyDecoder:
    """A guarded Llama.

    Args:
        checkpoint: a LLaVA checkpoint folder, its text model a Llama without biases or scaled positions.
        plan: the guard.
    """

    def __init__(self, checkpoint: Path, plan: GuardPlan) -> None:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
        weights = load_file(checkpoint / "model.safetensors")
        self._weights = {
            name.removeprefix("language_model.").removeprefix("model."): array.astype(np.float64)
            for name, array in weights.items()
            if name.startswith("language_model.")
        }
        self._layers, self._eps = int(config["num_hidden_layers"]), float(config["rms_norm_eps"])
        self._heads, self._kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
        self._size, self._theta = int(config["head_dim"]), float(config["rope_parameters"]["rope_theta"])
        self._plan = plan
        self._guards = dict(zip(plan.layers, plan.guards, strict=True))

    def run(self, embeds: np.ndarray, prompt: int, supervisor: np.ndarray | None = None) -> Mapping[str, np.ndarray]:
        """A prompt and the tokens after it, in one pass.

        Args:
            embeds: `[tokens, d]`, the whole sequence.
            prompt: how many of them are the prompt; its last token and all behind it are ends of calls, where positions
                `last` edits.
            supervisor: the text-only coordinates `[layers, m]` of modes that take them.

        Returns:
            `logits` `[tokens, vocabulary]`; of the last token `coordinates` `[layers, m]`, as a text-only pass gives them, and
            `gates` `[layers]`, 1 or 0 (for a mode without a gate: none).
        """
        h, coordinates, gates = embeds.astype(np.float64), [], []
        ends = (np.arange(len(h)) >= prompt - 1).astype(np.float64)[None, :, None]
        if self._plan.edits_prompt_end:
            ends = (np.arange(len(h)) == prompt - 1).astype(np.float64)[None, :, None]
        selected = ends if self._plan.edits_last else None
        for number in range(self._layers):
            h = self._layer(number, h)
            if number in self._guards:
                layer = self._guards[number]
                coordinates.append(h[-1] @ layer.ssd.T)
                told = None if supervisor is None else supervisor[len(coordinates) - 1][None, None, :]
                if self._plan.mode != "project":
                    gates.append(gate(self._plan.mode, layer, h[None], told)[0, -1, 0])
                h = guard(self._plan.mode, layer, h[None], told, selected)[0]
        head = self._weights["lm_head.weight"]
        return {
            "logits": self._norm(h, "norm") @ head.T,
            "coordinates": np.stack(coordinates),
            "gates": np.array(gates),
        }

    def _layer(self, number: int, h: np.ndarray) -> np.ndarray:
        def linear(x: np.ndarray, name: str) -> np.ndarray:
            return x @ self._weights[f"layers.{number}.{name}.weight"].T

        normed = self._norm(h, f"layers.{number}.input_layernorm")
        q, k, v = (self._split(linear(normed, f"self_attn.{kind}_proj")) for kind in "qkv")
        h = h + linear(self._attend(self._turn(q), self._turn(k), v), "self_attn.o_proj")
        normed = self._norm(h, f"layers.{number}.post_attention_layernorm")
        gate = linear(normed, "mlp.gate_proj")
        return h + linear(gate / (1 + np.exp(-gate)) * linear(normed, "mlp.up_proj"), "mlp.down_proj")

    def _norm(self, h: np.ndarray, name: str) -> np.ndarray:
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + self._eps) * self._weights[f"{name}.weight"]

    def _split(self, x: np.ndarray) -> np.ndarray:
        """`[tokens, heads * size]` to `[heads, tokens, size]`."""
        return x.reshape(len(x), -1, self._size).transpose(1, 0, 2)

    def _turn(self, x: np.ndarray) -> np.ndarray:
        """Rotary positions, the two halves of a head as pairs."""
        half = self._size // 2
        angles = np.arange(x.shape[1])[:, None] / self._theta ** (np.arange(half) / half)[None, :]
        sin, cos = np.sin(angles), np.cos(angles)
        return np.concatenate(
            [x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1
        )

    def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Causal attention; neighbouring query heads share a key head. To `[tokens, heads * size]`."""
        k, v = (np.repeat(x, self._heads // self._kv_heads, axis=0) for x in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(self._size)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True)) @ v
        return mixed.transpose(1, 0, 2).reshape(q.shape[1], -1)
