"""The limit on tokens of a conversation and its answer."""

from __future__ import annotations

from ...graphs.errors import GuardError
from ...runtime.guarded import GuardedVLM
from .settings import ServeSettings


def context_limit(vlm: GuardedVLM, settings: ServeSettings) -> int:
    """Largest number of tokens of a prompt and its answer: the smaller of the model's and the operator's limit.

    Raises:
        GuardError: there is neither limit.
    """
    limits = [size for size in (vlm.package.longest_sequence, settings.max_context) if size is not None]
    if not limits:
        raise GuardError(
            f"{vlm.package.root}: no config gives the model's context length (max_position_embeddings of config.json, or "
            "context_length of genai_config.json); give --max-context"
        )
    return min(limits)
