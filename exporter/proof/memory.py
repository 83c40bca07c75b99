"""Memory that a proof by running needs, and free memory: they decide the default level of the proof.

Both are estimates. A proof that is started with too little memory is killed by the kernel without a word, so they err on the
side of the smaller proof.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from ...graphs.package import ModelPackage
from ...graphs.whole_numbers import whole_number

# Bytes that onnxruntime's CPU provider holds at its peak, per byte of a weight: float32 and packed weights are mapped, and
# packed again for the matrix kernels; float16 and bfloat16 are computed in float32 (measured: 2.6).
_PER_BYTE = {ir.DataType.FLOAT16: 3.2, ir.DataType.BFLOAT16: 3.2}
_PER_BYTE_ELSE = 2.2
# The runtime, this program, activations, and the logits of the proof's calls, which are kept to be compared.
_BESIDE = 1 << 30
_PROOF_TOKENS, _KEPT = 8 * 192, 3
_UNLIMITED = 1 << 60


def needed_bytes(package: ModelPackage, graph: ir.Model) -> int:
    """Memory that one session of a decoder takes at its peak, and what the proof keeps beside it.

    Args:
        package: of the model.
        graph: its decoder; the weights are not read.
    """
    held = 0.0
    for value in (value for each in graph.graphs() for value in each.initializers.values()):
        tensor = value.const_value
        if tensor is not None:
            held += tensor.nbytes * _PER_BYTE.get(tensor.dtype, _PER_BYTE_ELSE)
    around = [path for path in (package.vision_encoder, package.embed_tokens) if path is not None]
    files = sum(path.stat().st_size for part in around for path in (part, *part.parent.glob(f"{part.name}*data*")))
    return int(held) + int(_PER_BYTE_ELSE * files) + _vocabulary(graph) * 4 * _PROOF_TOKENS * _KEPT + _BESIDE


def _vocabulary(graph: ir.Model) -> int:
    sizes = [value.shape[-1] for value in graph.graph.outputs if value.name == "logits" and value.shape]
    return next((size for size in sizes if isinstance(size, int)), 50_000)


def free_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory available to this process in bytes, within its limits; `None` if unknown.

    Args:
        proc, groups: folders with Linux's figures.
    """
    known = [*_machine(proc), *_groups(proc, groups), *_process()]
    return max(0, min(known)) if known else None


def _machine(proc: Path) -> Iterator[int]:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(proc: Path, groups: Path) -> Iterator[int]:
    """Bytes left in the control groups of this process, version 1 and 2, each up to the root."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups / "memory" if controllers else groups
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            limit, used = (_number(place / name) for name in names)
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit - used + _cached(place / "memory.stat")
            if place == root:
                break


def _cached(stat: Path) -> int:
    """Pages of files, which are given back before anything is refused."""
    figures = dict(line.split() for line in _lines(stat) if len(line.split()) == 2)
    return int(figures.get("total_inactive_file", figures.get("inactive_file", 0)))


def _process() -> Iterator[int]:
    """The limit of this process's own address space, less what it has taken."""
    if sys.platform == "win32":
        return
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        pages = _lines(Path("/proc/self/statm"))
        yield soft - (int(pages[0].split()[0]) * resource.getpagesize() if pages else 0)


def _number(path: Path) -> int | None:
    """A limit in bytes; `None` where there is none (`max`)."""
    return whole_number("".join(_lines(path)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
