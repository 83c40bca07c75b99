"""A LLaVA around the aligned language model: a small vision tower learns to write what a picture shows as word embeddings.

The language model takes no part in the training: the tower's 16 outputs are to be the embeddings of the sentence that
describes the picture (`Scene.sentence`), from which the language model answers questions. Safety alignment leaves the
embeddings as they are, so that neither training waits for the other, and `assemble` puts both into one checkpoint.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from chat import IMAGE_TOKENS
from PIL import Image
from safetensors.torch import load_file, save_file
from scenes import COLOURS, SHAPES, SIDE, Scene, draw, random_scene
from weights import IMAGE_TOKEN

PATCH = SIDE // 4  # 4 x 4 patches
COLOUR_SLOTS, SHAPE_SLOTS = (3, 10), (4, 11)  # tokens of the sentence that differ from picture to picture
SEEING = ("model.vision_tower.", "model.multi_modal_projector.")
SEEING_FILE = "seeing.safetensors"


@dataclass(frozen=True)
class Recipe:
    """The training of tower and projector as numbers."""

    steps: int = 1500
    batch: int = 64
    pictures: int = 8000  # drawn once, used again
    learning_rate: float = 2e-3


def build_model(language_model: Path, seed: int) -> tuple[Any, Any]:
    """`(model, processor)`: an untrained CLIP tower and projector before a language model."""
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        Gemma3ForCausalLM,
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    decoder = Gemma3ForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,  # the last but one is read
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=96,
    )
    stand_in = copy.deepcopy(
        decoder.config
    )  # initialising an embedding table to throw it away takes longer than all the rest
    stand_in.update({"vocab_size": 16, "num_hidden_layers": 1, "layer_types": decoder.config.layer_types[:1]})
    config = LlavaConfig(
        vision_config=vision,
        text_config=stand_in,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head, model.config.text_config = decoder.model, decoder.lm_head, decoder.config
    model.generation_config = GenerationConfig(**decoder.generation_config.to_diff_dict())
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLIP's class token, which the "default" strategy drops again
        chat_template=tokenizer.chat_template,
    )
    return model, processor


def teach(base: Path, folder: Path, seed: int, recipe: Recipe = Recipe()) -> Mapping[str, object]:
    """Train tower and projector for the embeddings of the model in `base`; write their weights to `folder`."""
    model, processor = build_model(base, seed)
    rng = random.Random(f"vision {seed}")
    scenes = [random_scene(rng) for _ in range(recipe.pictures)]
    pictures = pixel_values(processor, [draw(scene) for scene in scenes])
    target = _Target(model, processor.tokenizer, scenes)
    seeing = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    with torch.no_grad():
        scale = target.rms / image_tokens(model, pictures[:64]).pow(2).mean().sqrt()
        for parameter in model.model.multi_modal_projector.linear_2.parameters():
            parameter.mul_(scale)
    optimizer = torch.optim.AdamW(seeing, lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    for step in range(recipe.steps):
        chosen = torch.tensor([rng.randrange(recipe.pictures) for _ in range(recipe.batch)])
        loss, right = target.loss(image_tokens(model, pictures[chosen]), chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(seeing, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1:4d}/{recipe.steps}  loss {float(loss):.4f}  words right {right:.0%}", flush=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name.startswith(SEEING)}
    save_file(weights, folder / SEEING_FILE)
    return {"recipe": asdict(recipe), "last_loss": round(float(loss.detach()), 5)}


def assemble(aligned: Path, seeing: Path, folder: Path) -> None:
    """Write the checkpoint of the aligned language model with the trained tower and projector."""
    model, processor = build_model(aligned, seed=0)
    weights = load_file(seeing / SEEING_FILE)
    wanted = {name for name in model.state_dict() if name.startswith(SEEING)}
    if weights.keys() != wanted:
        raise SystemExit(
            f"{seeing}: holds {len(weights)} of the {len(wanted)} tensors of a tower and projector; delete the folder"
        )
    model.load_state_dict(weights, strict=False)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def pixel_values(processor: Any, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """`[pictures, 3, SIDE, SIDE]` float32, as the model gets them."""
    return torch.as_tensor(processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"])


def image_tokens(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the language model gets of pictures: `[pictures, IMAGE_TOKENS, width]`."""
    return torch.stack(tuple(model.get_image_features(pixel_values=pixels).pooler_output))


class _Target:
    """Embeddings of the sentences, and how far image tokens are from them."""

    def __init__(self, model: Any, tokenizer: Any, scenes: Sequence[Scene]) -> None:
        ids = [tokenizer(scene.sentence, add_special_tokens=False)["input_ids"] for scene in scenes]
        if any(len(row) != IMAGE_TOKENS for row in ids):
            raise SystemExit(
                f"this tokenizer writes the sentence in {len(ids[0])} tokens, not {IMAGE_TOKENS}; use a Gemma 3 model"
            )
        self._ids = torch.tensor(ids)
        self._embed = model.get_input_embeddings()
        self._words = {}
        for slots, names in ((COLOUR_SLOTS, COLOURS), (SHAPE_SLOTS, SHAPES)):
            words = torch.tensor([tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in names])
            self._words[slots] = words
        with torch.no_grad():
            self.rms = self._embed(self._ids[:256]).pow(2).mean().sqrt()

    def loss(self, tokens: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Relative squared error, plus the cross entropy of the words that differ; and the share of these that are right."""
        ids = self._ids[chosen]
        with torch.no_grad():
            wanted = self._embed(ids)
        loss = (tokens - wanted).pow(2).mean() / self.rms**2
        right: list[torch.Tensor] = []
        for slots, words in self._words.items():
            with torch.no_grad():
                embeddings = self._embed(words)
            for slot in slots:
                distances = torch.cdist(tokens[:, slot], embeddings).pow(2) / (self.rms**2 * tokens.shape[-1])
                index = (ids[:, slot, None] == words).int().argmax(-1)
                loss = loss + 0.25 * torch.nn.functional.cross_entropy(-5 * distances, index)
                right.append((distances.argmin(-1) == index).float().mean())
        return loss, float(torch.stack(right).mean())
