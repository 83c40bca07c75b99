"""Runs candidates in ONE graph that is guarded at every layer that may be chosen; each call feeds the candidate's numbers.

The graph is rewritten and opened once. Without numbers its guards are neutral (`graphs/trial_graph.py`), so a trial costs only
its answers. `plan_guard` derives a candidate's numbers, as in the export of the winner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.directions import Directions, LayerDirections
from ...graphs.last_logits import keep_last_logits
from ...graphs.planner import plan_guard
from ...graphs.rewrite import rewrite
from ...graphs.spec import GuardSpec
from ...graphs.taps import tap_guard_last_token
from ...graphs.trial_graph import guard_numbers, make_overridable, neutral, widened
from ...runtime.runner_protocol import ClosableRunner, Port, Runner
from ...runtime.vlm import VisionLanguageModel
from ..evaluation.evaluate import tally
from ..evaluation.metrics import Tally, count
from ..prompts.labelled import LabelledPrompt


class TrialModel:
    """A model whose guard can be changed from call to call.

    Args:
        model: unguarded.
        anatomy: of its decoder.
        directions: an SSD for each layer that may be chosen.
        spec: mode and positions; the numbers come with each candidate.
        layers: those that may be chosen.
        rank: the highest that may be chosen.
        tapped: whether every call also returns each layer's state at the last token (`graphs.taps`).

    Raises:
        GuardError: the wish cannot be met on this graph, whatever the candidate.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        anatomy: DecoderAnatomy,
        directions: Directions,
        spec: GuardSpec,
        layers: Sequence[int],
        rank: int,
        tapped: bool = False,
    ) -> None:
        self._anatomy, self._rank = anatomy, rank
        # The trials run here, whatever runtime gets the winner: any lowering computes the same guard.
        self._spec = replace(spec, lowering="auto", target="onnxruntime")
        self._unguarded, graph = model.package.load_decoder(), model.package.load_decoder()
        blank = replace(directions, layers={layer: _any_numbers(directions.layers[layer], rank) for layer in layers})
        everywhere = replace(self._spec, layers=tuple(sorted(layers)), rank=rank)
        self._open_guard = neutral(plan_guard(self._unguarded, anatomy, blank, everywhere))
        report = rewrite(graph, self._open_guard)
        if tapped:
            tap_guard_last_token(graph, anatomy.sites, report)
        self._defaults = guard_numbers(self._open_guard)
        make_overridable(graph, list(self._defaults))
        keep_last_logits(graph)
        self._runner = _Overriding()
        self.model = model.with_decoder(graph, wrap=self._runner.around)

    def numbers(self, directions: Directions) -> dict[str, np.ndarray]:
        """Feeds of a candidate: its numbers at its layers, neutral ones elsewhere."""
        layers = directions.recommended_layers
        assert layers is not None
        rank = directions.layers[layers[0]].ssd.shape[0]
        plan = plan_guard(self._unguarded, self._anatomy, directions, replace(self._spec, layers=layers, rank=rank))
        sites = tuple(replace(site, guard=widened(site.guard, self._rank)) for site in plan.sites)
        return self._defaults | guard_numbers(replace(plan, sites=sites))

    def ask(
        self,
        directions: Directions | None,
        prompts: Sequence[LabelledPrompt],
        max_new_tokens: int,
        batch_size: int = 32,
    ) -> Tally:
        """Run a candidate.

        Args:
            directions: the candidate's; `None`: all guards neutral.
            prompts: labelled prompts.
            max_new_tokens: longest answer.
            batch_size: prompts per call.
        """
        with self.guarded({} if directions is None else self.numbers(directions)):
            return tally(self.model, prompts, max_new_tokens, batch_size)

    @contextmanager
    def guarded(self, numbers: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Within, every call of `model` takes these numbers; without any, every guard is neutral."""
        self._runner.numbers = numbers
        try:
            yield
        finally:
            self._runner.numbers = {}


class _Overriding:
    """A runner that feeds the candidate's numbers besides what it is given.

    Not a `DeviceRunner`: outputs come back to the host, so a guard that changes between calls needs no other protocol.
    """

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self.numbers: Mapping[str, np.ndarray] = {}

    def around(self, runner: Runner) -> Runner:
        """This, around a runner that was opened; the one before it is closed."""
        self._runner = runner
        return self

    @property
    def _inner(self) -> Runner:
        assert self._runner is not None, "not opened yet"
        return self._runner

    @property
    def inputs(self) -> Mapping[str, Port]:
        return self._inner.inputs

    @property
    def outputs(self) -> Mapping[str, Port]:
        return self._inner.outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._inner.run({**feeds, **self.numbers})

    def close(self) -> None:
        if isinstance(self._runner, ClosableRunner):
            self._runner.close()
        self._runner = None


def only(result: Tally, prompts: Sequence[LabelledPrompt], chosen: Sequence[int]) -> Tally:
    """The part of a tally that is about some of its prompts."""
    answers, refusals = [result.answers[i] for i in chosen], [result.refusals[i] for i in chosen]
    return _counted([prompts[i] for i in chosen], answers, refusals)


def together(prompts: Sequence[LabelledPrompt], parts: Sequence[tuple[Sequence[int], Tally]]) -> Tally:
    """Merge tallies of parts, each with the indices of its prompts, in the order of the prompts."""
    found = {i: (a, r) for at, part in parts for i, a, r in zip(at, part.answers, part.refusals, strict=True)}
    order = sorted(found)
    return _counted([prompts[i] for i in order], [found[i][0] for i in order], [found[i][1] for i in order])


def _counted(prompts: Sequence[LabelledPrompt], answers: Sequence[str], refusals: Sequence[bool]) -> Tally:
    return Tally(count(prompts, refusals), tuple(answers), tuple(refusals))


def _any_numbers(layer: LayerDirections, rank: int) -> LayerDirections:
    """Numbers with which any mode can be planned; the neutral guard replaces them."""
    ssd = layer.ssd[:rank]  # fewer if there are no more: planning reports it
    zeros = np.zeros(len(ssd), np.float32)
    return LayerDirections(ssd, zeros, zeros, layer.ssd[0], 0.0, 0.0)
