"""onnxruntime-genai's model builder, run as people run it: its command line, on a checkpoint folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["fp32", "fp16", "int4"]
Provider = Literal["cpu", "cuda"]


def build(model: PreTrainedModel, target: Path, precision: Precision, provider: Provider, **options: bool) -> None:
    """Write a genai folder of `model` (float32) into `target`.

    Args:
        provider: whose flavour of graph is written; a CPU runs a CUDA one too.
        options: the builder's `--extra_options`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch, "checkpoint")
        model.save_pretrained(checkpoint)
        write_tokenizer(checkpoint)
        # A process of its own: the builder puts modules named `builders` and `quantization` on sys.path.
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(checkpoint), "-o", str(target), "-c", str(Path(scratch, "cache"))]
        command += ["-p", precision, "-e", provider]
        if options:
            command += ["--extra_options", *(f"{name}={str(value).lower()}" for name, value in options.items())]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        built = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(f"the genai builder failed for {precision}:\n{built.stderr[-4000:]}")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and the special tokens, each where the config says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from zoo.truth import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID

    vocabulary = {"<pad>": PAD_ID, "<s>": BOS_ID, "</s>": EOS_ID, "<image>": IMAGE_ID}
    for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())):
        vocabulary[symbol] = EOS_ID + 1 + place
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<image>"],
    ).save_pretrained(folder)
