"""Paired rows: row 2i of a batch is the text-only prompt, row 2i + 1 the same prompt with its image.

The guard reads the coordinates of the even row at its last token and copies them to the last token of the odd row, inside
the graph. So inputs and outputs stay as they are, and one call guards every pair of a batch. What is edited:

- only odd rows. An even row never changes, and the last row of an odd number of rows has no partner and does not change.
- only calls of more than one token: a prompt or a part of one. A decode step has one token and is not edited.
- only rows with a token in this call, whose partner has one too. Early parts of a prompt that is padded on the left may have
  no token in the text-only row.

A graph cannot see whether more parts of a prompt follow. Each part of two or more tokens is edited at its own last token,
toward the text-only row's last token of the same part; a last part of one token is not edited.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import onnx_ir as ir

from .errors import GuardError
from .node_builder import NodeBuilder
from .positions import LastToken
from .roles import input_roles

# Key of the graph's metadata: `rows` where it reads paired rows.
SUPERVISOR_KEY = "vlmguard.supervisor"


def require_pairs(graph: ir.Graph, mask: str) -> str:
    """Notes for the user on a guard that reads paired rows, for the plan.

    Args:
        graph: of the unguarded decoder.
        mask: name of its attention mask, or "".

    Raises:
        GuardError: the graph cannot run two prompts of different lengths in one call, or does not mark which call is a prompt.
    """
    roles = input_roles(graph)
    text = next((value for value in graph.inputs if value.name == roles.text), None)
    sizes = list(text.shape) if text is not None and text.shape is not None else []
    advice = "choose --supervisor input"
    if sizes[:1] == [1]:
        raise GuardError(
            f"the graph takes batches of 1, paired rows need 2; export it with an open batch size, or {advice}"
        )
    if sizes[1:2] == [1]:
        raise GuardError(
            f"the graph takes one token per call, so paired rows cannot distinguish a prompt from an answer; {advice}"
        )
    if not roles.states:
        raise GuardError(
            "the graph has no KV cache, so every call repeats the prompt and paired rows cannot distinguish it from an answer; "
            f"{advice}"
        )
    if not mask:
        raise GuardError(
            f"the graph has no attention mask, so the two prompts of a pair cannot have different lengths; {advice}"
        )
    return (
        "paired rows: in every batch row 0 must be the text-only prompt of row 1, row 2 that of row 3, and so on; prompts that "
        "are not pairs must not share a batch, and the last row of an odd number is not guarded"
    )


def reads_pairs(model: ir.Model) -> bool:
    """Whether a guarded graph reads paired rows."""
    return model.metadata_props.get(SUPERVISOR_KEY) == "rows"


class PairedRows:
    """Edited rows of a call, and the ends of their text-only prompts.

    Each property writes its nodes when it is first read.

    Args:
        builder: that of `last`.
        last: each row's last token.
    """

    def __init__(self, builder: NodeBuilder, last: LastToken) -> None:
        self._builder, self._last = builder, last

    @cached_property
    def text_ends(self) -> ir.Value:
        """`[batch, 1, 2]` int64: (row, position) of the text-only prompt's last token, for each row."""
        ends = self._op("text_pairs", "Gather", [self._last.pairs, self._text_rows], axis=0)
        return self._op("text_ends", "Unsqueeze", [ends, self._builder.integers(1)])

    @cached_property
    def edited(self) -> ir.Value:
        """`[batch, 1]` bool: odd rows in a prompt's call, where both rows of the pair have a token."""
        odd = self._op("odd", "Sub", [self._last.rows, self._text_rows])
        odd = self._op("odd_bool", "Cast", [odd], to=int(ir.DataType.BOOL))
        odd = self._op("odd_column", "Unsqueeze", [odd, self._builder.integers(1)])
        is_prompt = self._op("is_prompt", "Greater", [self._last.length, self.step_tokens])
        text_here = self._op("text_here", "Gather", [self._last.here, self._text_rows], axis=0)
        both_here = self._op("both_here", "And", [self._last.here, text_here])
        return self._op("edited_rows", "And", [self._op("odd_here", "And", [odd, both_here]), is_prompt])

    @cached_property
    def step_tokens(self) -> ir.Value:
        """int64 scalar initializer: a call of more tokens is a prompt's."""
        return self._builder.constant("step_tokens", np.array(1, dtype=np.int64))

    @cached_property
    def _text_rows(self) -> ir.Value:
        """`[batch]` int64: the even row of each row's pair."""
        two = self._builder.constant("two", np.array(2, dtype=np.int64))
        half = self._op("half", "Div", [self._last.rows, two])  # no Mod, which fewer runtimes have for integers
        return self._op("text_rows", "Mul", [half, two])

    @property
    def _op(self) -> Callable[..., ir.Value]:
        return self._builder.op
