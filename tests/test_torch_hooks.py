"""The hooks equal the numpy reference inside a real decoder; and the laws that the reference itself must obey."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch_hooks import HookedGuard
from transformers import LlamaConfig, LlamaForCausalLM

from vlmguard.graphs import reference
from vlmguard.graphs.modes import MODES, POSITIONS, guard_mode, modes_where
from vlmguard.graphs.reference import NO_SUPERVISOR, SUPERVISED_ABOVE, LayerGuard
from vlmguard.graphs.spec import LARGEST_TAU

WIDTH, LAYERS = 32, 3
GUARDED = (0, 2)
NEVER, ALWAYS = 1e9, -1e9


def layer_guard(seed: int, rank: int = 2, threshold: float = 0.0, alpha: float = 1.5, width: int = WIDTH) -> LayerGuard:
    """Random numbers, orthonormal rows."""
    rng = np.random.default_rng(seed)
    ssd = np.linalg.qr(rng.normal(size=(width, rank)))[0].T
    return LayerGuard(
        ssd=np.ascontiguousarray(ssd, dtype=np.float32),
        origin=rng.normal(size=rank).astype(np.float32),
        target=rng.normal(size=rank).astype(np.float32),
        readout=rng.normal(size=width).astype(np.float32),
        threshold=threshold,
        alpha=alpha,
    )


def with_numbers(layer: LayerGuard, **changes: object) -> LayerGuard:
    return LayerGuard(**(vars(layer) | changes))


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are faster on one, and much faster beside other test workers
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # at the usual 0.02 nothing that a layer does would show
    )
    yield LlamaForCausalLM(config).eval()
    torch.set_num_threads(threads)


# A prompt of five tokens and one of three, then two generated tokens each.
PROMPT = torch.tensor([[7, 8, 9, 10, 11], [0, 0, 3, 4, 5]])
LEFT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
NEXT = torch.tensor([[12, 13], [6, 14]])


def calls(mask: torch.Tensor = LEFT, prompt: torch.Tensor = PROMPT) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`(input_ids, attention_mask)` of a prefill and two decode steps; the mask covers the cache too."""
    yield prompt, mask
    for step in range(NEXT.shape[1]):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        yield NEXT[:, step : step + 1], mask


@contextmanager
def recorded(layers: torch.nn.ModuleList, states: dict[int, list[np.ndarray]]) -> Iterator[None]:
    """Append each layer's output to `states[layer]`; hooks run in the order in which they were registered."""

    def hook(number: int):
        return lambda module, inputs, output: states.setdefault(number, []).append(output.detach().float().numpy())

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(hook(number)).remove)
        yield


@torch.no_grad()
def run(model, guard: HookedGuard | None = None, supervisor=None, mask=LEFT, prompt=PROMPT) -> list[torch.Tensor]:
    """Logits of each call, with a KV cache."""
    cache, logits = None, []
    with guard.attached(model.model.layers) if guard else ExitStack():
        for ids, seen in calls(mask, prompt):
            if guard:
                guard.set_call(attention_mask=seen, supervisor=supervisor)
            output = model(input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    return logits


# -------------------------------------------------------------------------------------------- hooks equal the reference


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_hooks_equal_the_reference(model: LlamaForCausalLM, mode: str, positions: str, padding: str, rank: int) -> None:
    always: dict[str, Any] = {"threshold": SUPERVISED_ABOVE} if mode == "align" else {}
    layers = {number: layer_guard(number, rank, **always) for number in GUARDED}
    # One row's supervisor opens the gates, the other's closes them.
    text = {n: torch.tensor([[0.7] * rank, [-0.7] * rank]) for n in GUARDED} if guard_mode(mode).supervisor else None
    guard = HookedGuard(layers, mode, positions)
    mask, prompt = (LEFT, PROMPT) if padding == "left" else (LEFT.flip(1), PROMPT.flip(1))
    before: dict[int, list[np.ndarray]] = {}
    after: dict[int, list[np.ndarray]] = {}
    # Two recorders around the guard: what each layer gave, and what it was turned into.
    with recorded(model.model.layers, before), guard.attached(model.model.layers), recorded(model.model.layers, after):
        cache = None
        for step, (ids, seen) in enumerate(calls(mask, prompt)):
            told = text if step == 0 or positions != "prompt" else None
            guard.set_call(attention_mask=seen, supervisor=told)
            with torch.no_grad():
                cache = model(input_ids=ids, attention_mask=seen, past_key_values=cache).past_key_values
            last = reference.last_token(seen[:, -ids.shape[1] :].numpy())
            for number, layer in layers.items():
                h = before[number][step]
                expected = reference.guard(
                    mode,
                    layer,
                    h,
                    supervisor=supervisor_of(mode, told, number, rank),
                    selected=None if positions == "all" else last,
                )
                np.testing.assert_allclose(after[number][step], expected, atol=2e-6)
                coordinates = ((h @ layer.ssd.T) * last).sum(axis=1)
                np.testing.assert_allclose(guard.coordinates[number].numpy(), coordinates, rtol=2e-6, atol=2e-6)
    for number in set(range(LAYERS)) - set(GUARDED):
        np.testing.assert_array_equal(np.concatenate(after[number], 1), np.concatenate(before[number], 1))
    changed = [not np.array_equal(a, b) for n in GUARDED for a, b in zip(after[n], before[n], strict=True)]
    assert any(changed) and len(changed) == len(GUARDED) * 3


def supervisor_of(mode: str, told: dict[int, torch.Tensor] | None, number: int, rank: int) -> np.ndarray | None:
    """As the reference takes it, `[batch, 1, m]`: no supervisor is NO_SUPERVISOR."""
    if not guard_mode(mode).supervisor:
        return None
    return np.full((2, 1, rank), NO_SUPERVISOR, np.float32) if told is None else told[number].numpy()[:, None]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", modes_where(has_threshold=True))
def test_a_closed_gate_leaves_the_logits_bit_for_bit(model: LlamaForCausalLM, mode: str, positions: str) -> None:
    plain = run(model)
    for supervisor in (None, {number: torch.full((2, 2), 5.0) for number in GUARDED}):
        closed = HookedGuard({n: layer_guard(n, threshold=NEVER) for n in GUARDED}, mode, positions)
        for logits, expected in zip(run(model, closed, supervisor), plain, strict=True):
            assert torch.equal(logits, expected)
    opened = HookedGuard({n: layer_guard(n, threshold=ALWAYS) for n in GUARDED}, mode, positions)
    for logits, expected in zip(run(model, opened, supervisor), plain, strict=True):
        assert not torch.allclose(logits[:, -1], expected[:, -1], atol=1e-2)


def test_listening_records_what_the_second_pass_is_told(model: LlamaForCausalLM) -> None:
    """Supervised by its own coordinates at strength 1 with origin 0, a layer stays where it is: no gap, no change."""
    layer = with_numbers(layer_guard(1, threshold=ALWAYS, alpha=1.0), origin=np.zeros(2, np.float32))
    guard = HookedGuard({1: layer}, "supervise")
    with torch.no_grad(), guard.attached(model.model.layers):
        guard.set_call(LEFT)
        heard = model(input_ids=PROMPT, attention_mask=LEFT).logits
        guard.set_call(LEFT, supervisor=dict(guard.coordinates))
        told = model(input_ids=PROMPT, attention_mask=LEFT).logits
    assert torch.equal(heard, run(model)[0])
    torch.testing.assert_close(told, heard, atol=1e-4, rtol=0)


def test_right_padding_edits_the_last_real_token_only(model: LlamaForCausalLM) -> None:
    """And no token before it, so only that token's logits move."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    guard = HookedGuard({2: layer_guard(2)}, "project")
    plain, guarded = run(model, None, mask=mask)[0], run(model, guard, mask=mask)[0]
    moved = (plain != guarded).any(dim=2)
    assert moved.tolist() == [[False] * 4 + [True], [False, False, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stream_keeps_its_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h, module = torch.randn(2, 5, WIDTH).to(dtype), torch.nn.Identity()
    for mode in MODES:
        always: dict[str, Any] = {"threshold": SUPERVISED_ABOVE} if mode == "align" else {}
        layer = layer_guard(4, **always)
        guard = HookedGuard({0: layer}, mode, "all")
        text = torch.tensor([[0.7, 0.1], [-0.7, 0.1]])
        guard.set_call(supervisor={0: text})
        with guard.attached([module]):
            found = module(h)
        expected = reference.guard(mode, layer, h.float().numpy(), supervisor=text.numpy()[:, None])
        assert found.dtype == dtype and guard.coordinates[0].dtype == torch.float32
        step = torch.finfo(dtype).eps
        np.testing.assert_allclose(found.float().numpy(), expected, atol=16 * step, rtol=4 * step)
        if mode == "supervise":
            assert torch.equal(found[1], h[1])  # its gate is closed


def test_the_gate_compares_in_float32() -> None:
    """In float16 the threshold 0.9999 is 1, and a coordinate of 1 would not be above it."""
    ssd, module = np.eye(1, WIDTH, dtype=np.float32), torch.nn.Identity()
    h = torch.from_numpy(ssd).half()[None]
    for threshold, opens in ((0.9999, True), (1.0, False), (1.0001, False)):
        layer = with_numbers(layer_guard(6, rank=1, alpha=1.0, threshold=threshold), ssd=ssd)
        with HookedGuard({0: layer}, "steer", "all").attached([module]):
            assert torch.equal(module(h), 2 * h if opens else h)


def test_a_mask_over_the_cache_counts_from_its_end() -> None:
    """Two tokens on top of three cached ones, the second row padded on the right: its last real token is the first."""
    h, module = torch.ones(2, 2, WIDTH), torch.nn.Identity()
    guard = HookedGuard({0: layer_guard(7)}, "project")
    guard.set_call(attention_mask=torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 1, 0]]))
    with guard.attached([module]):
        moved = (module(h) != h).any(dim=2)
    assert moved.tolist() == [[False, True], [True, False]]


def test_layers_that_return_tuples_are_guarded_too() -> None:
    class Older(torch.nn.Module):
        def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, str]:
            return h, "cache"

    layer, older = layer_guard(5), Older()
    h = torch.randn(1, 3, WIDTH)
    with HookedGuard({0: layer}, "project", "all").attached([older]):
        states, rest = older(h)
    assert rest == "cache"
    torch.testing.assert_close(states @ torch.from_numpy(layer.ssd).T, torch.zeros(1, 3, 2), atol=1e-5, rtol=0)
    assert torch.equal(older(h)[0], h)  # and not outside the with block


# ------------------------------------------------------------------------------------------------ laws of the reference

D = 8
finite = st.floats(-4, 4, width=32)
hidden = arrays(np.float32, (2, 3, D), elements=finite)
guards = st.builds(
    layer_guard,
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 4),
    threshold=finite,
    alpha=st.floats(0, 4, width=32),
    width=st.just(D),
)
opened = st.builds(
    layer_guard,
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 4),
    threshold=st.just(ALWAYS),
    alpha=st.floats(0, 4, width=32),
    width=st.just(D),
)
closed = st.builds(
    layer_guard, seed=st.integers(0, 10_000), rank=st.integers(1, 4), threshold=st.just(NEVER), width=st.just(D)
)
laws = settings(max_examples=50, deadline=None)


@given(h=hidden, layer=guards)
@laws
def test_projection_is_idempotent_and_orthogonal(h: np.ndarray, layer: LayerGuard) -> None:
    once = reference.guard("project", layer, h)
    np.testing.assert_allclose(reference.guard("project", layer, once), once, atol=1e-5)
    np.testing.assert_allclose(once @ layer.ssd.T, 0, atol=1e-5)


@given(h=hidden, layer=guards)
@laws
def test_steering_with_strength_zero_is_identity(h: np.ndarray, layer: LayerGuard) -> None:
    np.testing.assert_array_equal(reference.guard("steer", with_numbers(layer, alpha=0.0), h), h)


@given(h=hidden, layer=closed, mode=st.sampled_from(modes_where(has_threshold=True)))
@laws
def test_a_closed_gate_is_identity(h: np.ndarray, layer: LayerGuard, mode: str) -> None:
    """Equal in value: adding a zero turns -0.0 into 0.0."""
    supervisor = np.ones((2, 1, layer.rank), np.float32)
    assert not reference.weights(mode, layer, h, supervisor).any()
    np.testing.assert_array_equal(reference.guard(mode, layer, h, supervisor), h)


@pytest.mark.parametrize("mode", modes_where(has_threshold=True))
def test_a_gate_at_its_threshold_is_closed(mode: str) -> None:
    ssd = np.eye(1, D, dtype=np.float32)
    layer = with_numbers(layer_guard(8, rank=1, threshold=1.0, width=D), ssd=ssd, readout=ssd[0])
    h, supervisor = ssd[None], np.ones((1, 1, 1), np.float32)
    np.testing.assert_array_equal(reference.guard(mode, layer, h, supervisor), h)
    above = np.float32(1.001)
    assert (reference.guard(mode, layer, above * h, above * supervisor) != above * h).any()


@pytest.mark.parametrize("mode", modes_where(supervisor=True))
@given(
    h=hidden,
    layer=guards,
    threshold=st.sampled_from([-LARGEST_TAU, ALWAYS, 0.0, NEVER, LARGEST_TAU]),
    text_threshold=st.sampled_from([-LARGEST_TAU, 0.0, LARGEST_TAU]),
)
@laws
def test_listening_closes_every_gate(
    mode: str, h: np.ndarray, layer: LayerGuard, threshold: float, text_threshold: float
) -> None:
    """In `combined` whatever the readout says."""
    layer = with_numbers(layer, threshold=threshold, text_shift=float(np.float32(threshold - text_threshold)))
    listen = np.full((2, 1, layer.rank), NO_SUPERVISOR, np.float32)
    assert not reference.gate(mode, layer, h, listen).any()
    np.testing.assert_array_equal(reference.guard(mode, layer, h, listen), h)


@given(h=hidden, layer=guards, told=arrays(np.float32, (2, 1, 1), elements=finite), text_threshold=finite)
@laws
def test_combined_opens_if_the_readout_or_the_text_is_above(
    h: np.ndarray, layer: LayerGuard, told: np.ndarray, text_threshold: float
) -> None:
    """The text within the rounding of its way to the readout's scale: numbers up to 8, in float32."""
    layer = with_numbers(layer, text_shift=float(np.float32(layer.threshold - text_threshold)))
    supervisor = np.concatenate([told, np.zeros((2, 1, layer.rank - 1), np.float32)], axis=-1)
    found = reference.gate("combined", layer, h, supervisor) == 1
    by_readout, by_text = reference.gate("restore", layer, h) == 1, told > text_threshold
    assert found.shape == (2, 3, 1)
    clear = np.abs(told - text_threshold) > 2e-6
    clear = np.broadcast_to(clear, found.shape)
    np.testing.assert_array_equal(found[clear], (by_readout | by_text)[clear])
    assert found[by_readout].all()


@pytest.mark.parametrize("readout_opens", [False, True])
@pytest.mark.parametrize("text_opens", [False, True])
def test_the_hooks_of_combined_open_if_the_readout_or_the_text_is_above(readout_opens: bool, text_opens: bool) -> None:
    ssd, module = np.eye(1, WIDTH, dtype=np.float32), torch.nn.Identity()
    layer = with_numbers(
        layer_guard(3, rank=1, threshold=1.0), ssd=ssd, readout=ssd[0], text_shift=1.0 - 0.25, target=np.full(1, 9.0)
    )
    h = torch.from_numpy((1.5 if readout_opens else 0.5) * ssd)[None]
    guard = HookedGuard({0: layer}, "combined")
    guard.set_call(supervisor={0: torch.tensor([[0.26 if text_opens else 0.24]])})
    with guard.attached([module]):
        found = module(h)
        guard.set_call(supervisor=None)
        assert torch.equal(module(h), h)  # listening
    assert torch.equal(found, 9 * torch.from_numpy(ssd)[None] if readout_opens or text_opens else h)


@given(h=hidden, layer=opened)
@laws
def test_supervised_by_itself_is_identity(h: np.ndarray, layer: LayerGuard) -> None:
    layer = with_numbers(layer, alpha=1.0, origin=np.zeros(layer.rank, np.float32))
    np.testing.assert_allclose(reference.guard("supervise", layer, h, h @ layer.ssd.T), h, atol=1e-5)


@given(h=hidden, layer=opened)
@laws
def test_supervise_moves_the_coordinates_to_the_supervisors(h: np.ndarray, layer: LayerGuard) -> None:
    a = np.linspace(-1, 2, 2 * layer.rank, dtype=np.float32).reshape(2, 1, layer.rank)
    moved = reference.guard("supervise", layer, h, a) @ layer.ssd.T
    expected = layer.origin + layer.alpha * (a - layer.origin)
    np.testing.assert_allclose(moved, np.broadcast_to(expected, moved.shape), atol=2e-5)


@pytest.mark.parametrize("mode", modes_where(has_readout=True))
@given(h=hidden, layer=opened)
@laws
def test_the_coordinates_are_set_to_the_target(mode: str, h: np.ndarray, layer: LayerGuard) -> None:
    told = -np.ones((2, 1, layer.rank), np.float32)
    restored = reference.guard(mode, layer, h, told)
    moved = restored @ layer.ssd.T
    np.testing.assert_allclose(moved, np.broadcast_to(layer.target, moved.shape), atol=1e-5)
    np.testing.assert_allclose(reference.guard(mode, layer, restored, told), restored, atol=1e-5)


@given(h=hidden, layer=guards, mode=st.sampled_from(MODES))
@laws
def test_no_mode_leaves_the_span_of_its_directions(h: np.ndarray, layer: LayerGuard, mode: str) -> None:
    change = reference.guard(mode, layer, h, np.ones((2, 1, layer.rank), np.float32)) - h
    np.testing.assert_allclose(change - change @ layer.ssd.T @ layer.ssd, 0, atol=2e-4)


@given(h=hidden, layer=opened, mode=st.sampled_from(MODES), tokens=arrays(np.bool_, (2, 3, 1)))
@laws
def test_tokens_that_are_not_selected_are_untouched(
    h: np.ndarray, layer: LayerGuard, mode: str, tokens: np.ndarray
) -> None:
    supervisor = np.ones((2, 1, layer.rank), np.float32)
    chosen = reference.guard(mode, layer, h, supervisor, tokens.astype(np.float32))
    everywhere = reference.guard(mode, layer, h, supervisor)
    np.testing.assert_array_equal(chosen, np.where(tokens, everywhere, h))


def test_last_token_on_both_sides_of_padding() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    assert reference.last_token(mask)[..., 0].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
