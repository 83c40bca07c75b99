"""One ONNX graph to one TensorRT engine, and the engine's layers as the builder showed them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...graphs.errors import GuardError, GuardIncomplete
from ...graphs.graph_io import in_memory
from ...graphs.progress import ProgressCallback
from ...graphs.staging import write_file
from ...runtime.tensorrt.backend import Backend, Message, why
from .layers import EngineLayers, layers_from_inspector, layers_from_log
from .profile import Shapes


@dataclass(frozen=True)
class BuildOptions:
    """Options of the builder.

    Attributes:
        capabilities: compute capabilities to build for, such as `8.9` (TensorRT-RTX); empty: the builder's default, which is
            this machine's GPU, or for TensorRT-RTX all supported ones.
        workspace: largest scratch memory of a layer in MiB of device memory; `None`: no limit.
        timing_cache: file of measured tactics, read if it exists and then rewritten (`tensorrt` only).
    """

    capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Engine:
    """A serialized engine.

    Attributes:
        plan: what is written to disk.
        layers: what the builder made.
        warnings: what the builder warned of.
        graph_sha256: hexadecimal digest of the serialized graph that the parser was given.
    """

    plan: bytes
    layers: EngineLayers
    warnings: tuple[str, ...]
    graph_sha256: str


def build_engine(
    backend: Backend,
    model: ir.Model,
    path: Path,
    profiles: Sequence[Mapping[str, Shapes]],
    options: BuildOptions,
    report_progress: ProgressCallback,
) -> Engine:
    """Parse a graph and compile it.

    Args:
        backend: the builder's library.
        model: the graph of `path`, with resolved sizes (`settle_sizes`).
        path: its file, for external data and messages.
        profiles: shapes of every input, one mapping per optimisation profile.
        options: options of the builder.
        report_progress: called with `(phase, done, total)` in steps of the builder's outermost phases.

    Raises:
        GuardError: TensorRT cannot parse or compile the graph, or drops a part of it; with TensorRT's own message.
    """
    trt = backend.module
    with backend.log.recording() as messages:
        builder = trt.Builder(backend.log.logger)
        network = builder.create_network(_network_flags(backend))
        graph_sha256 = _parse(backend, network, model, path, messages)
        _require_ports(network, model, path)
        _make_attention_decomposable(backend, network)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        _add_profiles(builder, config, network, profiles, path)
        _apply(backend, config, options)
        config.progress_monitor = monitor = _monitor(trt, report_progress)
        plan = builder.build_serialized_network(network, config)
        del monitor
        if plan is None:
            raise GuardError(f"{path}: {backend.name} {backend.version} cannot build it ({why(messages)})")
        content = bytes(plan)
        _keep_timings(backend, config, options)
    _require_nothing_dropped(messages, path)
    layers = layers_from_log(message.text for message in messages)
    if not layers.layers:
        layers = _inspected(backend, content)
    warnings = tuple(dict.fromkeys(m.text.strip() for m in messages if m.severity == "WARNING"))
    return Engine(content, layers, warnings, graph_sha256)


def _network_flags(backend: Backend) -> int:
    """Flags for strongly typed networks: the engine keeps the graph's dtypes; TensorRT 11 and TensorRT-RTX require it."""
    flags = backend.module.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if backend.name == "tensorrt" and backend.major < 11 else 0


def _parse(backend: Backend, network: Any, model: ir.Model, path: Path, messages: list[Message]) -> str:
    """Digest of what was parsed."""
    parser = backend.module.OnnxParser(network, backend.log.logger)
    content, folder = in_memory(model, path.parent, maps=False)
    if parser.parse(content, str(folder / path.name)):
        return hashlib.sha256(content).hexdigest()
    if not parser.num_errors:
        raise GuardError(f"{path}: {backend.name} {backend.version} cannot parse it ({why(messages)})")
    error = parser.get_error(0)
    reason = " ".join(error.desc().split())[:200]
    raise GuardError(
        f"{path}: {backend.name} {backend.version} cannot parse node {error.node_name()!r} ({error.node_operator()}): {reason}"
    )


def _require_ports(network: Any, model: ir.Model, path: Path) -> None:
    """The parser drops an input that nothing reads, and an app would find it missing."""
    for kind, count, get, values in (
        ("input", network.num_inputs, network.get_input, model.graph.inputs),
        ("output", network.num_outputs, network.get_output, model.graph.outputs),
    ):
        wanted = {value.name for value in values}
        found = {get(index).name for index in range(count)}
        if wanted != found:
            differing = sorted(map(str, wanted ^ found))
            raise GuardIncomplete(f"{path}: {kind} {differing[0]!r} is not in both the graph and TensorRT's network")


def _make_attention_decomposable(backend: Backend, network: Any) -> None:
    """float32 Attention (opset 23) compiles only if the builder may take it apart."""
    kind = getattr(backend.module.LayerType, "ATTENTION_INPUT", None)
    if kind is None:  # before TensorRT 10.14 there is no such layer
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = backend.module.IAttentionInputLayer  # the binding hands out the base class
            layer.attention.decomposable = True


def _add_profiles(
    builder: Any, config: Any, network: Any, profiles: Sequence[Mapping[str, Shapes]], path: Path
) -> None:
    ports = [network.get_input(index) for index in range(network.num_inputs)]
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for port in ports:
            smallest, typical, largest = shapes[port.name]
            if port.is_shape_tensor:
                raise GuardError(
                    f"{path}: input {port.name!r} decides shapes by its values, which no profile sets; export a graph whose "
                    "shapes follow from its inputs' shapes"
                )
            if -1 in tuple(port.shape):
                profile.set_shape(port.name, smallest, typical, largest)
        if config.add_optimization_profile(profile) < 0:
            raise GuardError(f"{path}: TensorRT refuses a profile ({dict(shapes)}); give sizes that the graph allows")


def _apply(backend: Backend, config: Any, options: BuildOptions) -> None:
    trt = backend.module
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.capabilities:
        _target(backend, config, options.capabilities)
    if options.timing_cache is not None and not backend.is_rtx:
        content = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)


def _target(backend: Backend, config: Any, capabilities: Sequence[str]) -> None:
    require_capabilities(backend, capabilities)
    known = capabilities_of(backend)
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(known[capability], index):
            raise GuardError(f"{backend.name} {backend.version} refuses compute capability {capability}; leave it out")


def require_capabilities(backend: Backend, capabilities: Sequence[str]) -> None:
    """Require that the builder supports the given compute capabilities.

    Raises:
        GuardError: it does not, or it builds only for the GPU that it runs on.
    """
    known = capabilities_of(backend)
    for capability in capabilities:
        if capability not in known:
            can = f"choose among {', '.join(known)}" if known else "it builds for the GPU that it runs on; leave it out"
            raise GuardError(
                f"{backend.name} {backend.version} cannot build for compute capability {capability}; {can}"
            )


def capabilities_of(backend: Backend) -> dict[str, Any]:
    """`8.9` -> the backend's own name for it; empty for one that builds only for the GPU that it runs on."""
    members = getattr(getattr(backend.module, "ComputeCapability", None), "__members__", {})
    numbered = {name[2:]: value for name, value in members.items() if name.startswith("SM")}
    return {f"{digits[:-1]}.{digits[-1]}": value for digits, value in numbered.items()}


def _keep_timings(backend: Backend, config: Any, options: BuildOptions) -> None:
    if options.timing_cache is not None and not backend.is_rtx:
        write_file(options.timing_cache, bytes(config.get_timing_cache().serialize()))


def _require_nothing_dropped(messages: Sequence[Message], path: Path) -> None:
    """`Unused Input` is the only sign that the parser left an input of a node out."""
    dropped = next((m.text for m in messages if m.severity == "WARNING" and "Unused Input" in m.text), None)
    if dropped is not None:
        raise GuardIncomplete(
            f"{path}: TensorRT dropped an input ({' '.join(dropped.split())[:160]}); nothing was written"
        )


def _inspected(backend: Backend, plan: bytes) -> EngineLayers:
    """The layers of what was just built here, where a GPU can open it."""
    trt = backend.module
    engine = trt.Runtime(backend.log.logger).deserialize_cuda_engine(plan)
    if engine is None:
        return EngineLayers(())
    return layers_from_inspector(
        engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    )


def _monitor(trt: Any, report_progress: ProgressCallback) -> Any:
    """The builder's own phases as progress; phases nest, the outermost is shown."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._sizes: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._sizes[phase_name] = max(num_steps, 1)
                report_progress(phase_name, 0, max(num_steps, 1))

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._sizes:
                report_progress(phase_name, self._sizes[phase_name], self._sizes.pop(phase_name))

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._sizes:
                report_progress(phase_name, step, self._sizes[phase_name])
            return True

    return Monitor()
