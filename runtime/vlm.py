"""A whole model, running: prompts and images in, answers out. For unguarded and guarded models alike.

`VisionLanguageModel` puts the parts together: tokenizer and chat template, image preprocessing, vision encoder, token
embeddings, decoder with KV cache. A decoder that takes `input_ids` needs only the first and the last. For a graph in
mode `supervise` each batch is run twice: a short text-only pass gives the coordinates, the real pass takes them. For a
graph that reads paired rows the text-only prompts go into the same call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
from PIL import Image

from ..graphs.errors import GuardError, ModelUnreadable
from ..graphs.json_files import read_json
from ..graphs.package import ModelPackage
from ..graphs.pairs import reads_pairs
from .chat.chat import ChatTokenizer
from .chat.text_stream import TextStream
from .decode_loop import decode, rows_of_tokens
from .decoder import DecoderSession, open_decoder, open_embeddings
from .decoder_inputs import DecoderState, PromptBatch, can_pad
from .decoder_place import DecoderPlace
from .device import SomeRows, Tensor
from .generation import GREEDY, Choose, Chooser, Piece, Request, Sampling, Step
from .images.deepstack import scatter
from .images.image_features import ImageFeatures, Shown
from .images.open_picture import open_image
from .images.positions_by_axes import positions_by_axes
from .images.prepared_picture import Preprocessor
from .images.prompt_images import PromptImages
from .images.shown_pictures import see
from .images.vision import Seen, look, open_preprocessor, unknown_processor
from .knobs import AS_EXPORTED, Knobs
from .paired_batches import PROMPTS, interleaved, rows_of
from .runner_protocol import Runner
from .runners import open_runner
from .token_embeddings import embed

OpenPart = Callable[[Path], Runner]  # one file of the package -> what runs it


class VisionLanguageModel:
    """A model folder, ready to answer.

    Args:
        package: the folder.
        decoder: the decoder's graph if it is not the package's own (a tapped or guarded copy in memory).
        runtime: a row of the table in `runners`.
        optimize: whether the runtime may optimise the decoder's graph.
        open_part: opens the package's files in place of the runtime (engines, each against its digest).
        pads: whether rows of different lengths may share a batch; default: read from the decoder's graph.
        pairs: whether the decoder's guard reads paired rows; default: read from the decoder's graph.
        place: opens the decoder on demand and closes it when another is opened; default: open it now and keep it.
        wrap: wraps the decoder's runner each time it is opened.

    Raises:
        ModelUnreadable: a part is missing or cannot be opened.
        ExtraMissing: the runtime is not installed.
    """

    def __init__(
        self,
        package: ModelPackage,
        decoder: ir.Model | None = None,
        runtime: str = "onnxruntime",
        optimize: bool = True,
        open_part: OpenPart | None = None,
        pads: bool | None = None,
        pairs: bool | None = None,
        place: DecoderPlace | None = None,
        wrap: Callable[[Runner], Runner] | None = None,
    ) -> None:
        self.package = package
        self.runtime = runtime
        self._place, self._wrap = place, wrap
        self._graph, self._optimize = decoder, optimize
        self._runs_part = open_part is not None and decoder is None
        self._session: DecoderSession | None = None
        self._open_part = open_part or (lambda path: open_runner(path, path.parent, runtime))
        if pads is None or pairs is None:
            graph = package.load_decoder() if decoder is None else decoder
            pads = can_pad(graph.graph) if pads is None else pads
            pairs = reads_pairs(graph) if pairs is None else pairs
        self.pads, self.pairs = pads, pairs
        if place is None:
            self._session = self._opened()

    @property
    def decoder(self) -> DecoderSession:
        """The decoder, open. Where the model shares a place, asking for it closes any other decoder there."""
        if self._session is None or self._session.closed:
            assert self._place is not None, "the decoder was closed and has no place to be opened again"
            self._session = self._place.open(self._opened)
        return self._session

    def _opened(self) -> DecoderSession:
        package = self.package
        if self._runs_part:
            # an engine's graph cannot be read: its inputs go by their names
            roles = package.roles if package.decoder.suffix == ".onnx" else None
            runner = self._open_part(package.decoder)
            embed = open_embeddings(package, runner, self._open_part)
            session = DecoderSession(runner, package.kv_heads, package.head_size, roles=roles, embed=embed)
        else:
            session = open_decoder(package, self._graph, self.runtime, self._optimize)
        if session.takes_embeds and package.embed_tokens is None:
            raise ModelUnreadable(
                f"{package.root}: the decoder takes inputs_embeds, but there is no embed_tokens graph"
            )
        if self._wrap is not None:
            session.runner = self._wrap(session.runner)
        return session

    @cached_property
    def takes_embeds(self) -> bool:
        """Whether the decoder takes embeddings in place of tokens; cached, because a decoder takes long to open."""
        return self.decoder.takes_embeds

    def with_decoder(
        self, decoder: ir.Model, optimize: bool = True, wrap: Callable[[Runner], Runner] | None = None
    ) -> VisionLanguageModel:
        """The same model around another decoder graph, in the same place if it has one; the other parts stay open."""
        other = VisionLanguageModel(
            self.package, decoder, self.runtime, optimize, self._open_part, place=self._place, wrap=wrap
        )
        for part in ("chat", "images", "_vision", "_embed", "takes_embeds"):
            if part in self.__dict__:
                other.__dict__[part] = self.__dict__[part]
        return other

    @cached_property
    def chat(self) -> ChatTokenizer:
        path = self.package.companion("tokenizer.json")
        return ChatTokenizer.open(path.parent if path is not None else self.package.root)

    @cached_property
    def images(self) -> Preprocessor:
        return open_preprocessor(self.package.root)

    @property
    def sees(self) -> bool:
        """Whether the model takes images, and they can be prepared here."""
        takes_images = self.package.vision_encoder is not None and self.takes_embeds
        return takes_images and self.unknown_processor is None

    @cached_property
    def unknown_processor(self) -> str | None:
        """Name of the unsupported image processor, if images cannot be prepared (text only); `None` otherwise."""
        return None if self.package.vision_encoder is None else unknown_processor(self.package.root)

    def blank_image(self) -> Image.Image:
        """A white picture of the size that the model looks at, the same object every time."""
        return self._blank

    @cached_property
    def _blank(self) -> Image.Image:
        return self.images.blank_image()

    def image_features(self, image: Image.Image | Path | str | bytes) -> ImageFeatures:
        """The vision encoder's features of one picture, `[image tokens, d]` in the encoder's dtype.

        Raises:
            GuardError: the model takes no images, or the picture cannot be read.
        """
        seen = self._seen([(open_image(image), True)])
        return ImageFeatures(seen.features, seen.pictures[0])

    def token_embeddings(self, ids: np.ndarray) -> np.ndarray:
        """The decoder's embeddings of token ids `[n]`: `[n, d]`."""
        return self._embeds(np.asarray(ids, np.int64)[None])[0]

    # Answers

    def answer(
        self,
        requests: Sequence[Request],
        sampling: Sampling = GREEDY,
        batch_size: int = 16,
        knobs: Knobs = AS_EXPORTED,
    ) -> list[str]:
        """One answer per request, in order.

        Args:
            requests: any number of them.
            sampling: how each next token is chosen.
            batch_size: requests that run together.
            knobs: strength and threshold offset of a guard that has them.
        """
        answers = [""] * len(requests)
        for indices in self.groups(requests, batch_size):
            rows = rows_of_tokens(self.steps([requests[index] for index in indices], sampling, knobs))
            for row, index in zip(rows, indices, strict=True):
                answers[index] = self.chat.decode(row).strip()
        return answers

    def stream(self, request: Request, sampling: Sampling = GREEDY, knobs: Knobs = AS_EXPORTED) -> Iterator[str]:
        """Pieces of one answer as they come, never half a character; together they are the answer."""
        for piece in self.pieces(request, sampling, knobs):
            if piece.text:
                yield piece.text

    def pieces(
        self,
        request: Request,
        sampling: Sampling = GREEDY,
        knobs: Knobs = AS_EXPORTED,
        batch: PromptBatch | None = None,
    ) -> Iterator[Piece]:
        """One answer, a token at a time, with the outputs of its steps.

        Args:
            request: the question.
            sampling: how each next token is chosen.
            knobs: strength and threshold offset of a guard that has them.
            batch: the request as `batch` returned it, where the caller has it already.
        """
        said = TextStream(self.chat.tokenizer, self.chat.decode)
        for number, step in enumerate(self.steps([request], sampling, knobs, batch=batch), start=1):
            (token,) = step.tokens
            text = said.add(token) if token is not None else ""
            if token is None:
                yield Piece(text + said.end(), step, "stop")
            elif number == sampling.max_new_tokens:
                yield Piece(text + said.end(), step, "length")
            else:
                yield Piece(text, step, None)

    def prefill(self, requests: Sequence[Request], batch: PromptBatch | None = None) -> Mapping[str, np.ndarray]:
        """All outputs of the decoder for one batch of prompts; requests must fit in one batch."""
        return self._prefill(requests, batch)[0]

    def _prefill(
        self,
        requests: Sequence[Request],
        batch: PromptBatch | None,
        runtime_controls: Mapping[str, Tensor] | None = None,
    ) -> tuple[Mapping[str, np.ndarray], DecoderState]:
        """The prompts' call, with the text-only prompts before or beside them where the guard takes these."""
        batch = self.batch(requests) if batch is None else batch
        if not self.pairs or _is_text_alone(requests):
            return self.decoder.prefill(batch, self.supervise(requests), runtime_controls)
        texts = self.batch([request.text_only for request in requests])
        outputs, state = self.decoder.prefill(interleaved(texts, batch, left=self.pads), None, runtime_controls)
        return SomeRows(outputs, PROMPTS), rows_of(state, PROMPTS)

    def supervise(self, requests: Sequence[Request]) -> Tensor | None:
        """The text-only pass of a supervised graph: coordinates `[batch, layers, m]`; `None` for any other graph.

        They stay on the runner's device, where it has one, and the real pass takes them from there.
        """
        if not self.decoder.supervised:
            return None
        texts = [request.text_only for request in requests]
        outputs, _ = self.decoder.prefill(self.batch(texts), self.decoder.no_supervisor(len(texts)))
        return self.decoder.coordinates(outputs)

    # Inputs

    def groups(self, requests: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
        """Indices of requests that run together: all or none with an image; of one length if the graph cannot be padded."""
        if batch_size < 1:
            raise GuardError(f"a batch of {batch_size} prompts holds none; choose 1 or more")
        by_length: dict[object, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            length = len(self.chat.encode_turns(request.text_only.turns))
            pictures = len(request.images)
            key = (length, pictures) if not self.pads else not pictures
            if pictures and not self.pads and not (self.sees and self.images.keeps_count):
                key = index  # its length depends on its pictures' shapes
            by_length[key].append(index)
        for members in by_length.values():
            for start in range(0, len(members), batch_size):
                yield members[start : start + batch_size]

    def batch(self, requests: Sequence[Request]) -> PromptBatch:
        """Token ids padded on the left, and embeddings with image features where the decoder takes them."""
        seen = self._look_at([(image, len(r.images) == 1) for r in requests for image in r.images])
        pictures = iter(() if seen is None else seen.pictures)
        rows = [self.chat.encode_turns(r.turns, [next(pictures) for _ in r.images]) for r in requests]
        longest = max(map(len, rows))
        if not self.pads and any(len(row) != longest for row in rows):
            raise GuardError("this decoder cannot be padded; run prompts of one length together")
        ids = np.full((len(rows), longest), self.chat.pad_id, np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, longest - len(row) :] = row
            mask[number, longest - len(row) :] = 1
        if not self.takes_embeds:
            return PromptBatch(ids, mask)
        if seen is None:
            return PromptBatch(ids, mask, self._embeds(ids))
        at = (ids == self.chat.image_token_id) & (mask == 1)
        return PromptBatch(ids, mask, self._embeds(ids, at, seen.features), self._placed(at, mask, seen))

    def _look_at(self, images: Sequence[tuple[Shown, bool]]) -> Seen | None:
        """The features of a batch's images, in their order, each with whether it is the only one of its prompt."""
        rows = any(isinstance(image, ImageFeatures) for image, _ in images)
        if rows and not self.takes_embeds:
            raise GuardError(f"{self.package.root}: the decoder takes no embeddings; leave the image out")
        if rows and self.images_have_grids:
            raise GuardError("this model places an image's tokens by its size, which rows do not have; give a picture")
        return see(images, self._seen) if images else None

    def _seen(self, pictures: Sequence[tuple[Image.Image, bool]]) -> Seen:
        model_type = read_json(self.package.root / "config.json").get("model_type")
        return look(self._vision, self.images, pictures, model_type)

    @property
    def images_have_grids(self) -> bool:
        """Whether an image's tokens are placed by its height and width (the Qwen family, Pixtral)."""
        placed = self.chat.placeholder is not None and self.chat.placeholder.by_place
        return placed or self._position_axes > 0

    @cached_property
    def _vision(self) -> Runner:
        path = self.package.vision_encoder
        if path is None or not self.takes_embeds:
            raise GuardError(f"{self.package.root}: has no vision encoder; leave the image out")
        return self._open_part(path)

    @cached_property
    def _embed(self) -> Runner:
        path = self.package.embed_tokens
        assert path is not None
        return self._open_part(path)

    def _embeds(self, ids: np.ndarray, at: np.ndarray | None = None, features: np.ndarray | None = None) -> np.ndarray:
        """Embeddings of the tokens, with the features `[image tokens, d]` at the positions `at`."""
        return embed(self._embed, ids, at, features)

    def _placed(self, at: np.ndarray, mask: np.ndarray, seen: Seen) -> PromptImages:
        """Places of images, features between the layers, and positions of prompts if they depend on images."""
        positions = None
        if seen.grids is not None:
            positions = positions_by_axes(self._position_axes, at, mask, seen.grids, seen.merge)
        return PromptImages(positions, scatter(seen.outputs, at), at)

    @property
    def _position_axes(self) -> int:
        """How many positions the decoder takes of each token, where they have an axis of their own (M-RoPE: 3)."""
        port = self.decoder.runner.inputs.get(self.decoder.roles.positions or "")
        return port.shape[0] or 0 if port is not None and len(port.shape) == 3 else 0

    # Generation

    def steps(
        self,
        requests: Sequence[Request],
        sampling: Sampling = GREEDY,
        knobs: Knobs = AS_EXPORTED,
        choose: Choose | None = None,
        batch: PromptBatch | None = None,
    ) -> Iterator[Step]:
        """Generate for one batch, a token per row at a time, until every row has ended.

        Args:
            requests: of one batch (`groups`).
            sampling: how each next token is chosen.
            knobs: strength and threshold offset of a guard that has them.
            choose: chooses each next token in place of the sampling, to measure logits or to force given tokens.
            batch: the requests as `batch` returned them, where the caller has them already.

        Raises:
            GuardError: a knob is to be turned that the graph does not have.
        """
        choose, runtime_controls = choose or Chooser(sampling), knobs.feeds(self.decoder.knobs)
        outputs, state = self._prefill(requests, batch, runtime_controls)
        ends, most = self.chat.eos_ids, sampling.max_new_tokens
        yield from decode(self.decoder, outputs, state, choose, self.step_embeds, ends, most)

    def step_embeds(self, column: np.ndarray) -> np.ndarray | None:
        """Embeddings `[batch, 1, d]` of one token per row, `[batch, 1]`; `None` where the decoder takes tokens."""
        return self._embeds(column) if self.takes_embeds else None


def _is_text_alone(requests: Sequence[Request]) -> bool:
    """One request without an image: a row without a partner, which no guard of paired rows edits."""
    return len(requests) == 1 and not requests[0].images
