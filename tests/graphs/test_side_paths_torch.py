"""Gemma 4's text decoder as two exporters write it: the states are torch's, and guarded logits are torch's with a hook.

It has both kinds of side paths: an embedding per layer, and layers that read the keys and values of earlier ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_graphs import guard_model, orthonormal, run, uncalibrated
from zoo.exporting import quiet

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.layer_count import declared_layers
from vlmguard.graphs.proof.structure import prove_structure
from vlmguard.graphs.roles import input_roles
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.taps import STATES_OUTPUT, tap_last_token

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

LAYERS, WIDTH, VOCABULARY, PER_LAYER = 4, 32, 50, 4
BATCH, TOKENS, PAST, PADDING = 2, 5, 3, 2


class Gemma4(torch.nn.Module):
    """The text decoder; with `ids` it takes `input_ids` for the per-layer table besides `inputs_embeds`."""

    def __init__(self, shared: int, ids: bool = False) -> None:
        super().__init__()
        config = transformers.Gemma4TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            global_head_dim=16,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=PER_LAYER,
            num_kv_shared_layers=shared,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=16,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="eager",
        )
        torch.manual_seed(0)
        self.whole = transformers.Gemma4ForCausalLM(config)
        with torch.no_grad():
            for parameter in self.whole.parameters():
                parameter.normal_(0.0 if parameter.ndim > 1 else 1.0, 0.15)
            for layer in self.whole.model.layers:
                layer.layer_scalar.uniform_(0.5, 1.5)  # 1 at first, and not in a trained model
        self.eval()
        self.ids = ids

    def forward(
        self, inputs_embeds: Any, attention_mask: Any, per_layer_inputs: Any = None, input_ids: Any = None
    ) -> Any:
        rows = per_layer_inputs
        if input_ids is not None:
            rows = self.whole.model.get_per_layer_inputs(input_ids, inputs_embeds)
        return self.whole(
            inputs_embeds=inputs_embeds, per_layer_inputs=rows, attention_mask=attention_mask, use_cache=False
        ).logits

    def sample(self, tokens: int = TOKENS, seed: int = 1) -> dict[str, Any]:
        torch.manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (BATCH, tokens))
        with torch.no_grad():
            embeds = self.whole.get_input_embeddings()(ids)
        rows = torch.randn(BATCH, tokens, LAYERS, PER_LAYER)
        mask = torch.ones(BATCH, tokens, dtype=torch.int64)
        mask[0, :PADDING] = 0
        per_layer = {"input_ids": ids} if self.ids else {"per_layer_inputs": rows}
        return {"inputs_embeds": embeds, "attention_mask": mask, **per_layer}

    def states(self, sample: dict[str, Any], edit: Callable[[int, Any], Any] = lambda _, out: out) -> Any:
        """`(states, logits)`: what leaves every layer, and the logits with these states edited."""
        seen = []

        def hook(number: int) -> Callable[..., Any]:
            def call(_module: Any, _inputs: Any, out: Any) -> Any:
                state = out[0] if isinstance(out, tuple) else out
                seen.append(state.detach().numpy())
                edited = edit(number, state)
                return (edited, *out[1:]) if isinstance(out, tuple) else edited

            return call

        hooks = [layer.register_forward_hook(hook(n)) for n, layer in enumerate(self.whole.model.layers)]
        with torch.no_grad():
            logits = self(**sample).numpy()
        for one in hooks:
            one.remove()
        return seen, logits


def by_torchscript(module: Gemma4) -> ir.Model:
    sample, content = module.sample(), io.BytesIO()
    axes = {name: {0: "batch", 1: "sequence"} for name in (*sample, "logits")}
    with quiet():
        torch.onnx.export(
            module,
            (),
            content,
            kwargs=sample,
            input_names=list(sample),
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    return ir.from_proto(onnx.load_from_string(content.getvalue()))


EXPORTS: dict[str, dict[str, Any]] = {
    "per-layer embeddings": {"shared": 0},
    "and shared keys": {"shared": 2},
    "and a table inside": {"shared": 2, "ids": True},
}


@pytest.fixture(scope="module", params=EXPORTS)
def export(request: pytest.FixtureRequest) -> tuple[Gemma4, bytes]:
    module = Gemma4(**EXPORTS[request.param])
    return module, ir.to_proto(by_torchscript(module)).SerializeToString()


def loaded(content: bytes) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(content))


def feeds(sample: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in sample.items()}


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_every_layer_is_found_and_its_state_is_torchs(export: tuple[Gemma4, bytes]) -> None:
    module, content = export
    model = loaded(content)
    shared = module.whole.config.num_kv_shared_layers
    anatomy = dissect(model, declared_layers([module.whole.config.to_dict()]))
    assert anatomy.layer_count == LAYERS and anatomy.width == WIDTH
    assert {path.layer for path in anatomy.side_paths if path.carries == "tokens"} == set(range(LAYERS))
    memory = [path for path in anatomy.side_paths if path.carries == "keys and values"]
    assert {(path.layer, path.made_by) for path in memory} == ({(2, (0,)), (3, (1,))} if shared else set())
    tap_last_token(model, anatomy.sites)
    sample = module.sample(7, seed=2)
    found = run(model, feeds(sample))[STATES_OUTPUT]
    states, _ = module.states(sample)
    assert apart(found, np.stack([state[:, -1] for state in states], axis=1)) < 1e-4


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (0, 1, 2, 3)])
def test_guarded_logits_are_torchs_with_a_hook(export: tuple[Gemma4, bytes], layers: tuple[int, ...]) -> None:
    module, content = export
    found = uncalibrated(layers, width=WIDTH)
    done = guard_model(
        loaded(content),
        found,
        GuardSpec(mode="project", layers=layers, positions="all"),
        declared_layers([{"n_layer": 4}]),
    )
    assert all(check.ok for check in prove_structure(loaded(content), done.model, done.anatomy, done.plan, done.report))
    ssd = {number: torch.from_numpy(orthonormal(2, WIDTH, number)) for number in layers}

    def edit(number: int, state: Any) -> Any:
        return state - (state @ ssd[number].T) @ ssd[number] if number in ssd else state

    sample = module.sample(6, seed=3)
    _, expected = module.states(sample, edit)
    _, unguarded = module.states(sample)
    valid = sample["attention_mask"].bool().numpy()
    guarded = run(done.model, feeds(sample))["logits"]
    assert apart(guarded[valid], expected[valid]) < 1e-4
    assert apart(unguarded[valid], expected[valid]) > 1e-2


# With a cache, by transformers' own exporter


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gemma4, bytes]:
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    module = Gemma4(shared=2)
    first, second = module.sample(PAST, seed=4), module.sample(TOKENS, seed=5)
    cache = transformers.DynamicCache(config=module.whole.config)
    with torch.no_grad():
        module.whole(
            inputs_embeds=first["inputs_embeds"], per_layer_inputs=first["per_layer_inputs"], past_key_values=cache
        )
    mask = torch.ones(BATCH, PAST + TOKENS, dtype=torch.int64)
    mask[0, :PADDING] = 0
    inputs = {
        "inputs_embeds": second["inputs_embeds"],
        "per_layer_inputs": second["per_layer_inputs"],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -TOKENS:],
        "past_key_values": cache,
        "use_cache": True,
    }
    folder: Path = tmp_path_factory.mktemp("gemma4")
    with quiet():
        OnnxExporter().export(module.whole, inputs, OnnxConfig(dynamic=True, opset_version=18)).save_pretrained(folder)
    (path,) = folder.glob("*.onnx")
    proto = onnx.load(path)
    return module, proto.SerializeToString()


def test_a_decoder_with_a_cache_is_guarded_like_torch(cached: tuple[Gemma4, bytes]) -> None:
    module, content = cached
    model = loaded(content)
    anatomy = dissect(model, LAYERS)
    assert {(p.layer, p.made_by) for p in anatomy.side_paths if p.carries == "keys and values"} == {
        (2, (0,)),
        (3, (1,)),
    }
    pairs = input_roles(model.graph).states
    assert len(pairs) == 4 and {pair.axis for pair in pairs} == {2}
    layers = (1, 3)
    done = guard_model(
        loaded(content), uncalibrated(layers, width=WIDTH), GuardSpec(mode="project", layers=layers, positions="all")
    )
    assert all(check.ok for check in prove_structure(loaded(content), done.model, done.anatomy, done.plan, done.report))
    ssd = {number: torch.from_numpy(orthonormal(2, WIDTH, number)) for number in layers}

    def edit(number: int, state: Any) -> Any:
        return state - (state @ ssd[number].T) @ ssd[number] if number in ssd else state

    sample = module.sample(PAST + TOKENS, seed=6)
    _, expected = module.states(sample, edit)
    mask = sample["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    state = {pair.past: np.zeros((BATCH, 2, 0, _last(done.model, pair.past)), np.float32) for pair in pairs}
    logits = []
    for part in (slice(0, PAST), slice(PAST, PAST + TOKENS)):
        fed = {
            "inputs_embeds": sample["inputs_embeds"][:, part],
            "per_layer_inputs": sample["per_layer_inputs"][:, part],
            "attention_mask": mask[:, : part.stop],
            "position_ids": positions[:, part],
        }
        fed = {name: value.numpy() for name, value in fed.items()} | state | _windows(done.model)
        outputs = run(done.model, fed)
        logits.append(outputs["logits"])
        state = {pair.past: outputs[pair.present] for pair in pairs}
    valid = mask.bool().numpy()
    assert apart(np.concatenate(logits, axis=1)[valid], expected[valid]) < 1e-4


def _last(model: ir.Model, name: str) -> int:
    (value,) = (value for value in model.graph.inputs if value.name == name)
    assert value.shape is not None
    return int(str(value.shape[-1]))


def _windows(model: ir.Model) -> dict[str, np.ndarray]:
    """Scalars that the exporter makes inputs of: the lengths of sliding windows."""
    return {str(v.name): np.array(16) for v in model.graph.inputs if v.shape is not None and len(v.shape) == 0}
