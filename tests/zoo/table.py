"""Every model of the zoo by name, and what `make test` exports of them.

A maker module has a table of its own, `MAKERS`. `make zoo` runs all of `ALL_MAKERS`; `make test` runs `FAST`, which has
each pattern of docs/graphs.md at least once.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import pytest
from zoo import families, genai, makers, optimum, quantized
from zoo.model import ZooModel

Maker = Callable[[Path], ZooModel]

# Module -> the files that decide what its exports look like: a change in one exports that module's models again.
MODULES: Mapping[str, tuple[str, ...]] = {
    "makers": ("makers.py", "truth.py", "genai_builder.py"),
    "families": ("families.py", "truth.py"),
    "generation_folders": ("generation_folders.py", "families.py", "truth.py"),  # its table is its own
    "genai": ("genai.py", "genai_builder.py", "families.py", "truth.py"),
    "quantized": ("quantized.py", "makers.py", "families.py", "truth.py"),
    "optimum": ("optimum.py", "quantized.py", "makers.py", "truth.py"),  # mostly taken from a folder, see there
}
_TABLES: Mapping[str, Mapping[str, Maker]] = {
    "makers": makers.MAKERS,
    "families": families.MAKERS,
    "genai": genai.MAKERS,
    "quantized": quantized.MAKERS,
    "optimum": optimum.MAKERS,
}

ALL_MAKERS: dict[str, Maker] = {name: maker for table in _TABLES.values() for name, maker in table.items()}
if len(ALL_MAKERS) != sum(map(len, _TABLES.values())):
    raise AssertionError("two maker modules use one name")

FAST: frozenset[str] = frozenset(
    {
        "llava-transformers-fp32",  # A
        "llava-transformers-fp16",  # A3
        "llava-transformers-fp32-opset23",  # A, one node per norm and attention
        "llava-transformers-ort-fp32",  # B'
        "llama-torchscript-fp32",  # A''
        "llama-torchscript-fp16",  # A4
        "llama-genai-fp32",  # B
        "llama-genai-int4",  # B over MatMulNBits
        "gpt2-fp32-ort-cpu",  # B''
        "gemma3-fp32",  # C
        "phi-fp32",  # D
        "granite-fp32",  # E
        "qwen3-vl-fp32",  # G
        "mllama-fp32",  # H
        "qwen2-5-vl-genai-fp16",  # F
        "qwen3-5-genai-fp32",  # I
        "llava-merged-fp32",  # J
        "llama-optimum-merged-fp32",  # J by optimum itself, where VLMGUARD_OPTIMUM says where it is
        "llama-dynamo-static-int8",  # K: the float sum of a stream that is rounded to int8
        "llama-dynamo-qlinear-int8",  # K: refused
    }
)

# What tests of every one of `makers` leave to `make zoo`: each has a neighbour that differs in precision or opset alone.
SELDOM: frozenset[str] = frozenset(
    {
        "llava-transformers-ort-fp16",
        "llava-transformers-fp32-opset23",
        "llama-dynamo-cache-fp32-opset20",
        "llama-dynamo-fp32-opset23",
    }
)


def module_of(name: str) -> str:
    """The maker module that a model belongs to."""
    return next(module for module, table in _TABLES.items() if name in table)


def parameter(name: str, seldom: Container[str] = ALL_MAKERS.keys() - FAST, **options: Any) -> Any:
    """A model as pytest's parameter; those that `make test` leaves to `make zoo` are marked."""
    return pytest.param(name, marks=pytest.mark.zoo if name in seldom else (), **options)
