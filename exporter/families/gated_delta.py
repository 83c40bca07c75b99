"""Linear attention by the gated delta rule (Qwen3.5), and by its form with a decay per channel (Kimi), for any length.

transformers computes a prompt in chunks of 64 tokens with Python loops: a tracer writes out the 63 steps within a chunk, and as
many chunks as its sample has. While `delta_rule_by_scan` lasts, models compute it token by token with torch's `scan`, which
becomes one ONNX `Scan`. Per head, with a state `S [key width, value width]`, for each token:

    S = exp(g) S;   S = S + k (beta (v - k^T S))^T;   out = S^T q
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch

# What transformers' modeling modules call their chunked functions; all take and return the same.
CHUNKED = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")


@contextmanager
def delta_rule_by_scan(model: Any) -> Iterator[None]:
    """Within, the model's linear attention can be traced for any number of tokens."""
    modules = {type(module).__module__ for module in model.modules()}
    with ExitStack() as stack:
        for module in (sys.modules[name] for name in sorted(modules)):
            for name in CHUNKED:
                if hasattr(module, name):
                    normed = partial(module.l2norm, dim=-1, eps=1e-6)
                    stack.enter_context(mock.patch.object(module, name, partial(by_token, normed=normed)))
        yield


def by_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    normed: Callable[[torch.Tensor], torch.Tensor],
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The arguments and results of transformers' `torch_chunk_gated_delta_rule`.

    Args:
        query, key: `[batch, tokens, heads, key width]`; fewer heads than values have are repeated.
        value: `[batch, tokens, heads, value width]`.
        g: logarithm of the decay, `[batch, tokens, heads]`, or with an axis for each channel of the key.
        beta: `[batch, tokens, heads]`.
        chunk_size, more: of the chunked form, without effect.
        initial_state: `[batch, heads, key width, value width]`; zeros if `None`.
        output_final_state: whether to return the last state.
        use_qk_l2norm_in_kernel: whether to normalise query and key.
        normed: normalises a vector to length 1, as this model does.

    Returns:
        `[batch, tokens, heads, value width]` in the query's dtype, and the last state in float32.
    """
    import torch
    from torch._higher_order_ops.scan import scan

    dtype, heads = query.dtype, value.shape[2]
    if key.shape[2] != heads:
        query, key = (part.repeat_interleave(heads // key.shape[2], dim=2) for part in (query, key))
    query, key, value, g, beta = (part.transpose(0, 1).float() for part in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = normed(query), normed(key)
    query = query * key.shape[-1] ** -0.5
    decay = (g if g.ndim == key.ndim else g[..., None]).exp()
    if initial_state is None:
        initial_state = torch.zeros(*key.shape[1:], value.shape[-1])

    def step(state: torch.Tensor, token: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value, decay, beta = token
        state = state * decay[..., None]
        change = (value - (state * key[..., None]).sum(-2)) * beta[..., None]
        state = state + key[..., None] * change[..., None, :]
        return state, (state * query[..., None]).sum(-2)

    state, outputs = scan(step, initial_state.float(), (query, key, value, decay, beta))
    return outputs.transpose(0, 1).to(dtype), state if output_final_state else None
