"""Small models without weights of a checkpoint: the ways in which the generic row runs a decoder, and its random pixels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vlmguard.exporter.families.generic import GenericDecoder
from vlmguard.exporter.families.random_pixels import random_pixels

SCALE = 0.25


class Layer(torch.nn.Module):
    """Doubles what it gets, and returns it with something else or alone."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone

    def forward(self, states: Any) -> Any:
        return states * 2 if self.alone else (states * 2, "weights")


class Decoder(torch.nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(True), Layer(False)])

    def forward(self, inputs_embeds: Any, use_cache: bool) -> Any:
        for layer in self.layers:
            states = layer(inputs_embeds)
            inputs_embeds = states[0] if isinstance(states, tuple) else states
        return SimpleNamespace(last_hidden_state=inputs_embeds, past_key_values="cache")


class Whole(torch.nn.Module):
    """Gives its decoder no features, and scales the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def get_decoder(self) -> Decoder:
        return self.decoder

    def get_output_embeddings(self) -> Any:
        return torch.nn.Identity()

    def forward(self, inputs_embeds: Any, use_cache: bool) -> Any:
        output = self.decoder(inputs_embeds, use_cache)
        return SimpleNamespace(logits=output.last_hidden_state * SCALE, past_key_values=output.past_key_values)


def test_features_reach_the_decoder_with_and_without_the_head_of_the_model() -> None:
    model, embeds, first, second = Whole(), *(torch.full((1, 2, 3), number) for number in (1.0, 2.0, 4.0))
    for inner, scale in ((True, 1.0), (False, SCALE)):
        features = {"deepstack_embeds_0": first, "deepstack_embeds_1": second}
        output = GenericDecoder(None, inner=inner, deepstack=(0, 1)).run(model, inputs_embeds=embeds, **features)
        assert torch.equal(output.logits, torch.full((1, 2, 3), (2.0 * (2 + 2) + 4) * scale))
    assert all("forward" not in vars(layer) for layer in model.decoder.layers)


def test_random_pixels_have_the_frames_that_a_vision_encoder_takes() -> None:
    class Encoder:
        config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=4, patch_temporal=2, merge_size=2))

        def get_image_features(self, pixel_values: Any, image_grid_thw: Any) -> None: ...

    def run(arrays: dict[str, Any]) -> None:
        if "image_grid_thw" not in arrays or arrays["pixel_values"].shape[1:] != (2 * 3 * 4**2,):
            raise ValueError

    pictures = random_pixels(Encoder(), run)
    assert pictures is not None
    assert [picture["image_grid_thw"].tolist() for picture in pictures[:2]] == [[[1, 8, 12]], [[1, 12, 8]]]
    assert pictures[0]["pixel_values"].shape == (96, 96)


def test_random_pixels_of_patches_without_a_grid() -> None:
    class Encoder:
        config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=4, temporal_patch_size=2))

        def get_image_features(self, pixel_values: Any) -> None: ...

    pictures = random_pixels(Encoder(), lambda arrays: None)
    assert pictures is not None
    assert [picture["pixel_values"].shape for picture in pictures[:2]] == [(24, 2, 4, 4, 3), (24, 2, 4, 4, 3)]
