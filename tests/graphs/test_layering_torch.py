"""The layers of really exported decoders whose state leaves a layer behind its last sum are torch's `hidden_states[l + 1]`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_graphs import run
from zoo.exporting import quiet

from vlmguard.graphs.anatomy import DecoderAnatomy, dissect
from vlmguard.graphs.taps import STATES_OUTPUT, tap_last_token

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

LAYERS, WIDTH, BATCH, TOKENS = 3, 32, 2, 5


def exported(module: Any, sample: dict[str, Any]) -> ir.Model:
    content = io.BytesIO()
    axes = {name: {0: "batch", 1: f"{name}_tokens"} for name in sample}
    with quiet():
        torch.onnx.export(
            module,
            tuple(sample.values()),
            content,
            input_names=list(sample),
            output_names=["logits"],
            dynamic_axes=axes | {"logits": {0: "batch", 1: "tokens"}},
            opset_version=17,
            dynamo=False,
        )
    return ir.from_proto(onnx.load_from_string(content.getvalue()))


def lively(model: Any) -> Any:
    """Norms that change what they norm, so that a state before one is not the state behind it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3)
    return model.eval()


class Bart(torch.nn.Module):
    """The decoder of an encoder-decoder, as Florence-2, Donut and TrOCR have it."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BartConfig(
            vocab_size=20,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=LAYERS,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=WIDTH,
            decoder_ffn_dim=WIDTH,
            max_position_embeddings=16,
            attn_implementation="eager",
        )
        self.whole = lively(transformers.BartForConditionalGeneration(config))

    def forward(self, inputs_embeds: Any, encoder_hidden_states: Any) -> Any:
        return self.whole.lm_head(self.states(inputs_embeds, encoder_hidden_states)[-1])

    def states(self, inputs_embeds: Any, encoder_hidden_states: Any) -> Any:
        return self.whole.model.decoder(
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states

    def sample(self) -> dict[str, Any]:
        return {
            "inputs_embeds": torch.randn(BATCH, TOKENS, WIDTH),
            "encoder_hidden_states": torch.randn(BATCH, 3, WIDTH),
        }


class Opt(torch.nn.Module):
    """OPT: norms before attention and MLP (`before`), or behind each sum as in OPT-350m."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        config = transformers.OPTConfig(
            vocab_size=20,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=16,
            do_layer_norm_before=before,
            attn_implementation="eager",
        )
        self.whole = lively(transformers.OPTForCausalLM(config))

    def forward(self, inputs_embeds: Any, attention_mask: Any) -> Any:
        return self.whole(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False).logits

    def states(self, inputs_embeds: Any, attention_mask: Any) -> Any:
        """Before the final norm, if there is one."""
        seen = []
        hooks = [
            layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
            for layer in self.whole.model.decoder.layers
        ]
        self(inputs_embeds, attention_mask)
        for hook in hooks:
            hook.remove()
        return [None, *seen]

    def sample(self) -> dict[str, Any]:
        mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
        return {"inputs_embeds": torch.randn(BATCH, TOKENS, WIDTH), "attention_mask": mask}


@pytest.mark.parametrize(
    "make", [Bart, lambda: Opt(before=False), lambda: Opt(before=True)], ids=["bart", "opt-350m", "opt"]
)
@pytest.mark.parametrize("declared", [None, LAYERS])
def test_the_states_are_torchs(make: Any, declared: int | None) -> None:
    module = make().eval()
    sample = module.sample()
    model = exported(module, sample)
    anatomy: DecoderAnatomy = dissect(model, declared)
    assert {site.kind for site in anatomy.sites} == {"behind"}
    tap_last_token(model, anatomy.sites)
    tapped = run(model, {name: value.numpy() for name, value in sample.items()})[STATES_OUTPUT]
    with torch.no_grad():
        states = [state[:, -1].numpy() for state in module.states(*sample.values())[1:]]
    expected = np.stack(states, axis=1)
    assert tapped.shape == expected.shape == (BATCH, LAYERS, WIDTH)
    assert np.abs(tapped - expected).max() < 1e-4 * np.abs(expected).max()
