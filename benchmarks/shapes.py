"""Models of a given shape, made here: random weights, because speed does not depend on what a model knows.

`checkpoint` and `built` make a Qwen2-shaped decoder and its genai builds once, and keep them in a folder outside the
repository. `wide_decoder` makes a graph whose weights are a hole in a sparse file: as large as wanted, on disk almost nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Precision = Literal["fp32", "int4"]

DEFAULT_MODELS = Path.home() / ".cache" / "vlmguard-benchmarks"


@dataclass(frozen=True)
class Shape:
    """A decoder's size, in the words of its Hugging Face config."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tied: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def told(self) -> str:
        return (
            f"{self.name}: {self.num_hidden_layers} layers of width {self.hidden_size}, {self.num_attention_heads} heads, "
            f"{self.num_key_value_heads} KV heads, MLP {self.intermediate_size}, vocabulary {self.vocab_size}, "
            f"{'tied' if self.tied else 'untied'} embeddings"
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", 896, 24, 14, 2, 4864, 151936),  # config.json of Qwen/Qwen2.5-0.5B
        Shape("qwen2.5-7b", 3584, 28, 28, 4, 18944, 152064, tied=False),  # config.json of Qwen/Qwen2.5-7B
        Shape("gemma-270m", 640, 18, 4, 1, 2048, 32000),  # Gemma 3 270M's layers; a smaller vocabulary
        Shape("tiny", 64, 4, 4, 2, 128, 320),  # to see that a script runs; its figures say nothing
    )
}


def checkpoint(shape: Shape, models: Path) -> Path:
    """A Hugging Face checkpoint of that shape, float32, with a byte-level tokenizer; made on first use."""
    target = models / shape.name / "checkpoint"

    def make(folder: Path) -> None:
        import torch
        from transformers import Qwen2ForCausalLM

        torch.manual_seed(0)
        Qwen2ForCausalLM(_qwen2(shape)).save_pretrained(folder)
        _write_tokenizer(folder)

    return _made_once(target, make)


def _qwen2(shape: Shape) -> Any:
    from transformers import Qwen2Config

    sizes = {name: value for name, value in vars(shape).items() if name not in {"name", "tied"}}
    return Qwen2Config(
        **sizes,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def llava_folder(shape: Shape, models: Path) -> tuple[Path, Path]:
    """A LLaVA checkpoint with a decoder of that shape and the smallest of image towers, and the same in the onnx-community
    layout as vlmguard exports it, both float16; made on first use."""
    from vlmguard.exporter.checkpoints.convert import convert_checkpoint

    def make(folder: Path) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig

        torch.manual_seed(0)
        tower = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        config = LlavaConfig(
            vision_config=tower,
            text_config=_qwen2(shape),
            image_token_index=shape.vocab_size - 1,
            tie_word_embeddings=shape.tied,
        )
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float16)
        model.save_pretrained(folder)
        _write_tokenizer(folder)

    source = _made_once(models / shape.name / "llava", make)
    graphs = _made_once(
        models / shape.name / "llava-fp16",
        lambda folder: convert_checkpoint(source, folder, dtype="fp16", verify=False),
    )
    return source, graphs


def built(shape: Shape, precision: Precision, models: Path) -> Path:
    """The checkpoint as onnxruntime-genai's builder exports it for a CPU; made on first use, which takes minutes."""
    from vlmguard.exporter.checkpoints.exporters import export_checkpoint

    source = checkpoint(shape, models)
    return _made_once(
        models / shape.name / precision,
        lambda folder: export_checkpoint(source, folder, exporter="genai", dtype=precision),
    )


def wide_decoder(
    folder: Path, layers: int = 32, width: int = 4096, hidden: int = 11008, vocabulary: int = 32000
) -> int:
    """A float16 decoder `model.onnx` whose `model.onnx.data` is a hole; how many bytes that claims to be.

    The defaults are a Llama-2-7B's sizes: 13.2 GB.
    """
    from onnx import ModelProto, TensorProto, helper

    graph = _WideGraph()
    stream = "inputs_embeds"
    for layer in range(layers):
        stream = graph.layer(f"layers.{layer}", stream, width, hidden)
    normed = graph.norm("norm", stream, width)
    graph.node("MatMul", [normed, graph.weight("lm_head", width, vocabulary)], "logits")
    ends = [("inputs_embeds", TensorProto.FLOAT16, width), ("logits", TensorProto.FLOAT16, vocabulary)]
    embeds, logits = (helper.make_tensor_value_info(name, dtype, ["batch", "sequence", n]) for name, dtype, n in ends)
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"])
    model: ModelProto = helper.make_model(
        helper.make_graph(graph.nodes, "decoder", [embeds, mask], [logits], graph.weights),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with (folder / _WideGraph.DATA).open("wb") as data:
        data.truncate(graph.end)
    return graph.end


class _WideGraph:
    """Nodes, and weights that say where in the data file they lie."""

    DATA = "model.onnx.data"

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.end = 0

    def layer(self, name: str, stream: str, width: int, hidden: int) -> str:
        normed = self.norm(f"{name}.input_norm", stream, width)
        parts = [self.linear(f"{name}.{part}_proj", normed, width, width) for part in "qkv"]
        heads = self.node(
            "MultiHeadAttention", parts, f"{name}.attention", "com.microsoft", num_heads=width // 128 or 1
        )
        stream = self.node("Add", [stream, self.linear(f"{name}.o_proj", heads, width, width)], f"{name}.attended")
        normed = self.norm(f"{name}.post_norm", stream, width)
        gate, up = (self.linear(f"{name}.{part}_proj", normed, width, hidden) for part in ("gate", "up"))
        opened = self.node("Mul", [gate, self.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        product = self.node("Mul", [opened, up], f"{name}.product")
        return self.node("Add", [stream, self.linear(f"{name}.down_proj", product, hidden, width)], f"{name}.output")

    def norm(self, name: str, stream: str, width: int) -> str:
        return self.node("SimplifiedLayerNormalization", [stream, self.weight(name, width)], f"{name}.normed", axis=-1)

    def linear(self, name: str, value: str, rows: int, columns: int) -> str:
        return self.node("MatMul", [value, self.weight(name, rows, columns)], f"{name}.out")

    def node(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def weight(self, name: str, *dims: int) -> str:
        from onnx import TensorProto

        length = 2  # bytes of a float16
        for size in dims:
            length *= size
        tensor = TensorProto(name=f"{name}.weight", data_type=TensorProto.FLOAT16, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.DATA), ("offset", self.end), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.end += -(-length // 4096) * 4096  # page by page, as exporters align them
        self.weights.append(tensor)
        return tensor.name


def _made_once(target: Path, make: Any) -> Path:
    """`target`, made in a sibling that is renamed when complete: a killed run leaves nothing that looks finished."""
    if target.is_dir():
        return target
    print(f"making {target} (once)", file=sys.stderr)
    stage = target.with_name(f".{target.name}-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.parent.mkdir(parents=True, exist_ok=True)
    try:
        make(stage)
        stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def _write_tokenizer(folder: Path) -> None:
    """A token per byte: what a prompt says does not matter here, only how long it is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {
        symbol: place for place, symbol in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(folder)
