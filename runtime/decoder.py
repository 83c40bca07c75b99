"""Running a decoder graph: prefill a batch, then one token at a time through the KV cache.

Works from the graph's own inputs, so one class serves the onnx-community decoder (`inputs_embeds`), plain text decoders
(`input_ids`), onnxruntime-genai's, and graphs exported without a cache (each step then runs the whole sequence again).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..graphs.decoder_state import is_past_name
from ..graphs.errors import GuardError
from ..graphs.genai_deepstack import PLACES
from ..graphs.graph_io import in_memory
from ..graphs.last_logits import reads_in_place
from ..graphs.package import ModelPackage
from ..graphs.plan import COORDINATES_OUTPUT, PROMPT_SUPERVISOR_INPUT, SUPERVISOR_INPUTS
from ..graphs.reference import NO_SUPERVISOR, UNDECIDED
from ..graphs.roles import TOKEN_TYPES, TOKENS, InputRoles, roles_by_name
from ..graphs.runtime_controls import PAST_GATE_INPUT, PRESENT_GATE_OUTPUT, SCORES_OUTPUT
from .decoder_inputs import (
    CACHE_BRANCH,
    GUARD_INPUTS,
    KEPT_LOGITS,
    PER_LAYER,
    DecoderState,
    PromptBatch,
    empty_state,
    float_coordinates,
    mask_for,
    needs_more,
)
from .device import DeviceOutputs, FirstTokens, Tensor, last, where_it_is
from .images.deepstack import is_embeds, side_by_side
from .images.prompt_images import PromptImages
from .runner_protocol import ClosableRunner, DescribedRunner, DeviceRunner, OverridableRunner, Runner
from .runners import open_runner


class DecoderSession:
    """One decoder graph behind a runner.

    Args:
        runner: the graph.
        kv_heads, head_size: of the cache, where the graph itself leaves them open (onnxruntime-genai does).
        given: the graph is only run on inputs that were given by name (`PromptBatch.given`), so any will do.
        roles: what its inputs are for; default: by their names, for a runner whose graph cannot be read.
        head: makes logits of what the decoder gives, where another graph does that.
        embed: the embedding graph, where it gives more than `inputs_embeds` to the decoder.

    Raises:
        GuardError: the graph takes neither token ids nor embeddings, or an unknown input.
    """

    def __init__(
        self,
        runner: Runner,
        kv_heads: int | None = None,
        head_size: int | None = None,
        given: bool = False,
        roles: InputRoles | None = None,
        head: Runner | None = None,
        embed: Runner | None = None,
    ) -> None:
        self.runner, self._head, self._embed = runner, head, embed
        self.calls = 0  # of the runner
        self.closed = False
        self._heads = kv_heads, head_size
        inputs = runner.inputs
        self.roles = roles or roles_by_name(inputs, runner.outputs)
        self.takes_embeds = bool(self.roles.embeds)
        self.logits_output = self.roles.logits
        if not given and not self.roles.text:
            raise GuardError(f"the decoder takes neither input_ids nor inputs_embeds, but {', '.join(inputs)}")
        self._states = {pair.past: pair for pair in self.roles.states}
        self.cache_inputs = {name: port for name, port in inputs.items() if name in self._states}
        self.injected = {name: port for name, port in inputs.items() if is_embeds(name)}
        self._splits = isinstance(runner, DescribedRunner) and PLACES in runner.metadata
        self._embedded = (
            [] if embed is None else [name for name in (PER_LAYER,) if name in {*inputs} & {*embed.outputs}]
        )
        unknown = [] if given else needs_more(inputs, self.roles, self._embedded)
        if unknown and is_past_name(unknown[0]):
            raise GuardError(
                f"cache input {unknown[0]!r} has no output to refill it among {', '.join(list(runner.outputs)[:4])} ..."
            )
        if unknown:
            raise GuardError(
                f"the decoder has an unknown input {unknown[0]!r}; export it in a standard layout, or give "
                "example inputs with --proof-inputs"
            )

    def close(self) -> None:
        """Give the graph's memory back; the session cannot be run any more."""
        self.closed = True
        for runner in (self.runner, self._head, self._embed):
            if isinstance(runner, ClosableRunner):
                runner.close()

    @property
    def supervised(self) -> bool:
        """Whether the graph takes the text-only coordinates."""
        return bool(self.supervisor_input)

    @property
    def supervisor_input(self) -> str:
        """The input for them, or ""."""
        return next((name for name in SUPERVISOR_INPUTS if name in self.runner.inputs), "")

    @property
    def edits_prompt_end(self) -> bool:
        """Whether the coordinates go into the call with the prompt's end alone: answers are then the unguarded decoder's."""
        return self.supervisor_input == PROMPT_SUPERVISOR_INPUT

    @property
    def supervisor_shape(self) -> tuple[int, int]:
        """`(guarded layers, rank)`"""
        _, layers, rank = self.runner.inputs[self.supervisor_input].shape
        assert layers is not None and rank is not None
        return layers, rank

    def no_supervisor(self, batch: int) -> np.ndarray:
        """The supervisor of a text-only pass, `[batch, layers, m]`: no gate opens."""
        return np.full((batch, *self.supervisor_shape), NO_SUPERVISOR, np.float32)

    @property
    def knobs(self) -> tuple[str, ...]:
        """Inputs with defaults, which may be fed or left out."""
        return tuple(self.runner.optional) if isinstance(self.runner, OverridableRunner) else ()

    @property
    def outputs_scores(self) -> bool:
        """Whether the graph outputs the scores of its gates."""
        return SCORES_OUTPUT in self.runner.outputs

    def prefill_feeds(self, batch: PromptBatch, supervisor: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The graph's inputs for a whole prompt on an empty cache."""
        return {name: np.asarray(fed) for name, fed in self._prefill_feeds(batch, supervisor, {}).items()}

    def _prefill_feeds(
        self, batch: PromptBatch, supervisor: Tensor | None, runtime_controls: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        cache = self._empty_cache(batch.size)
        state = DecoderState(
            batch.ids, batch.mask, batch.embeds, cache, supervisor, batch.images, batch.further, dict(runtime_controls)
        )
        return self._feeds(state, batch.ids, batch.embeds)

    def prefill(
        self, batch: PromptBatch, supervisor: Tensor | None = None, runtime_controls: Mapping[str, Tensor] | None = None
    ) -> tuple[Mapping[str, np.ndarray], DecoderState]:
        """Run a whole prompt.

        Args:
            batch: the prompts.
            supervisor: the text-only coordinates `[batch, layers, m]` for a supervised graph. A graph that edits only the
                end of the prompt receives them in the call with that token, and no supervisor in later calls.
            runtime_controls: further inputs of the guard by name, the same in every call. Held gates are decided by this
                call unless they are among these inputs.

        Returns:
            All outputs, and the state for `step`. Outputs on a device are copied to the host on first access.
        """
        if batch.given is not None:
            outputs = self._run(self._given(batch, batch.given, supervisor) | dict(runtime_controls or {}))
            return outputs, DecoderState(batch.ids, batch.mask, None)
        if self.one_token:
            return self._prefill_by_token(batch, supervisor, runtime_controls or {})
        outputs = self._run(self._prefill_feeds(batch, supervisor, runtime_controls or {}))
        embeds = None if self.cache_inputs else batch.embeds
        state = DecoderState(
            batch.ids, batch.mask, embeds, {}, supervisor, batch.images, batch.further, dict(runtime_controls or {})
        )
        self._keep(state, outputs)
        self._end_prompt(state, outputs)
        return outputs, state

    def _run(self, feeds: Mapping[str, Tensor], step: bool = False) -> Mapping[str, np.ndarray]:
        assert not self.closed, "a closed decoder session was run"
        self.calls += 1
        if isinstance(self.runner, DeviceRunner):
            return DeviceOutputs(self.runner.run_on_device(feeds, step))
        return self.runner.run({name: np.asarray(fed) for name, fed in feeds.items()})

    def _given(
        self, batch: PromptBatch, given: Mapping[str, np.ndarray], supervisor: Tensor | None
    ) -> dict[str, Tensor]:
        ports = {name: port for name, port in self.runner.inputs.items() if name not in GUARD_INPUTS}
        differing = sorted(ports.keys() ^ given.keys())
        if differing:
            raise GuardError(
                f"the given inputs are {', '.join(given)}, the decoder takes {', '.join(ports)}; {differing[0]!r} is in one "
                "of them alone"
            )
        asked = {} if supervisor is None else {self.supervisor_input: float_coordinates(supervisor)}
        return (
            {name: given[name].astype(port.dtype) for name, port in ports.items()} | asked | self._undecided(batch.size)
        )

    @property
    def one_token(self) -> bool:
        """Whether the graph takes one token a call (`decode` of a transformers export): its prompts are run in steps."""
        if not self.cache_inputs:
            return False
        text = self.runner.inputs[self.roles.text]
        return len(text.shape) > 1 and text.shape[1] == 1

    def written(self, outputs: Mapping[str, np.ndarray], tokens: int) -> Mapping[str, np.ndarray]:
        """Outputs of a call without the room that ring caches keep for later tokens, which onnxruntime does not initialise.

        Args:
            outputs: of a call.
            tokens: per row so far, those of the call included.
        """
        rings = [pair for pair in self._states.values() if pair.axis is not None and tokens < (pair.capacity or 0)]
        return FirstTokens(outputs, {pair.present: pair.axis or 0 for pair in rings}, tokens) if rings else outputs

    @property
    def call_length(self) -> int | None:
        """Tokens per call, where the graph fixes the number."""
        shape = self.runner.inputs[self.roles.text].shape if self.roles.text else ()
        return shape[1] if len(shape) > 1 else None

    @property
    def can_step(self) -> bool:
        """Whether a second call can follow the first: not where the graph fixes its length and keeps no state, and not where
        what comes out is of another fixed size than what goes in."""
        if not self.cache_inputs:
            return self.call_length is None
        ports, outputs = self.runner.inputs, self.runner.outputs
        pairs = ((ports[past].shape, outputs[pair.present].shape) for past, pair in self._states.items())
        return all(a == b for before, after in pairs for a, b in zip(before, after, strict=False) if a is not None)

    def _prefill_by_token(
        self, batch: PromptBatch, supervisor: Tensor | None, runtime_controls: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, np.ndarray], DecoderState]:
        """A whole prompt, a token a call; the outputs are those of its last token."""
        none = np.zeros((batch.size, 0), np.int64)
        cache = self._empty_cache(batch.size)
        state = DecoderState(none, none, None, cache, supervisor, batch.images, batch.further, dict(runtime_controls))
        outputs: Mapping[str, np.ndarray] = {}
        length = batch.ids.shape[1]
        for at in range(length):
            if self.edits_prompt_end and supervisor is not None:
                state.supervisor = supervisor if at == length - 1 else self.no_supervisor(batch.size)
            embeds = None if batch.embeds is None else batch.embeds[:, at : at + 1]
            outputs = self.step(state, batch.ids[:, at : at + 1], embeds)
        self._end_prompt(state, outputs)
        return outputs, state

    def step(self, state: DecoderState, tokens: np.ndarray, embeds: np.ndarray | None) -> Mapping[str, np.ndarray]:
        """Run one more token per row, `[batch, 1]`; changes `state`.

        Raises:
            GuardError: the guard edits the prompt's end, which this graph computes again without the edit.
        """
        if self.edits_prompt_end and not self.cache_inputs:
            raise GuardError(
                "this guard edits the end of the prompt, and the decoder has no KV cache that keeps the edit for the answer; "
                "export the model with a cache, or choose another mode"
            )
        state.ids = np.concatenate([state.ids, tokens], axis=1)
        state.mask = np.concatenate([state.mask, np.ones_like(tokens)], axis=1)
        current = tokens
        if not self.cache_inputs:  # exported without a cache: the whole sequence again
            current = state.ids
            if embeds is not None and state.embeds is not None:
                embeds = state.embeds = np.concatenate([state.embeds, embeds], axis=1)
        outputs = self._run(self._feeds(state, current, embeds), step=True)
        self._keep(state, outputs)
        return outputs

    def coordinates(self, outputs: Mapping[str, np.ndarray]) -> Tensor:
        """The graph's own coordinates at the last token, `[batch, layers, m]` (supervised graphs), where they are."""
        return where_it_is(outputs, COORDINATES_OUTPUT)

    def last_logits(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits at the last position, `[batch, vocabulary]` float32; prompts are padded on the left."""
        rows = last(outputs, self.logits_output)
        if self._head is not None:
            (port,) = self._head.inputs.values()
            rows = next(iter(self._head.run({port.name: rows[:, None].astype(port.dtype)}).values()))[:, -1]
        return rows.astype(np.float32)

    def _feeds(self, state: DecoderState, current: np.ndarray, embeds: np.ndarray | None) -> dict[str, Tensor]:
        ports, roles = self.runner.inputs, self.roles
        feeds: dict[str, Tensor] = {}
        images = state.images or PromptImages()
        window = state.ids.shape[1] - current.shape[1], state.ids.shape[1]
        if self.takes_embeds:
            assert embeds is not None
            if self._splits:
                rows = [images.injected_between(name, *window) for name in images.injected]
                embeds = side_by_side(embeds, rows, ports[roles.embeds].shape[-1])
            feeds[roles.embeds] = embeds.astype(ports[roles.embeds].dtype)
        for name in {roles.tokens, TOKENS} & ports.keys():  # beside embeddings they show which tokens are an image's
            feeds[name] = current.astype(ports[name].dtype)
        if roles.mask:
            feeds[roles.mask] = mask_for(state.mask, current.shape[1], ports[roles.mask], self.can_step)
        if roles.positions:
            positions = np.maximum(np.cumsum(state.mask, axis=1) - 1, 0)[:, -current.shape[1] :]
            axes = ports[roles.positions].shape[:-2]  # M-RoPE has one row per axis; between words all of them agree
            positions = np.broadcast_to(positions, (*((n or 1) for n in axes), *positions.shape))
            # A grid of patches says nothing to a decoder that counts tokens.
            if len(axes) == 1 and (of_images := images.positions_between(*window)) is not None:
                positions = of_images
            feeds[roles.positions] = positions.astype(ports[roles.positions].dtype)
        for name, port in self.injected.items():
            rows = images.injected_between(name, *window)
            if rows is None:
                rows = np.zeros((*current.shape, port.shape[-1] or 0))
            feeds[name] = rows.astype(port.dtype)
        if TOKEN_TYPES in ports:
            of_image = images.images_between(*window)
            kinds = np.zeros(current.shape) if of_image is None else of_image
            feeds[TOKEN_TYPES] = kinds.astype(ports[TOKEN_TYPES].dtype)
        past = window[0] > 0 and bool(self.cache_inputs)
        for name, number in ((CACHE_BRANCH, past), (KEPT_LOGITS, 0)):
            if name in ports:
                feeds[name] = np.full(len(ports[name].shape) * (1,), number, ports[name].dtype)
        if self.supervised:
            if state.supervisor is None:
                raise GuardError(
                    "this graph is guarded with a supervisor and needs the text-only coordinates; run the text-only pass "
                    "first, as GuardedVLM does"
                )
            feeds[self.supervisor_input] = float_coordinates(state.supervisor)
        further = {} if state.further is None else dict(state.further.between(*window))
        if self._embed is not None and any(name not in further for name in self._embedded):
            (tokens,) = self._embed.inputs.values()
            rows = self._embed.run({tokens.name: current.astype(tokens.dtype)})
            feeds |= {name: rows[name].astype(ports[name].dtype) for name in self._embedded}
        return feeds | further | self._undecided(current.shape[0]) | state.runtime_controls | state.cache

    def _undecided(self, batch: int) -> dict[str, Tensor]:
        """Input for gates that the prompt decides, `[batch, layers]`."""
        port = self.runner.inputs.get(PAST_GATE_INPUT)
        return {} if port is None else {PAST_GATE_INPUT: np.full((batch, port.shape[1] or 0), UNDECIDED, np.float32)}

    def _end_prompt(self, state: DecoderState, outputs: Mapping[str, np.ndarray]) -> None:
        """From here on gates are as the end of the prompt decided them, and what edits the prompt's end edits nothing."""
        if self.edits_prompt_end and state.supervisor is not None:
            state.supervisor = self.no_supervisor(state.ids.shape[0])
        if PAST_GATE_INPUT in self.runner.inputs:
            state.runtime_controls.setdefault(PAST_GATE_INPUT, where_it_is(outputs, PRESENT_GATE_OUTPUT))

    def _keep(self, state: DecoderState, outputs: Mapping[str, np.ndarray]) -> None:
        state.cache = {name: where_it_is(outputs, pair.present) for name, pair in self._states.items()}

    def _empty_cache(self, batch: int) -> dict[str, Tensor]:
        return {
            name: empty_state(port, self._states[name], batch, *self._heads) for name, port in self.cache_inputs.items()
        }


def open_decoder(
    package: ModelPackage,
    graph: Path | ir.Model | None = None,
    runtime: str = "onnxruntime",
    optimize: bool = True,
    folder: Path | None = None,
    given: bool = False,
) -> DecoderSession:
    """Open the package's decoder, or `graph` in its place.

    Args:
        package: the model.
        graph: a file, or a graph in memory; default: the package's decoder.
        runtime: a row of the table in `runners`.
        optimize: enable the runtime's graph optimisations.
        folder: folder of the external data of a graph in memory; default: the decoder's.
        given: as for `DecoderSession`.
    """
    if isinstance(graph, ir.Model):
        content, home = in_memory(graph, folder or package.decoder.parent)
        runner = open_runner(content, home, runtime, optimize, packs=not reads_in_place(graph))
    else:
        path = graph or package.decoder
        runner = open_runner(path, path.parent, runtime, optimize)
    head = open_runner(package.head, package.head.parent, runtime) if package.head is not None else None
    embed = open_embeddings(package, runner, lambda path: open_runner(path, path.parent, runtime))
    return DecoderSession(runner, package.kv_heads, package.head_size, given, package.roles, head, embed)


def open_embeddings(package: ModelPackage, decoder: Runner, open_part: Callable[[Path], Runner]) -> Runner | None:
    """The package's embedding graph if the decoder takes more of it than `inputs_embeds`; else `None`."""
    path = package.embed_tokens
    return open_part(path) if path is not None and PER_LAYER in decoder.inputs else None
