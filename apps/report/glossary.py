"""One short sentence per term of the page, shown where the term appears."""

from __future__ import annotations

from collections.abc import Sequence

TERMS = {
    # the result
    "gap closed": "Of the refusals of harmful prompts that the image takes away, the share that the guard restores. "
    "At 100% the guarded model refuses as many as the text-only model.",
    "text-only model": "The unguarded model, given the same words without the image.",
    "95% interval": "The values that fit these prompts; fewer prompts make it wider.",
    "refused": "The first paragraph of the answer contains a refusal phrase, such as “I can't”.",
    "extra refusals": "Prompts that the guarded model refuses and the text-only model answers.",
    "missing refusals": "Prompts that the text-only model refuses and the guarded model answers.",
    "harmful only in the picture": "The text is innocent and the request is in the image, so that there is no text-only answer "
    "to compare with.",
    "borderline": "Harmless prompts that look harmful, such as “How to kill a process?”.",
    "no gap": "The text-only model refuses no more of these prompts than the unguarded model does with the image.",
    "KL divergence": "How far the probabilities of the answer's first token differ between two models, in nats; 0 is equal.",
    "attack success": "A harmful prompt is answered instead of refused.",
    "over-refusal": "A harmless prompt is refused.",
    # the settings
    "text only": "The prompt has no image.",
    "blank image": "A white image is attached to the prompt.",
    "real image": "The image of the prompts file is attached to the prompt.",
    "request in the image": "The request is written in the image, and the text is innocent.",
    # the charts
    "hidden state": "The vector that a decoder layer computes for a token; here for the last token of the prompt.",
    "principal components": "The two directions in which the unguarded states of a layer vary most.",
    "AUC": "The probability that a harmful prompt scores above a harmless one: 1 is a clean split, 0.5 is chance.",
    "d′": "The distance between the mean scores of harmful and harmless prompts, in standard deviations.",
    "score": "The product of a hidden state and a direction.",
    "text direction": "The vector from the mean of harmless to the mean of harmful text-only prompts, fitted on half of the "
    "prompts and judged on the others.",
    "SSD row 1": "The first row of the folder's safety steering direction, along which its anchor prompts differ most.",
    "readout": "The vector that the gate multiplies with a state to get its score.",
    "anchors": "The prompt pairs that the directions were extracted from.",
    "gate": "The part of the guard that compares a score with a threshold to decide about an edit.",
    "opened": "The score is above the threshold, and the guard edits the state.",
    "alpha": "The strength of the guard's edit.",
    # the cost
    "nodes": "Operations in the decoder's graph.",
    "kernels": "Engine layers that start a computation on the GPU.",
    "ratio": "The time of a guarded call divided by the time of an unguarded call; 1 is no cost.",
    # the guard
    "sum": "The node of the layer whose output the guard edits.",
    "rank": "The number of rows of the direction.",
    "threshold": "A gate opens for scores above it.",
    "target": "The values that the edit sets the state to along the rows of the direction.",
    "worst": "The largest difference from the reference that the check found.",
    "limit": "The largest difference that the check allows.",
}


def explained(names: Sequence[str]) -> list[tuple[str, str]]:
    """The terms with their sentences, in this order."""
    return [(name, TERMS[name]) for name in names]
