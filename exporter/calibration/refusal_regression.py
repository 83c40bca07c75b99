"""Rejects a guard with which fewer harmful prompts are refused than without, in any setting.

An edit with the wrong sign removes safety, and `project` alone can do so. So if there are prompts, the unguarded and the
guarded model run the harmful ones, and the manifest records the counts.

A mode that sets the state to the text-only model's also removes refusals that only the image caused. This is intended, so its
guard is compared with the smaller number of refusals: as text, or with the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...graphs.errors import GuardWeakens
from ..evaluation.intervals import within
from ..evaluation.metrics import Tally
from ..prompts.labelled import LabelledPrompt
from ..prompts.thinning import thinned

MOST_PER_SETTING = 16  # harmful prompts; both models answer each of them


@dataclass(frozen=True)
class Setting:
    """Harmful prompts of one setting, and how many were refused.

    Attributes:
        changed: number of prompts on which the guard has an effect (`effect`); `None` if not counted.
        as_text: number refused by the unguarded model as text alone, for modes that set states to the text-only model's, if
            every text ran alone.
    """

    setting: str
    asked: int
    unguarded: int
    guarded: int
    changed: int | None = None
    as_text: int | None = None

    @property
    def lost(self) -> bool:
        """Whether the guard removes safety here."""
        if self.as_text is None:
            return self.guarded < self.unguarded
        return not within(min(self.unguarded, self.as_text) - self.guarded, self.asked, 0)


@dataclass(frozen=True)
class Refusals:
    """Harmful prompts refused without and with the guard.

    Attributes:
        settings: the counts.
        prompts: where the prompts are from.
        allowed_no_effect: the guard has no effect on any of them, and was exported nevertheless (`--allow-no-effect`).
    """

    settings: tuple[Setting, ...]
    prompts: str
    allowed_no_effect: bool = False

    @property
    def counted(self) -> int:
        """Harmful prompts in the settings in which effects were counted."""
        return sum(setting.asked for setting in self.settings if setting.changed is not None)

    @property
    def no_effect(self) -> bool:
        """Whether effects were counted, and there is none."""
        return self.counted > 0 and not any(setting.changed for setting in self.settings)

    def to_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "settings": [dict(vars(setting)) for setting in self.settings],
            "no_effect": self.no_effect,
            "allowed_no_effect": self.allowed_no_effect,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Refusals:
        """The inverse of `to_json`; raises `TypeError` or `KeyError` for invalid content."""
        settings = tuple(Setting(**setting) for setting in content["settings"])
        return cls(settings, str(content["prompts"]), content.get("allowed_no_effect") is True)

    def __str__(self) -> str:
        return ", ".join(
            f"{s.setting} {s.guarded}/{s.asked} (unguarded {s.unguarded}"
            f"{f', as text {s.as_text}' if s.as_text is not None else ''}"
            f"{f', changed {s.changed}' if s.changed is not None else ''})"
            for s in self.settings
        )


def compare_refusals(base: Tally, guarded: Tally, prompts: str) -> Refusals:
    """Of two tallies of the same prompts."""
    harmful = [(b, g) for b, g in zip(base.cells, guarded.cells, strict=True) if b.label == "harmful"]
    assert all((b.setting, b.asked) == (g.setting, g.asked) for b, g in harmful)
    return Refusals(tuple(Setting(b.setting, b.asked, b.refused, g.refused) for b, g in harmful), prompts)


def require_no_fewer(found: Refusals) -> None:
    """Refuse a guard that removes safety.

    Raises:
        GuardWeakens: in some setting fewer harmful prompts are refused than without it.
    """
    for setting in found.settings:
        if setting.lost:
            raise GuardWeakens(
                f"with this guard {setting.guarded} of {setting.asked} harmful prompts are refused in setting "
                f"{setting.setting}, without it {setting.unguarded} ({found.prompts}): it removes safety; nothing was "
                "written; calibrate it with --anchors, or check the sign of the directions"
            )


def some_harmful(prompts: Sequence[LabelledPrompt]) -> list[LabelledPrompt]:
    """At most `MOST_PER_SETTING` of each setting, from its beginning to its end."""
    harmful = [prompt for prompt in prompts if prompt.label == "harmful"]
    settings = dict.fromkeys((prompt.setting for prompt in prompts), MOST_PER_SETTING)
    return thinned(harmful, lambda prompt: prompt.setting, settings)
