"""The same build as a command line of NVIDIA's own tool, for a machine that has no Python: a Jetson, a Triton container."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ...graphs.errors import GuardError
from .build_engine import BuildOptions
from .engine_folder import Part, open_buildable, plan_parts
from .profile import EngineProfile, Shapes, parse_shapes

Tool = Literal["trtexec", "tensorrt_rtx"]


def commands_for(
    guarded: Path | str,
    backend: str | None,
    profiles: Sequence[EngineProfile],
    shapes: Sequence[str],
    options: BuildOptions,
) -> list[str]:
    """Command lines that build a guarded folder's engines; TensorRT need not be installed here.

    Args:
        guarded: the guarded folder.
        backend: `tensorrt` or `tensorrt_rtx`; `None`: the default.
        profiles: shapes of the decoder's calls.
        shapes: shapes of other inputs (`parse_shapes`).
        options: options of the builder.

    Raises:
        GuardError: as for `build_engines`; or the tool would misread a graph that only our own builder handles.
    """
    _, package = open_buildable(Path(guarded).absolute())
    parts = plan_parts(package, profiles, parse_shapes(shapes))
    for part in parts:
        if part.settled:
            raise GuardError(
                f"{part.path}: has sizes written as names, which {_tool(backend)} would take for open ones; build it with "
                "`vlmguard engine`, or export the model with --opset 18 by another exporter"
            )
    return build_commands(parts, _tool(backend), options)


def _tool(backend: str | None) -> Tool:
    return "tensorrt_rtx" if backend == "tensorrt_rtx" else "trtexec"


def build_commands(parts: Sequence[Part], tool: Tool, options: BuildOptions) -> list[str]:
    """One command per engine; paths are those of the guarded folder.

    Both tools take the same words for the graph, the profiles and the engine (documentation of `trtexec` 10 and of
    `tensorrt_rtx` 1.x); the graph's own dtypes are kept (`--stronglyTyped`, which is how `tensorrt_rtx` always builds).
    """
    return [shlex.join([tool, *_arguments(part, tool, options)]) for part in parts]


def _arguments(part: Part, tool: Tool, options: BuildOptions) -> Iterator[str]:
    yield f"--onnx={part.path}"
    yield f"--saveEngine={Path(part.relative).name}"
    if tool == "trtexec":
        yield "--stronglyTyped"
    for number, (_, shapes) in enumerate(part.profiles):
        if len(part.profiles) > 1:
            yield f"--profile={number}"
        for position, word in enumerate(("min", "opt", "max")):
            yield f"--{word}Shapes={_spelled(shapes, position)}"
    if options.workspace is not None:
        yield f"--memPoolSize=workspace:{options.workspace}"
    if options.timing_cache is not None and tool == "trtexec":
        yield f"--timingCacheFile={options.timing_cache}"
    if options.capabilities and tool == "tensorrt_rtx":
        yield f"--computeCapabilities={','.join(options.capabilities).replace('.', '')}"
    yield "--profilingVerbosity=detailed"
    yield "--skipInference"


def _spelled(shapes: Mapping[str, Shapes], position: int) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, three[position]))}" for name, three in shapes.items() if three[0])
