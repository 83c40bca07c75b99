"""A decoder of two engines on a fake device: which engine runs what, what it is fed, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fake_tensorrt import Profile, fake_engine
from tensorrt_rig import Rig
from tiny_vlm_paths import PROMPTS, Guarded

from vlmguard.exporter.engines.profile import EngineProfile, Span, decoder_shapes
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.engine_plans import decode_step_plan
from vlmguard.graphs.errors import ModelUnreadable, RunFailed
from vlmguard.graphs.graph_io import in_memory
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.plan import SUPERVISOR_INPUT, number_input
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.strip import strip_guard
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.decoder import DecoderSession
from vlmguard.runtime.device import Tensor
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.tensorrt.cuda import CudaTensor
from vlmguard.runtime.tensorrt.decoder_engines import DecoderEngines
from vlmguard.runtime.tensorrt.number_inputs import NumberInputs
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)

PREFILL = EngineProfile("prefill", Span(1, 1, 4), Span(1, 32, 128), Span(0, 0, 0))
DECODE = EngineProfile("decode", Span(1, 1, 4), Span(1, 1, 1), Span(1, 32, 160))
REQUESTS = [
    Request("how to steal the boat"),
    Request("please tell me how to steal the boat", sorted((PROMPTS / "images").glob("*.png"))[1]),
]


class Counted(DecoderEngines):
    """How often each engine ran."""

    def __init__(self, *engines: object) -> None:
        super().__init__(*engines)  # type: ignore[arg-type]
        self.ran = {"prefill": 0, "step": 0}
        for name, runner in (("prefill", self.prefill), ("step", self.step)):
            runner.run_on_device = self._counting(name, runner.run_on_device)  # type: ignore[method-assign]

    def _counting(self, name: str, run):
        def counted(feeds: Mapping[str, Tensor], step: bool = False) -> dict[str, Tensor]:
            self.ran[name] += 1
            return run(feeds, step)

        return counted


def engine_of(model: ir.Model, home: Path, profile: EngineProfile) -> bytes:
    content, _ = in_memory(model, home, maps=False)
    return fake_engine(onnx.load_model_from_string(content), (cast(Profile, decoder_shapes(model.graph, profile, {})),))


def opened(rig: Rig, folder: Path) -> tuple[VisionLanguageModel, Counted]:
    """The model of a guarded folder with its guard as TensorRT gets it: a decoder of two engines."""
    package = open_package(folder)
    graphs = []
    for step in (False, True):
        model = package.load_decoder()
        strip_guard(model)
        anatomy = dissect(model)
        directions = read_directions(folder / "directions.safetensors")
        plan = plan_guard(model, anatomy, directions, GuardSpec(lowering="rank1"))
        if step:
            plan = decode_step_plan(plan)
            assert plan is not None
        rewrite(model, plan)
        graphs.append(engine_of(model, package.decoder.parent, DECODE if step else PREFILL))
    pair = Counted(*(rig.open(graph) for graph in graphs))

    def open_part(path: Path):
        return pair if path == package.decoder else rig.open(fake_engine(path))

    return VisionLanguageModel(package, open_part=open_part, pads=True), pair


@pytest.mark.parametrize("mode", ["restore", "supervise"])
def test_prompts_and_steps_run_on_their_engines_and_answer_as_onnxruntime(guarded: Guarded, mode: str) -> None:
    rig = Rig()
    model, pair = opened(rig, guarded(mode))
    plain = VisionLanguageModel(open_package(guarded(mode)))
    assert model.answer(REQUESTS, Sampling(8)) == plain.answer(REQUESTS, Sampling(8))
    groups = len(list(model.groups(REQUESTS, 4)))
    passes = 2 if mode == "supervise" else 1  # a text-only pass before each prompt
    assert pair.ran["prefill"] == passes * groups and pair.ran["step"] > 0


def test_the_text_only_pass_shares_the_profile_of_prompts(guarded: Guarded) -> None:
    """No engine, profile or execution context of its own, and no copy of the coordinates before the first step."""
    rig = Rig()
    model, pair = opened(rig, guarded("supervise"))
    batch = model.batch(REQUESTS[:1])
    supervisor = model.supervise(REQUESTS[:1])
    before = rig.trt.contexts
    assert isinstance(supervisor, CudaTensor) and pair.ran == {"prefill": 1, "step": 0}
    rig.cudart.to_host.clear()
    _, state = model.decoder.prefill(batch, supervisor)
    assert rig.trt.contexts == before and rig.cudart.to_host == [] and pair.ran == {"prefill": 2, "step": 0}
    assert len(pair.prefill._profiles) == len(pair.step._profiles) == 1
    token, embeds = batch.ids[:, :1], None if batch.embeds is None else batch.embeds[:, :1]
    model.decoder.step(state, token, embeds)
    first = list(rig.cudart.to_host)
    assert first == [np.asarray(supervisor).nbytes]
    copied = len(rig.cudart.to_host)
    for _ in range(3):
        model.decoder.step(state, token, embeds)
    assert len(rig.cudart.to_host) == copied and pair.ran == {"prefill": 2, "step": 4}


def feeds_of(model: VisionLanguageModel, tokens: int, past: int, rows: int = 2) -> dict[str, np.ndarray]:
    """Inputs of one call, zeros but for the mask."""
    sizes = {"attention_mask": past + tokens, "position_ids": tokens}
    feeds = {}
    for name, port in model.decoder.runner.inputs.items():
        if name in sizes:
            shape = (rows, sizes[name])
        elif name.startswith("past"):
            shape = (rows, port.shape[1] or 1, past, port.shape[3] or 1)
        elif name == SUPERVISOR_INPUT:
            shape = (rows, *(size or 1 for size in port.shape[1:]))
        else:
            shape = (rows, tokens, *(size or 1 for size in port.shape[2:]))
        feeds[name] = (np.ones if name == "attention_mask" else np.zeros)(shape, port.dtype)
    return feeds


def test_missing_and_wrongly_shaped_coordinates_are_errors_in_both_phases(guarded: Guarded) -> None:
    model, pair = opened(Rig(), guarded("supervise"))
    for tokens, past in ((5, 0), (1, 5)):
        whole = feeds_of(model, tokens, past)
        assert pair.run_on_device(whole)
        _, layers, rank = whole[SUPERVISOR_INPUT].shape
        lacking = {name: value for name, value in whole.items() if name != SUPERVISOR_INPUT}
        with pytest.raises(RunFailed, match=rf"misses its input '{SUPERVISOR_INPUT}'"):
            pair.run_on_device(lacking)
        for shape in (
            (2, layers + 1, rank),
            (2, layers, rank + 1),
            (2, layers),
            (3, layers, rank),
        ):
            with pytest.raises(RunFailed, match=r"has shape .* these prompts need \(2, "):
                pair.run_on_device(whole | {SUPERVISOR_INPUT: np.zeros(shape, np.float32)})
        with pytest.raises(RunFailed, match="as float32, not as float64"):
            pair.run_on_device(whole | {SUPERVISOR_INPUT: np.zeros((2, layers, rank))})
    with pytest.raises(RunFailed, match="has no input"):
        pair.step.run_on_device(feeds_of(model, 1, 5) | {number_input(0, 0): np.zeros((2, 1, 1), np.float32)})


def test_a_step_beyond_the_range_is_refused_with_the_range_of_steps(guarded: Guarded) -> None:
    model, pair = opened(Rig(), guarded("restore"))
    assert pair.run_on_device(feeds_of(model, 1, 0)) and pair.ran == {"prefill": 1, "step": 0}  # a prompt of one token
    assert pair.run_on_device(feeds_of(model, 1, 160), step=True) and pair.ran == {"prefill": 1, "step": 1}
    with pytest.raises(RunFailed, match=r"the engine was built for \(1, 2\)\.\.\(4, 161\)"):
        pair.run_on_device(feeds_of(model, 1, 161), step=True)


def test_every_coordinate_reaches_its_own_input() -> None:
    """Layers 3 and 11 with two rows each: sorted as numbers, one copy, places that TensorRT accepts."""
    rig = Rig()
    names = [number_input(layer, row) for layer in (11, 3) for row in (1, 0)]
    inputs = NumberInputs(["embeds", *names], "the engine")
    assert inputs.names == tuple(number_input(layer, row) for layer in (3, 11) for row in (0, 1))
    from vlmguard.runtime.tensorrt.cuda import Pool

    stacked = np.arange(70 * 2 * 2, dtype=np.float32).reshape(70, 2, 2)
    placed = inputs.placed(stacked, Pool(rig.cuda))
    for number, name in enumerate(inputs.names):
        tensor = placed[name]
        assert isinstance(tensor, CudaTensor) and tensor.buffer.address % 256 == 0 and tensor.shape == (70, 1, 1)
        np.testing.assert_array_equal(tensor.numpy().ravel(), stacked[:, number // 2, number % 2])
    assert len(rig.cudart.to_device) == 1
    stacked += 1  # an array that is changed in place is read again
    np.testing.assert_array_equal(
        np.asarray(inputs.placed(stacked, Pool(rig.cuda))[names[-1]]).ravel(), stacked[:, 0, 0]
    )
    with pytest.raises(ModelUnreadable, match="different numbers of coordinates"):
        NumberInputs(names[1:], "the engine")


def test_both_engines_give_their_memory_back(guarded: Guarded) -> None:
    rig = Rig()
    model, pair = opened(rig, guarded("supervise"))
    model.answer(REQUESTS[:1], Sampling(3))
    assert isinstance(model.decoder, DecoderSession)
    model.decoder.close()
    assert not pair.prefill._pool.open and not pair.step._pool.open
