"""A model as exports ask it: its decoder computes logits of the last token alone (`graphs.last_logits`)."""

from __future__ import annotations

from ..graphs.last_logits import keep_last_logits
from ..graphs.package import ModelPackage
from ..runtime.decoder_place import DecoderPlace
from ..runtime.vlm import VisionLanguageModel


def last_token_model(package: ModelPackage, place: DecoderPlace | None = None) -> VisionLanguageModel:
    """The package's model; where its graph shows no head, the decoder is run as it is.

    Args:
        place: where the decoder is opened, as for `VisionLanguageModel`.
    """
    graph = package.load_decoder()
    return VisionLanguageModel(package, graph if keep_last_logits(graph) else None, place=place)
