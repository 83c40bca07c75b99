"""Which prompts train the model and which are held out; public sets are read from a folder of the user's.

Held out are HarmBench's test part, JailbreakBench, XSTest, the package's own anchors, and everyday tasks that share
no noun with training. A training prompt that is one of them, or has most of its words in common with one, is dropped.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harmless import everyday, looking_harmful

from vlmguard.exporter.prompts.files import read_rows
from vlmguard.exporter.prompts.labelled import BUILTIN, LabelledPrompt, fingerprint, normalised, read_set

TRAINING_FILES = (
    "advbench/harmful_behaviors.csv",
    "malicious_instruct/MaliciousInstruct.txt",
    "figstep_safebench/safebench.csv",
)
HARMBENCH = "harmbench/harmbench_behaviors_text_{}.csv"
JAILBREAKBENCH = "jailbreakbench_harmful/harmful-behaviors.csv"
XSTEST = "xstest/xstest_prompts.csv"
NOT_HARM = (
    "Legal Opinion",
    "Financial Advice",
    "Health Consultation",
)  # FigStep's topics that call for care, not for refusal
COMMON = 0.03  # share of held-out prompts from which a word says nothing about what is asked
MOST_WORDS = 0.6  # Jaccard similarity of two prompts' words from which one gives the other away
HARMFUL_HELD_OUT = ("harmbench", "jailbreakbench")


@dataclass(frozen=True)
class Sets:
    """Prompts by role.

    Attributes:
        harmful: training prompts to refuse.
        harmless, looking_harmful: training prompts to answer; the second by kind.
        held_out: name to prompts, none of which training sees.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    looking_harmful: Mapping[str, tuple[str, ...]]
    held_out: Mapping[str, tuple[str, ...]]

    def training(self) -> list[str]:
        """Every prompt that training, attacks and calibration of the bed may use."""
        return [*self.harmful, *self.harmless, *(prompt for kind in self.looking_harmful.values() for prompt in kind)]

    def fingerprints(self) -> dict[str, set[str]]:
        """Fingerprints of the training prompts and of each held-out set."""
        named = {"training": self.training(), **self.held_out}
        return {name: {fingerprint_of(prompt) for prompt in prompts} for name, prompts in named.items()}


def read_sets(data: Path) -> Sets:
    """Read the public sets below `data` and divide everything.

    Raises:
        PromptsUnusable: a file is missing or is not what its name says.
    """
    xstest = read_set(f"xstest:{data / XSTEST}").prompts
    pairs = read_set(BUILTIN).prompts
    everyday_held_out = everyday("held_out")
    random.Random("held out").shuffle(everyday_held_out)
    held_out = {
        "harmbench": _harmbench(data, "test"),
        "jailbreakbench": _texts(read_set(f"jailbreakbench:{data / JAILBREAKBENCH}").prompts),
        "xstest_safe": _texts(prompt for prompt in xstest if prompt.label == "borderline"),
        "xstest_unsafe": _texts(prompt for prompt in xstest if prompt.label == "harmful"),
        "harmless": tuple(everyday_held_out[:240]),
        "anchors_harmful": _texts(prompt for prompt in pairs if prompt.label == "harmful"),
        "anchors_harmless": _texts(prompt for prompt in pairs if prompt.label == "harmless"),
    }
    harmful = [*_harmbench(data, "val")]
    for file in TRAINING_FILES:
        harmful += _texts(prompt for prompt in read_set(data / file).prompts if prompt.intent not in NOT_HARM)
    near = _Near(prompt for prompts in held_out.values() for prompt in prompts)
    return Sets(
        near.others(harmful),
        near.others(everyday("training")),
        {kind: near.others(prompts) for kind, prompts in looking_harmful().items()},
        held_out,
    )


def fingerprint_of(text: str) -> str:
    """As the package knows a prompt again, without a picture."""
    return fingerprint(LabelledPrompt("", text, "harmless", "text"))


def _texts(prompts: Iterable[LabelledPrompt]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(prompt.prompt for prompt in prompts))


def _harmbench(data: Path, part: str) -> tuple[str, ...]:
    """Standard behaviours: those with a context are pages long, and copyright is another question than harm."""
    rows = [row for _, row in read_rows(data / HARMBENCH.format(part), "prompts")]
    kept = [row for row in rows if not row.get("ContextString") and "copyright" not in str(row["FunctionalCategory"])]
    return tuple(dict.fromkeys(str(row["Behavior"]).strip() for row in kept))


class _Near:
    """Finds prompts that are held-out ones in nearly the same words."""

    def __init__(self, held_out: Iterable[str]) -> None:
        bags = {frozenset(normalised(prompt).split()) for prompt in held_out}
        uses = Counter(word for bag in bags for word in bag)
        self._by_word: dict[str, list[frozenset[str]]] = {}
        for bag in bags:
            # Words such as "how" and "write" would make everything a candidate, and no two prompts near.
            telling = [word for word in bag if uses[word] <= len(bags) * COMMON] or list(bag)
            for word in telling:
                self._by_word.setdefault(word, []).append(bag)

    def others(self, prompts: Iterable[str]) -> tuple[str, ...]:
        """The prompts, each once, that are near no held-out one."""
        return tuple(prompt for prompt in dict.fromkeys(prompts) if not self._near_one(prompt))

    def _near_one(self, prompt: str) -> bool:
        words = frozenset(normalised(prompt).split())
        candidates = {other for word in words for other in self._by_word.get(word, ())}
        return any(len(words & other) > MOST_WORDS * len(words | other) for other in candidates)
