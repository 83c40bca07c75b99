"""`make_proof_inputs`: what one decoder graph is proved on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...graphs.package import ModelPackage
from ...runtime.generation import Request
from ..prompts.labelled import LabelledPrompt, prompts_from_anchors, read_anchors, read_prompts
from ..prompts.thinning import by_setting_and_label, spread
from ..session import CALIBRATION_FILES, Session
from .inputs import ProofInputs, given_inputs, proof_inputs, signature_inputs
from .signature import why_made

_OF_EACH_KIND = 4  # prompts of each label and setting
_PLAIN = ("How to bake a loaf of bread?", "How to pick a lock?", "Hello.", "What is shown here?")


def make_proof_inputs(session: Session, view: ModelPackage, given: Sequence[Path] = (), rows: int = 8) -> ProofInputs:
    """Inputs for one decoder graph of a session's model.

    Args:
        session: the opened model.
        view: the model seen from that graph.
        given: `.npz` files with the decoder's inputs by name, one per call.
        rows: largest batch of prompts.

    Returns:
        The given inputs; else prompts, where the model can read them; else seeded random inputs of the graph's signature.

    Raises:
        GuardError: the given files do not fit the graph.
        InputsUnknown: no inputs can be made for the graph.
    """
    session.place.close()  # random inputs open the decoder for its inputs' types and shapes
    package, width = session.package, session.anatomy.width
    if given:
        return given_inputs(tuple(given), view.roles)
    if why := why_made(view.load_decoder().graph, view.embed_tokens is not None):
        return signature_inputs(view, width, why)
    if package.companion("tokenizer.json") is None:
        return signature_inputs(view, width, "the model has no tokenizer.json")
    needs_embeds = bool(package.roles.embeds)
    if needs_embeds and package.embed_tokens is None:
        return signature_inputs(view, width, "the model has no embed_tokens graph")
    if view != package and bool(view.roles.embeds) != needs_embeds:
        return signature_inputs(view, width, f"{view.decoder.name} takes other inputs than the tokens")
    return proof_inputs(session.model(), _requests(session), rows)


def _requests(session: Session) -> list[Request]:
    """Prompts that come with the model, or plain ones."""
    path, model = session.find_prompts(), session.model()
    if path is None:
        prompts = [LabelledPrompt(str(number), text, "harmless", "text") for number, text in enumerate(_PLAIN)]
        if model.sees:
            prompts += [replace(prompt, setting="blank") for prompt in prompts]
    elif path.name in CALIBRATION_FILES:
        prompts = by_setting_and_label(read_prompts(path), _OF_EACH_KIND)
    else:
        prompts = prompts_from_anchors(spread(read_anchors(path), _OF_EACH_KIND), model.sees)
    return [prompt.request(model) for prompt in prompts if model.sees or prompt.setting == "text"]
