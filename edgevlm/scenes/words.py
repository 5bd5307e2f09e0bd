"""The closed vocabulary of the scenes: what can be seen, asked and answered."""

from __future__ import annotations

SIDE = 96
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
SIZES = ("small", "large")
REGIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
RELATIONS = ("left", "right", "above", "below")
# I, O, 0 and 1 are left out because the font draws them alike.
SIGN_CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
BOX_UNIT = 3

EXACT_TASKS = ("exists", "colour", "shape", "count", "where", "read", "relation")
# Scored by overlap and by facts, and reported apart.
GRADED_TASKS = ("box", "describe")
TASKS = (*EXACT_TASKS, *GRADED_TASKS)

# Every phrasing also reads well after "In the first picture, ".
PHRASINGS: dict[str, tuple[str, ...]] = {
    "exists": (
        "Is there {a}?",
        "Can you see {a}?",
        "Do you see {a}?",
        "Is {a} visible?",
    ),
    "colour": (
        "What colour is {a}?",
        "Which colour is {a}?",
        "What is the colour of {a}?",
        "Name the colour of {a}.",
    ),
    "shape": (
        "What shape is {a}?",
        "Which shape is {a}?",
        "What is the shape of {a}?",
        "Name the shape of {a}.",
    ),
    "count": (
        "How many {a} are there?",
        "How many {a} can you see?",
        "Count the {a}.",
        "What is the number of {a}?",
    ),
    "where": (
        "Where is {a}?",
        "In which part is {a}?",
        "What is the position of {a}?",
        "Locate {a}.",
    ),
    "box": (
        "What is the box of {a}?",
        "Give the box of {a}.",
        "Which box holds {a}?",
        "Draw a box around {a}.",
    ),
    "read": (
        "What does the sign say?",
        "Read the sign.",
        "What is written on the sign?",
        "Which text is on the sign?",
    ),
    "relation": (
        "Where is {a} relative to {b}?",
        "Is {a} left, right, above or below {b}?",
        "On which side of {b} is {a}?",
        "Seen from {b}, where is {a}?",
    ),
    "describe": (
        "Describe the scene.",
        "What is shown?",
        "Describe everything you see.",
        "List everything that is there.",
    ),
}
ORDINALS = ("first", "second")


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def place(region: str) -> str:
    """A region as a phrase: 'at the top left', 'in the centre'."""
    return f"in the {region}" if region == "centre" else f"at the {region}"
