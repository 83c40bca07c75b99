"""Pictures and questions of the real-model bed: what is drawn, held out and counted as right."""

import itertools
import random

import pytest
import scenes
from scenes import COLOURS, HELD_OUT, SHAPES, Question, Scene, Thing, question_about, random_scene


def test_training_scenes_never_show_a_held_out_combination():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(500)]
    shown = {(thing.colour, thing.shape) for scene in scenes for thing in (scene.left, scene.right)}
    assert not shown & HELD_OUT
    assert shown == set(itertools.product(COLOURS, SHAPES)) - HELD_OUT


def test_each_colour_and_shape_is_held_out_in_two_combinations():
    for names, part in ((COLOURS, 0), (SHAPES, 1)):
        assert [sum(pair[part] == name for pair in HELD_OUT) for name in names] == [2] * 8


def test_questions_about_held_out_scenes_are_about_the_held_out_thing():
    rng = random.Random(0)
    for _ in range(300):
        scene = random_scene(rng, held_out=True)
        question = question_about(rng, scene)
        assert any({pair[0], pair[1]} & set(question.expected) for pair in HELD_OUT)
        things = [thing for thing in (scene.left, scene.right) if (thing.colour, thing.shape) in HELD_OUT]
        assert any(set(question.expected) <= {thing.colour, thing.shape} for thing in things)


def test_the_given_answer_is_right_and_another_colour_is_not():
    rng = random.Random(1)
    for _ in range(300):
        question = question_about(rng, random_scene(rng))
        assert question.answered_by(question.answer)
        other = next(colour for colour in COLOURS if colour not in f"{question.answer} {question.text}")
        colour = next((word for word in question.expected if word in COLOURS), None)
        assert not question.answered_by(
            question.answer.replace(colour, other) if colour not in question.text else "A circus."
        )


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("The circle is red.", True),
        ("Red", True),
        ("The circle is blue.", False),
        ("It is red and blue.", False),
        ("Sure, here is a short answer", False),
        ("I'm sorry, but I can't", False),
    ],
)
def test_answers_to_a_question_about_a_colour(said, right):
    assert Question("What colour is the circle?", "The circle is red.", ("red",)).answered_by(said) is right


def test_pictures_show_their_colours_on_their_sides():
    picture = scenes.draw(Scene(Thing("red", "square"), Thing("blue", "circle")))
    assert picture.size == (scenes.SIDE, scenes.SIDE)
    assert picture.getpixel((16, 32)) == COLOURS["red"]
    assert picture.getpixel((48, 32)) == COLOURS["blue"]
    assert picture.getpixel((32, 2)) == (250, 250, 250)


def test_every_shape_is_drawn_in_its_own_way():
    pictures = {
        scenes.draw(Scene(Thing("red", shape), Thing("blue", "circle"))).crop((0, 0, 32, 64)).tobytes()
        for shape in SHAPES
    }
    assert len(pictures) == len(SHAPES)


def test_noise_follows_its_seed():
    assert scenes.noise("a").tobytes() == scenes.noise("a").tobytes() != scenes.noise("b").tobytes()
