"""A guarded LLaVA in plain onnxruntime, any of the six modes: python answer.py FOLDER PROMPT [PICTURE]"""

import sys

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from tokenizers import Tokenizer

TEMPLATE, IMAGE, END = "<s>USER: {}{} ASSISTANT:", "<image>", "</s>"  # these two lines are your model's: chat template,
EDGE, MEAN, STD = 16, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # image processor
folder, prompt, *picture = sys.argv[1:]
parts = [f"{folder}/onnx/{part}.onnx" for part in ("vision_encoder", "embed_tokens", "decoder_model_merged")]
(see, embed, decoder), tokenizer = map(InferenceSession, parts), Tokenizer.from_file(f"{folder}/tokenizer.json")
shapes, names = {i.name: i.shape for i in decoder.get_inputs()}, [o.name for o in decoder.get_outputs()]
state = {name: np.zeros((1, s[1], 0, s[3]), np.float32) for name, s in shapes.items() if name.startswith("past")}
features, tokens = np.zeros((0, shapes["inputs_embeds"][2])), []


def run(ids, state):  # a prompt, or one token more; the state is the KV cache, and what supervises the gates
    embeds, at = embed.run(None, {"input_ids": np.array([ids])})[0], np.equal(ids, tokenizer.token_to_id(IMAGE))
    embeds[0, at] = features[: at.sum()]
    positions = np.arange(len(ids))[None] + state["past_key_values.0.key"].shape[2]
    feeds = {"attention_mask": np.ones((1, positions.max() + 1), np.int64), "position_ids": positions}
    outputs = dict(zip(names, decoder.run(names, {"inputs_embeds": embeds} | feeds | state), strict=True))
    return outputs, {name: outputs.get(name.replace("past_key_values", "present"), old) for name, old in state.items()}


silent = {name: np.full((1, *s[1:]), -1e30, np.float32) for name, s in shapes.items() if name.endswith("supervisor")}
for guard in silent:  # supervise, combined, align: first the text alone, while no gate can open
    state[guard] = run(tokenizer.encode(TEMPLATE.format("", prompt)).ids, state | silent)[0]["vlmguard.coordinates"]
if picture:
    pixels = np.array(Image.open(*picture).convert("RGB").resize((EDGE, EDGE), Image.Resampling.BICUBIC)) / 255
    features = see.run(None, {"pixel_values": np.float32((pixels - MEAN) / STD).transpose(2, 0, 1)[None]})[0][0]
ids = tokenizer.encode(TEMPLATE.format(IMAGE * len(features) + "\n" * bool(picture), prompt)).ids
while len(tokens) < 64 and tokenizer.token_to_id(END) not in tokens:
    outputs, state = run(tokens[-1:] or ids, state)
    state |= {name: none for name, none in silent.items() if "prompt" in name}  # align: at the end of the prompt alone
    tokens.append(int(outputs["logits"][0, -1].argmax()))
print(tokenizer.decode(tokens))
