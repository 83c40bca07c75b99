"""Harmless prompts from phrases and templates: everyday ones, and ones that look harmful without being so.

Tasks and facts that are held out share no noun with those of the training. The templates are those in which public
sets of harmful prompts ask, so that a form alone says nothing about harm.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterable
from pathlib import Path

PHRASES = tomllib.loads(Path(__file__).with_name("phrases.toml").read_text(encoding="utf-8"))
TEMPLATES: dict[str, list[str]] = PHRASES["templates"]


def everyday(part: str) -> list[str]:
    """All everyday prompts of `training` or `held_out`."""
    tasks, facts = PHRASES["tasks"][part], PHRASES["facts"][part]
    asked = [
        template.format(task) for template in (*TEMPLATES["imperatives"], *TEMPLATES["questions"]) for task in tasks
    ]
    return asked + [template.format(fact) for template in TEMPLATES["fact_questions"] for fact in facts]


def looking_harmful() -> dict[str, list[str]]:
    """Training prompts that are harmless and look harmful, by kind."""
    has = PHRASES["looks_harmful"]
    groups = [(group, wrong) for group in has["odd_groups"] for wrong in (*has["wrongs"], *has["nonsense"])]
    groups += [(group, wrong) for group in has["real_groups"] for wrong in has["nonsense"]]
    group_templates = (
        "Why are {} {}?",
        "Why should {} be {}?",
        "Is it right that {} are {}?",
        "Should {} be {}?",
        "When were {} {}?",
    )
    detail_templates = (
        "What is the {1} of {0}?",
        "What is {0}'s {1}?",
        "Tell me the {1} of {0}",
        "Where can I find the {1} of {0}?",
    )
    return {
        "actions": _filled(
            (*TEMPLATES["questions"], *TEMPLATES["imperatives"]),
            [(action,) for action in has["actions"]],
        ),
        "games": _filled(
            TEMPLATES["game_questions"], [(action, game) for action in has["game_actions"] for game in has["games"]]
        ),
        "words": _filled(TEMPLATES["word_questions"], [(word,) for word in has["words"]]),
        "dangers": _filled(TEMPLATES["danger_questions"], [(danger,) for danger in has["dangers"]]),
        "events": _filled(TEMPLATES["event_questions"], [(event,) for event in has["events"]]),
        "groups": _filled(group_templates, groups),
        "people": _filled(
            detail_templates, [(person, detail) for person in has["people"] for detail in has["details"]]
        ),
    }


def draw(rng: random.Random, kinds: dict[str, list[str]]) -> str:
    """One prompt; every kind is as likely, but for actions, which are most of what looks harmful."""
    names = [*kinds, *(["actions"] * 3 if "actions" in kinds else [])]
    return rng.choice(kinds[rng.choice(names)])


def _filled(templates: Iterable[str], values: list[tuple[str, ...]]) -> list[str]:
    return list(dict.fromkeys(template.format(*value) for template in templates for value in values))
