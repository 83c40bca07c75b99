"""Against the usual way: the same decoder in PyTorch with forward hooks, both float32, `restore` on every layer, rank 4.

    python benchmarks/hooks.py

Four subjects take turns: torch and ONNX Runtime, each without and with the guard. One call decodes `--tokens` tokens, one at
a time, on a cache of 128. Before anything is timed, the two guarded ones must give the same logits.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from decoder_call import Decoder, cache_values, token_ids
from guarding import ALWAYS_OPEN, guarded, write_directions
from measure import Budget, Spread, asked, interleaved, ratio, say
from record import parser, write_result
from shapes import SHAPES, Shape, built, checkpoint
from torch_decoder import hooked_layers, restore_hook

from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.spec import GuardSpec

PAST, RANK = 128, 4
BUDGET = Budget(least=8, most=60, seconds=240)
AGREEMENT = 1e-3  # of the logits, relative to the largest
TORCH, HOOKED, PLAIN, GUARDED = "torch", "torch, hooked", "onnxruntime", "onnxruntime, guarded"
# What is compared with what, and in which words.
COMPARED = ((HOOKED, TORCH), (GUARDED, PLAIN), (GUARDED, HOOKED))


def main() -> None:
    options = parser("hooks", __doc__)
    options.add_argument("--tokens", type=int, default=16, help="tokens per call")
    args = options.parse_args()
    shape = SHAPES[args.shape]
    with _guarded(shape, args.models) as (plain, guarded_model, directions):
        torch_side = TorchDecoder(shape, args, directions)
        sessions = {PLAIN: Decoder(plain, shape, args.threads), GUARDED: Decoder(guarded_model, shape, args.threads)}
        apart = _require_agreement(torch_side, sessions[GUARDED])
        calls: dict[str, Callable[[], object]] = {
            TORCH: lambda: torch_side.decode(args.tokens, hooked=False),
            HOOKED: lambda: torch_side.decode(args.tokens, hooked=True),
            **{name: _decoding(session, args.tokens) for name, session in sessions.items()},
        }
        say(f"hooks: {args.tokens} tokens a call, {args.threads} threads; logits agree within {apart:.1e}")
        times = interleaved(calls, PLAIN, asked(args, BUDGET), warm_up=1, rest=0.1)
    rows = [{"name": name, "tokens_per_second": Spread.of(args.tokens / times[name]).to_json()} for name in calls]
    ratios = [
        {"subject": subject, "baseline": baseline, "ratio": ratio(times, subject, baseline).to_json()}
        for subject, baseline in COMPARED
    ]
    for row in rows:
        say(f"  {row['name']}: {row['tokens_per_second']['median']:.2f} tokens/s")
    about = {"shape": shape.told, "past": PAST, "rank": RANK, "tokens": args.tokens, "logits_apart": apart}
    write_result(args, "hooks", {**about, "rows": rows, "ratios": ratios})


@contextmanager
def _guarded(shape: Shape, models: Path) -> Iterator[tuple[Path, Path, Path]]:
    """The unguarded float32 graph, a guarded copy with its gates open, and the directions."""
    model = built(shape, "fp32", models)
    work = Path(tempfile.mkdtemp(prefix=".hooks-", dir=model.parent))
    try:
        directions = write_directions(work / "directions.safetensors", shape.hidden_size, shape.num_hidden_layers, RANK)
        spec = GuardSpec(mode="restore", rank=RANK, tau=ALWAYS_OPEN, positions="last")
        guarded(model, work / "guarded", directions, spec)
        yield model / "model.onnx", work / "guarded" / "model.onnx", directions
    finally:
        shutil.rmtree(work, ignore_errors=True)


class TorchDecoder:
    """The checkpoint in torch, eager, with a forward hook per layer that can be switched on."""

    def __init__(self, shape: Shape, args: argparse.Namespace, directions: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(args.threads)
        self._torch, self._shape = torch, shape
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint(shape, args.models), dtype=torch.float32).eval()
        layers = read_directions(directions).layers
        self._hooks = [restore_hook(layers[number], ALWAYS_OPEN) for number in range(shape.num_hidden_layers)]

    def decode(self, tokens: int, hooked: bool) -> np.ndarray:
        """Logits `[vocabulary]` after the last of `tokens` tokens."""
        with hooked_layers(self._model.model.layers, self._hooks if hooked else ()):
            return self._decode(tokens)

    def _decode(self, tokens: int) -> np.ndarray:
        torch, cache, output = self._torch, self._cache(), None
        with torch.inference_mode():
            for place, token in enumerate(token_ids(self._shape, tokens)):
                output = self._model(
                    input_ids=torch.tensor([[token]]),
                    attention_mask=torch.ones(1, PAST + place + 1, dtype=torch.long),
                    position_ids=torch.tensor([[PAST + place]]),
                    past_key_values=cache,
                    use_cache=True,
                )
        assert output is not None, "no token was decoded"
        return output.logits[0, -1].numpy()

    def _cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(self._shape.num_hidden_layers):
            key, value = (
                self._torch.from_numpy(cache_values(self._shape, PAST, sum(map(ord, _cache_name(layer, kind)))))
                for kind in ("key", "value")
            )
            cache.update(key, value, layer)
        return cache


def _decoding(session: Decoder, tokens: int) -> Callable[[], object]:
    """One token at a time, the cache handed from call to call as ONNX Runtime's own values."""
    return lambda: session.decode(tokens, PAST)


def _cache_name(layer: int, kind: str) -> str:
    return f"past_key_values.{layer}.{kind}"


def _require_agreement(torch_side: TorchDecoder, session: Decoder) -> float:
    """How far the two guarded sides' logits are apart, relative to the largest; also, that the guard moves them."""
    ours, theirs = session.decode(2, PAST), torch_side.decode(2, hooked=True)
    largest = float(np.abs(theirs).max())
    apart = float(np.abs(ours - theirs).max()) / largest
    moved = float(np.abs(torch_side.decode(2, hooked=False) - theirs).max()) / largest
    if not apart <= AGREEMENT < moved:
        raise AssertionError(f"hooked torch and the guarded graph differ by {apart:.1e}, the guard moves {moved:.1e}")
    return apart


if __name__ == "__main__":
    main()
