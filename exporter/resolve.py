"""What guides the rewrite: directions (given, found beside the model, or extracted and calibrated), and proof inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..graphs.anatomy import DecoderAnatomy
from ..graphs.digests import sha256_file
from ..graphs.directions import DIRECTIONS_FILE, Directions, read_directions
from ..graphs.errors import DirectionMismatch, GuardError
from ..graphs.layouts import open_package
from ..graphs.modes import guard_mode
from ..graphs.package import ModelPackage
from ..graphs.plan import GuardPlan
from ..graphs.planner import require_fitting
from ..graphs.progress import ProgressCallback
from ..graphs.spec import GuardSpec
from ..runtime.decoder_place import DecoderPlace
from ..runtime.generation import Request
from ..runtime.images.vision import unknown_processor
from ..runtime.vlm import VisionLanguageModel
from .calibration.align_layers import ALIGNED_RANK, MORE_ROWS
from .calibration.attempts import Choice
from .calibration.calibrate import ANSWER_TOKENS, DEFAULT_BUDGET, calibrate
from .calibration.choice import Wish, choose
from .calibration.deadline import Deadline
from .calibration.effect import (
    Unguarded,
    ask_guarded,
    ask_unguarded,
    builtin_sample,
    measure_separation,
    require_effect,
    sample_of,
    why_not_asked,
)
from .calibration.judged import beside_images
from .calibration.refusal_regression import Refusals, require_no_fewer
from .calibration.results import Calibration
from .executors import ExecutorFactory, local_executors
from .extraction.estimators import DEFAULT_ESTIMATOR
from .extraction.extract import extract_all_layers
from .extraction.kept_states import kept_beside, model_digest
from .last_token_model import last_token_model
from .prompts.anchors import Anchors, open_anchors
from .prompts.labelled import (
    BUILTIN,
    LabelledPrompt,
    Sources,
    find_file,
    fingerprint,
    full_names,
    is_builtin,
    prompts_from_anchors,
    read_anchors,
    read_prompts,
    short_names,
)
from .prompts.overlaps import require_held_out
from .proof.inputs import ProofInputs, given_inputs, proof_inputs, signature_inputs
from .proof.prove import TOLERANCE
from .proof.signature import why_made
from .sources import Source

ANCHOR_FILES = ("anchors.jsonl", "anchors.json", "anchors.csv")
CALIBRATION_FILES = ("calibration.jsonl", "calibration.json", "calibration.csv")
EXTRACTED_RANK = 4
_PROOF_PROMPTS = 4  # of each label and setting
NOT_COUNTED = "the guard's effect was not counted: without an image, mode {} compares each prompt with itself"
NOT_ASKED = "no harmful prompts were asked without and with the guard"


class _NotAsked(Exception):
    """Why the model cannot be asked; becomes a note."""


@dataclass
class Guide:
    """Where directions and proof inputs come from; the running model is opened only if something needs it."""

    source: Source
    anatomy: DecoderAnatomy
    spec: GuardSpec
    budget: float
    force: bool
    report_progress: ProgressCallback
    given: tuple[Path, ...] = ()  # inputs to prove on
    estimator: str = DEFAULT_ESTIMATOR
    readout: str | None = None  # of the gate of `restore`; None: calibration chooses
    output: Path | None = None  # states are kept beside it while they are read; None: nowhere
    executors: ExecutorFactory = local_executors  # who reads the anchors' states
    images: tuple[Path, ...] = ()  # the user's pictures, for calibration
    seconds: float | None = None  # that a calibration may take
    model: VisionLanguageModel | None = None
    notes: list[str] = field(default_factory=list)
    not_asked: str | None = None  # what could not be asked, or not counted, and why: a note of the plan
    found: dict[str, Path] = field(default_factory=dict)  # what was found beside the model -> its absolute path
    place: DecoderPlace = field(default_factory=DecoderPlace)  # of every decoder that is opened, one at a time

    @property
    def package(self) -> ModelPackage:
        return self.source.package

    def running(self) -> VisionLanguageModel:
        if self.model is None:
            self.model = last_token_model(self.package, self.place)
        return self.model

    def directions(
        self, given: Path | str | None, anchors: Sources | None, calibration: Sources | None
    ) -> tuple[Directions, Calibration | Choice | None]:
        """Given, found beside the model, or extracted and calibrated; with what was measured on the way."""
        if self.package.vision_encoder is not None and (unknown := unknown_processor(self.package.root)) is not None:
            self.notes.append(f"images are left out: what {unknown} makes of them cannot be made here")
        path = Path(given) if given is not None else None
        if path is None and anchors is None and calibration is None:
            path = self.find("directions", (DIRECTIONS_FILE,))
        if self.spec.mode is not None and not guard_mode(self.spec.mode).is_calibrated:
            self._require_no_calibration(calibration)
            if path is None:
                return self.aligned(anchors), None
            if anchors is not None:
                raise GuardError(
                    f"{path}: mode align copies along these directions as they are, so --anchors has no effect; leave one of "
                    "the two out"
                )
        if path is None and self.spec.mode is None:
            chosen = self.chosen(anchors, calibration)
            self.notes += chosen.notes()
            return chosen.directions, chosen
        if path is None:
            made = self.calibrated(anchors, calibration)
            return made.directions, made
        found = read_directions(path)
        if given is None and found.model_sha256 is None:
            self.notes.append(f"{path.name} does not record the decoder that it was extracted from")
        self.notes.append(f"directions {'given' if given is not None else 'found'}: {path.name}")
        self._require_own(path, found, accepts_foreign=self.force and given is not None)
        if anchors is None and calibration is None:
            self._require_nothing_to_calibrate(path)
            return found, None
        made = self.calibrated(anchors, calibration, found)
        return made.directions, made

    def aligned(self, anchors: Sources | None) -> Directions:
        """Directions for mode `align`, which calibrates nothing: those of the anchors, of every layer."""
        found = self.anchors(anchors)
        self.notes.append(f"directions extracted from {found.title}; nothing is calibrated in mode align")
        return replace(self.extracted(found, self.spec.rank or ALIGNED_RANK), mode="align")

    def _require_no_calibration(self, calibration: Sources | None) -> None:
        """Options of a calibration have no effect on a mode that has none."""
        idle = "--calibration" if calibration is not None else self._calibration_option()
        if idle is not None:
            raise GuardError(f"mode align calibrates nothing, so {idle} has no effect; leave it out")

    def _require_nothing_to_calibrate(self, path: Path) -> None:
        """Directions that are used as they are leave no room for the options of an extraction or a calibration."""
        idle = "--estimator" if self.estimator != DEFAULT_ESTIMATOR else self._calibration_option()
        if idle is not None:
            raise GuardError(
                f"{path}: these directions are used as they are, so {idle} has no effect; leave it out, or give --anchors to "
                "extract and calibrate"
            )

    def _calibration_option(self) -> str | None:
        """An option of a calibration that was given, if one was."""
        options = {
            "--readout": self.readout is not None,
            "--budget": self.budget != DEFAULT_BUDGET,
            "--calibration-image": bool(self.images),
            "--calibration-seconds": self.seconds is not None,
        }
        return next((name for name, is_set in options.items() if is_set), None)

    def calibrated(
        self, anchors: Sources | None, calibration: Sources | None, given: Directions | None = None
    ) -> Calibration:
        """Calibrate the given directions, or those extracted from the anchors, on labelled prompts.

        The prompts are those given, or those that come with the anchors, or made of anchor pairs that nothing is
        extracted from (`Anchors.divided`).
        """
        if given is not None and calibration is not None:
            self.notes.append(f"calibrated on {short_names(calibration)}")
            return self._calibrate(given, read_prompts(calibration, "calibration"), full_names(calibration))
        raw, prompts, title, _ = self._prepared(anchors, calibration, given)
        return self._calibrate(raw, prompts, title)

    def chosen(self, anchors: Sources | None, calibration: Sources | None) -> Choice:
        """The mode that `--mode auto` chooses, with directions extracted from the anchors; prompts as for `calibrated`."""
        raw, prompts, title, source = self._prepared(anchors, calibration, None, MORE_ROWS, "judged")
        matched = calibration is None and "calibration" not in self.found
        further = self._further_prompts(raw, prompts, title) if matched else ()
        wish = Wish(self.spec, self.budget, self.readout, self.images, self.seconds, matched, further)
        return choose(
            self.running(), self.anatomy, raw, self._usable(raw, prompts, title), wish, source, self.report_progress
        )

    def _further_prompts(
        self, raw: Directions, prompts: Sequence[LabelledPrompt], title: str
    ) -> tuple[LabelledPrompt, ...]:
        """What the sample of a built-in part leaves out of it."""
        if not is_builtin(title):
            return ()
        taken = {fingerprint(prompt) for prompt in prompts}
        part = prompts_from_anchors(read_anchors(f"{BUILTIN}:calibration", None), self.running().sees)
        return tuple(prompt for prompt in self._usable(raw, part, title) if fingerprint(prompt) not in taken)

    def _prepared(
        self,
        anchors: Sources | None,
        calibration: Sources | None,
        given: Directions | None,
        rank: int | None = None,
        used: str = "calibrated",
    ) -> tuple[Directions, Sequence[LabelledPrompt], str, str]:
        """Directions, the prompts to calibrate them on, and where these are from: for errors, and for the record."""
        found = self.anchors(anchors)
        if calibration is None and found.folder is not None:
            calibration = next((p for name in CALIBRATION_FILES if (p := found.folder / name).is_file()), None)
            if calibration is not None:
                self.found["calibration"] = calibration.absolute()
        if given is None:
            self.notes.append(f"directions extracted from {found.title}")
        if calibration is not None:
            prompts, title = read_prompts(calibration, "calibration"), full_names(calibration)
        else:
            found, kept = found.divided(extracts=given is None)
            prompts, title = prompts_from_anchors(kept, self.running().sees), found.name
        source = found.title.replace(f"{BUILTIN}:extraction", f"{BUILTIN}:calibration")
        source = source if calibration is None else short_names(calibration)
        self.notes.append(f"{used} on {source}")
        return given if given is not None else self.extracted(found, rank), prompts, title, source

    def _calibrate(self, raw: Directions, prompts: Sequence[LabelledPrompt], title: str) -> Calibration:
        model, usable = self.running(), self._usable(raw, prompts, title)
        if model.sees:
            usable = beside_images(usable, self.images)
        return calibrate(
            model,
            self.anatomy,
            raw,
            usable,
            self.spec,
            self.budget,
            readout=self.readout,
            report_progress=self.report_progress,
            is_late=Deadline(self.seconds),
        )

    def _usable(self, raw: Directions, prompts: Sequence[LabelledPrompt], title: str) -> list[LabelledPrompt]:
        """The prompts that the model takes, none of which the directions were extracted from."""
        anchored = (raw.anchors or {}).get("fingerprints", ())
        require_held_out(title, prompts, anchored, "are anchors that the directions were extracted from", "calibrate")
        return [prompt for prompt in prompts if self.running().sees or prompt.setting == "text"]

    def _require_own(self, path: Path, found: Directions, accepts_foreign: bool) -> None:
        """Directions of this decoder: its width, its layers and, where the file says it, its digest."""
        require_fitting(found, self.anatomy)
        digest = sha256_file(self.package.decoder)
        if found.model_sha256 in (None, digest):
            return
        left_out = [self.package.root / name for name in self.package.left_out if name.endswith(".onnx")]
        for variant in (*self.package.others, *left_out):
            if sha256_file(variant) == found.model_sha256:
                self.notes.append(f"directions of {variant.name}, another graph of the same model")
                return
        if not accepts_foreign:
            raise DirectionMismatch(
                f"{path}: was extracted from another decoder file (its SHA-256 begins {found.model_sha256[:12]}, this "
                f"one's {digest[:12]}); extract them again, or give them with --directions and --force"
            )
        self.notes.append(f"directions of another decoder file ({found.model_sha256[:12]}), accepted by --force")

    def anchors(self, given: Sources | None) -> Anchors:
        """The anchors that were given, or those found beside the model, or the built-in ones."""
        return open_anchors(given if given is not None else self.find("anchors", ANCHOR_FILES) or BUILTIN)

    def extracted(self, anchors: Anchors, rank: int | None = None) -> Directions:
        """The SSD of every layer; without a rank, as many rows as a calibration may want to try."""
        with contextlib.ExitStack() as stack:
            kept = None
            if self.output is not None:
                kept = stack.enter_context(kept_beside(self.output, model_digest(self.package)))
            found = extract_all_layers(
                self.running(),
                self.anatomy,
                anchors.pairs,
                rank=rank or max(EXTRACTED_RANK, self.spec.rank or 0),
                report_count=lambda done, total: self.report_progress("extracting directions", done, total),
                estimator=self.estimator,
                kept=kept,
                executors=self.executors,
            )
        return replace(found, anchors=anchors.record())

    def unguarded(self, mode: str, runs: bool) -> Unguarded | None:
        """What the unguarded model answers to harmful prompts; `None` where it cannot be asked; `not_asked` says why.

        Prompts that come with the model are asked, else built-in anchors. The model is closed again.

        Args:
            mode: of the guard.
            runs: whether anything is to be run.
        """
        if not runs:
            self.not_asked = f"{NOT_ASKED}: nothing is run without the full proof"
            return None
        path = self.find("calibration", CALIBRATION_FILES) or self.find("anchors", ANCHOR_FILES)
        reason = why_not_asked(self.package, bool(self.package.roles.embeds))
        reason = reason or why_made(self.package.load_decoder().graph, self.package.embed_tokens is not None) or None
        if reason is None:
            try:
                found = self._ask_unguarded(path)
                if guard_mode(mode).toward_text and all(prompt.setting == "text" for prompt in found.sample.prompts):
                    self.not_asked = NOT_COUNTED.format(mode)
                return found
            except _NotAsked as error:
                reason = str(error)
            except GuardError as error:
                if path is not None:  # prompts that were put there to be asked
                    raise
                reason = str(error).split("; ")[0]
        self.not_asked = f"{NOT_ASKED}: {reason}"
        return None

    def _ask_unguarded(self, path: Path | None) -> Unguarded:
        model = self.running()
        self.model = None  # one decoder at a time: this one is closed when the answers are there
        if path is None:
            sample = builtin_sample(model)
            if not sample.prompts:
                raise _NotAsked("its tokenizer does not know the words of the built-in prompts")
        else:
            of_anchors = path.name in ANCHOR_FILES
            given = prompts_from_anchors(read_anchors(path), model.sees) if of_anchors else read_prompts(path)
            sample = sample_of(given, path.name, model.sees, ANSWER_TOKENS)
            if not sample.prompts:
                raise _NotAsked(f"{path.name} has no harmful prompt that the model takes")
        return ask_unguarded(model, sample, self.report_progress)

    def refusals(self, unguarded: Unguarded, guarded: Path, plan: GuardPlan, allow_no_effect: bool) -> Refusals:
        """What both models refuse, and on how many prompts the guard has an effect.

        Args:
            unguarded: the unguarded model's side.
            guarded: the folder of the guarded model.
            plan: of the guard.
            allow_no_effect: accept a guard that has none.

        Raises:
            GuardWeakens: the guarded model refuses fewer, in some setting.
            NoEffect: the guarded model behaves as the unguarded one on every prompt, and that is not allowed.
        """
        tolerance = max(TOLERANCE[site.site.dtype] for site in plan.sites)

        def opened() -> VisionLanguageModel:
            # with `--data reference` its files are links
            return last_token_model(open_package(guarded, trust_links=True), self.place)

        found = ask_guarded(unguarded, opened, plan, tolerance, self.report_progress)
        require_no_fewer(found)
        return require_effect(found, allow_no_effect)

    def separated(self, plan: GuardPlan, unguarded: Unguarded | None) -> GuardPlan:
        """The plan with the AUC of each guarded layer: as the extraction recorded it, else measured on what was asked."""
        if unguarded is None or {one.layer for one in plan.separation} == set(plan.layers):
            return plan
        return plan.with_separation(measure_separation(self.package, self.anatomy, plan, unguarded.sample, self.place))

    def find(self, what: str, names: Sequence[str]) -> Path | None:
        """A file that comes with the model (`find_file`); its path is kept in `found` under `what`."""
        path = find_file(self.source.home, names)
        if path is not None:
            self.found[what] = path
        return path

    def proof_inputs(self, view: ModelPackage, rows: int = 8) -> ProofInputs:
        """What to prove one decoder graph on: what was given, else real prompts if the model can read any (at most `rows`
        a batch), else seeded random inputs."""
        self.place.close()  # random inputs open the decoder for what it says of itself
        if self.given:
            return given_inputs(self.given, view.roles)
        if why := why_made(view.load_decoder().graph, view.embed_tokens is not None):
            return signature_inputs(view, self.anatomy.width, why)
        if self.package.companion("tokenizer.json") is None:
            return signature_inputs(view, self.anatomy.width, "the model has no tokenizer.json")
        needs_embeds = bool(self.package.roles.embeds)
        if needs_embeds and self.package.embed_tokens is None:
            return signature_inputs(view, self.anatomy.width, "the model has no embed_tokens graph")
        if view != self.package and bool(view.roles.embeds) != needs_embeds:
            return signature_inputs(view, self.anatomy.width, f"{view.decoder.name} takes other inputs than the tokens")
        model = self.running()
        return proof_inputs(model, self._proof_requests(model), rows)

    def _proof_requests(self, model: VisionLanguageModel) -> list[Request]:
        path = self.find("calibration", CALIBRATION_FILES) or self.find("anchors", ANCHOR_FILES)
        if path is None:
            plain = ["How to bake a loaf of bread?", "How to pick a lock?", "Hello.", "What is shown here?"]
            prompts = [LabelledPrompt(str(n), text, "harmless", "text") for n, text in enumerate(plain)]
            if model.sees:
                prompts += [replace(prompt, setting="blank") for prompt in prompts]
        elif path.name in CALIBRATION_FILES:
            prompts = _some_of_each(read_prompts(path))
        else:
            prompts = prompts_from_anchors(read_anchors(path)[:_PROOF_PROMPTS], model.sees)
        return [prompt.request(model) for prompt in prompts if model.sees or prompt.setting == "text"]


def _some_of_each(prompts: Sequence[LabelledPrompt]) -> list[LabelledPrompt]:
    kinds: dict[tuple[str, str], list[LabelledPrompt]] = {}
    for prompt in prompts:
        kinds.setdefault((prompt.setting, prompt.label), []).append(prompt)
    return [prompt for members in kinds.values() for prompt in members[:_PROOF_PROMPTS]]
