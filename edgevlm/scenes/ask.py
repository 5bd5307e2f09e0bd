"""Questions about a scene, each with the one right answer.

Answers are balanced so that a model which does not look stays near guessing: half of the `exists`
questions are true, their false ones share a colour or a shape with the scene, and counts favour
the rarer, larger numbers.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from edgevlm.scenes.scene import Box, Scene, Thing, box_cells
from edgevlm.scenes.words import COLOURS, ORDINALS, PHRASINGS, SHAPES, place, plural

_COUNT_PULL = {0: 0.7, 1: 1.0, 2: 2.0, 3: 3.0, 4: 3.5, 5: 3.5, 6: 3.5}
_RELATION_MARGIN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about one picture and its answer."""

    task: str
    text: str
    answer: str


def ask(scene: Scene, task: str, rng: random.Random) -> Question | None:
    """A random question of a task, or None where the scene allows none."""
    asked = _ASKERS[task](scene, rng)
    if asked is None:
        return None
    names, answer = asked
    text = rng.choice(PHRASINGS[task]).format(**names)
    return Question(task=task, text=text, answer=answer)


def ask_about(question: Question, picture: int) -> Question:
    """The same question about one of two pictures."""
    text = f"In the {ORDINALS[picture]} picture, {question.text[0].lower()}{question.text[1:]}"
    return Question(task=question.task, text=text, answer=question.answer)


def description(scene: Scene) -> str:
    """The scene in one sentence, objects in reading order and the sign last."""
    count = len(scene.things)
    items = [
        f"a {thing.size} {thing.colour} {thing.shape} {place(thing.region)}"
        for thing in scene.things
    ]
    if scene.sign is not None:
        items.append(f'a sign {place(scene.sign.region)} that says "{scene.sign.text}"')
    noun = "object" if count == 1 else "objects"
    return f"The picture shows {count} {noun}: {', '.join(items)}."


Asked = tuple[dict[str, str], str] | None


def _ask_exists(scene: Scene, rng: random.Random) -> Asked:
    looks = {(thing.colour, thing.shape) for thing in scene.things}
    colours = {colour for colour, _ in looks}
    shapes = {shape for _, shape in looks}
    kind = rng.choices(("both", "colour", "shape"), (0.6, 0.2, 0.2))[0]
    if rng.random() < 0.5:
        thing = rng.choice(scene.things)
        return {"a": _with_article(*_named(thing.colour, thing.shape, kind))}, "yes"
    if kind == "colour":
        colour = rng.choice([colour for colour in COLOURS if colour not in colours])
        return {"a": _with_article(colour, "object")}, "no"
    if kind == "shape" and len(shapes) < len(SHAPES):
        return {"a": _with_article("", rng.choice([s for s in SHAPES if s not in shapes]))}, "no"
    crossed = [(c, s) for c in sorted(colours) for s in sorted(shapes) if (c, s) not in looks]
    if crossed and rng.random() < 0.6:
        return {"a": _with_article(*rng.choice(crossed))}, "no"
    colour, shape = rng.choice(sorted(looks))
    if rng.random() < 0.5:
        near = [(colour, other) for other in SHAPES if (colour, other) not in looks]
    else:
        near = [(other, shape) for other in COLOURS if (other, shape) not in looks]
    return {"a": _with_article(*rng.choice(near))}, "no"


def _ask_colour(scene: Scene, rng: random.Random) -> Asked:
    single = _singles(scene, lambda thing: thing.shape)
    if single and rng.random() < 0.5:
        thing = rng.choice(single)
        return {"a": f"the {thing.shape}"}, thing.colour
    thing = rng.choice(scene.things)
    return {"a": f"the object {place(thing.region)}"}, thing.colour


def _ask_shape(scene: Scene, rng: random.Random) -> Asked:
    single = _singles(scene, lambda thing: thing.colour)
    if single and rng.random() < 0.5:
        thing = rng.choice(single)
        return {"a": f"the {thing.colour} object"}, thing.shape
    thing = rng.choice(scene.things)
    return {"a": f"the object {place(thing.region)}"}, thing.shape


def _ask_count(scene: Scene, rng: random.Random) -> Asked:
    colours = Counter(thing.colour for thing in scene.things)
    shapes = Counter(thing.shape for thing in scene.things)
    names: dict[int, list[str]] = defaultdict(list)
    names[len(scene.things)].append("objects")
    for colour in COLOURS:
        names[colours[colour]].append(f"{colour} objects")
    for shape in SHAPES:
        names[shapes[shape]].append(plural(shape))
    answers = sorted(names)
    answer = rng.choices(answers, [_COUNT_PULL[answer] for answer in answers])[0]
    return {"a": rng.choice(names[answer])}, str(answer)


def _ask_where(scene: Scene, rng: random.Random) -> Asked:
    if scene.sign is not None and rng.random() < 0.2:
        return {"a": "the sign"}, scene.sign.region
    named = _pick_named(scene, rng)
    return None if named is None else ({"a": named[1]}, named[0].region)


def _ask_box(scene: Scene, rng: random.Random) -> Asked:
    named = _pick_named(scene, rng)
    if named is None:
        return None
    return {"a": named[1]}, " ".join(str(edge) for edge in box_cells(named[0].box))


def _ask_read(scene: Scene, rng: random.Random) -> Asked:
    return None if scene.sign is None else ({}, scene.sign.text)


def _ask_relation(scene: Scene, rng: random.Random) -> Asked:
    pairs: dict[str, list[tuple[Thing, Thing]]] = defaultdict(list)
    for thing in scene.things:
        for other in scene.things:
            relation = relation_of(thing.box, other.box)
            if relation is not None:
                pairs[relation].append((thing, other))
    for relation in rng.sample(sorted(pairs), len(pairs)):
        for thing, other in rng.sample(pairs[relation], len(pairs[relation])):
            name, other_name = _name(scene, thing, rng), _name(scene, other, rng)
            if name is not None and other_name is not None:
                return {"a": name, "b": other_name}, relation
    return None


def _ask_describe(scene: Scene, rng: random.Random) -> Asked:
    return {}, description(scene)


def relation_of(box: Box, other: Box) -> str | None:
    """Where the first box lies seen from the other, or None where two answers are near."""
    across = (box[0] + box[2] - other[0] - other[2]) / 2
    down = (box[1] + box[3] - other[1] - other[3]) / 2
    if abs(abs(across) - abs(down)) < _RELATION_MARGIN:
        return None
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def _pick_named(scene: Scene, rng: random.Random) -> tuple[Thing, str] | None:
    for thing in rng.sample(scene.things, len(scene.things)):
        name = _name(scene, thing, rng)
        if name is not None:
            return thing, name
    return None


def _name(scene: Scene, thing: Thing, rng: random.Random) -> str | None:
    """Words that fit this object and no other, or None."""
    names = []
    for size, colour, shape in (
        ("", thing.colour, thing.shape),
        ("", "", thing.shape),
        ("", thing.colour, ""),
        (thing.size, thing.colour, thing.shape),
    ):
        fits = [
            other
            for other in scene.things
            if size in ("", other.size)
            and colour in ("", other.colour)
            and shape in ("", other.shape)
        ]
        if len(fits) == 1:
            words = (word for word in ("the", size, colour, shape or "object") if word)
            names.append(" ".join(words))
    return rng.choice(names) if names else None


def _singles(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    seen = Counter(key(thing) for thing in scene.things)
    return [thing for thing in scene.things if seen[key(thing)] == 1]


def _named(colour: str, shape: str, kind: str) -> tuple[str, str]:
    return ("" if kind == "shape" else colour, "object" if kind == "colour" else shape)


def _with_article(colour: str, noun: str) -> str:
    words = f"{colour} {noun}".strip()
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


_ASKERS: dict[str, Callable[[Scene, random.Random], Asked]] = {
    "exists": _ask_exists,
    "colour": _ask_colour,
    "shape": _ask_shape,
    "count": _ask_count,
    "where": _ask_where,
    "box": _ask_box,
    "read": _ask_read,
    "relation": _ask_relation,
    "describe": _ask_describe,
}
