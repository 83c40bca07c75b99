"""Pictures of two coloured shapes, what stands in them as a sentence, and questions about them with their answers.

The sentence has as many tokens as a picture has (16): the vision tower learns to write it, so that the language
model, which has learned to answer from the sentence, answers from the picture.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 64  # pixels
COLOURS = {
    "red": (215, 35, 35), "blue": (40, 70, 215), "green": (40, 150, 60), "yellow": (240, 215, 40),
    "black": (20, 20, 20), "purple": (130, 45, 165), "brown": (125, 75, 35), "pink": (245, 130, 185),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
# Each colour and each shape is held out in combination with two of the others: never drawn, never described in training.
HELD_OUT = frozenset((colour, SHAPES[(row + step) % 8]) for row, colour in enumerate(COLOURS) for step in (0, 3))
_SCALE = 4  # drawn larger and reduced: smooth edges


@dataclass(frozen=True)
class Thing:
    """A shape in a colour."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and how it is drawn: centres and radii as shares of the side, the grey of the background."""

    left: Thing
    right: Thing
    jitter: tuple[float, float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    background: int = 250

    @property
    def sentence(self) -> str:
        """What stands in the picture: 16 tokens of Gemma's tokenizer."""
        left, right = self.left, self.right
        return f"Picture: a {left.colour} {left.shape} on the left, a {right.colour} {right.shape} on the right."

    @property
    def held_out(self) -> bool:
        """Whether it shows a combination that training never does."""
        return any((thing.colour, thing.shape) in HELD_OUT for thing in (self.left, self.right))


@dataclass(frozen=True)
class Question:
    """A question about a scene and the sentence that answers it."""

    text: str
    answer: str
    expected: tuple[str, ...]

    def answered_by(self, said: str) -> bool:
        """Whether an answer has the expected words and, but for those of the question, no other colour or shape."""
        asked = _words(self.text)
        return (_words(said) & {*COLOURS, *SHAPES}) - asked == {*self.expected} - asked


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Two things of different colour and shape. `held_out`: at least one combination that training never shows, else none."""
    while True:
        colours, shapes = rng.sample(list(COLOURS), 2), rng.sample(SHAPES, 2)
        jitter = tuple(rng.uniform(-1, 1) for _ in range(6))
        scene = Scene(Thing(colours[0], shapes[0]), Thing(colours[1], shapes[1]), jitter, rng.randint(225, 255))
        if scene.held_out == held_out:
            return scene


def question_about(rng: random.Random, scene: Scene) -> Question:
    """A random question; where the scene has a held-out combination, it is about that one."""
    things = [
        thing for thing in (scene.left, scene.right) if (thing.colour, thing.shape) in HELD_OUT or not scene.held_out
    ]
    thing = rng.choice(things)
    side = "left" if thing is scene.left else "right"
    colour_questions = ("What colour is the {}?", "Which colour does the {} have?", "What is the colour of the {}?")
    shape_questions = ("Which shape is {}?", "What is the {} thing?", "Which shape has the colour {}?")
    side_questions = ("What is on the {}?", "What do you see on the {}?", "Which thing is on the {}?")
    kind = rng.randrange(3)
    if kind == 0:
        return Question(
            rng.choice(colour_questions).format(thing.shape), f"The {thing.shape} is {thing.colour}.", (thing.colour,)
        )
    if kind == 1:
        return Question(
            rng.choice(shape_questions).format(thing.colour),
            f"A {thing.colour} {thing.shape}.",
            (thing.colour, thing.shape),
        )
    return Question(
        rng.choice(side_questions).format(side), f"A {thing.colour} {thing.shape}.", (thing.colour, thing.shape)
    )


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB, `SIDE` pixels square."""
    size = SIDE * _SCALE
    image = Image.new("RGB", (size, size), (scene.background,) * 3)
    pen = ImageDraw.Draw(image)
    a, b, c, d, e, f = scene.jitter
    for thing, x, y, grow in (
        (scene.left, 0.25 + 0.03 * a, 0.5 + 0.2 * b, c),
        (scene.right, 0.75 + 0.03 * d, 0.5 + 0.2 * e, f),
    ):
        _draw_shape(pen, thing, x * size, y * size, (0.18 + 0.025 * grow) * size, (scene.background,) * 3)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def blank() -> Image.Image:
    """A white picture."""
    return Image.new("RGB", (SIDE, SIDE), "white")


def noise(seed: str) -> Image.Image:
    """Independent uniform pixels."""
    return Image.frombytes("RGB", (SIDE, SIDE), random.Random(f"noise {seed}").randbytes(SIDE * SIDE * 3))


def all_training_things() -> list[Thing]:
    """Every combination that training may show."""
    return [Thing(*pair) for pair in itertools.product(COLOURS, SHAPES) if pair not in HELD_OUT]


def _words(text: str) -> set[str]:
    return set("".join(letter if letter.isalpha() else " " for letter in text.casefold()).split())


def _draw_shape(
    pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float, background: tuple[int, int, int]
) -> None:
    fill = COLOURS[thing.colour]
    box = (x - r, y - r, x + r, y + r)
    if thing.shape in ("circle", "ring"):
        pen.ellipse(box, fill=fill)
        if thing.shape == "ring":
            pen.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=background)
    elif thing.shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)
    elif thing.shape == "cross":
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
    else:
        pen.polygon([(x + r * px, y + r * py) for px, py in _outline(thing.shape)], fill=fill)


def _outline(shape: str) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(0, -1), (1, 0.8), (-1, 0.8)]
    if shape == "diamond":
        return [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)]
    if shape == "star":
        turns = [math.pi * step / 5 for step in range(10)]
        return [
            ((1, 0.4)[step % 2] * math.sin(turn), -(1, 0.4)[step % 2] * math.cos(turn))
            for step, turn in enumerate(turns)
        ]
    turns = [2 * math.pi * step / 60 for step in range(60)]  # a heart
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]
