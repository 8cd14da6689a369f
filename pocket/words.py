"""The one table of the pocket base: which word shows which pictograph."""

from __future__ import annotations

ANIMALS: dict[str, str] = {
    "cat": "🐱",
    "dog": "🐶",
    "fox": "🦊",
    "bear": "🐻",
    "panda": "🐼",
    "frog": "🐸",
    "pig": "🐷",
    "lion": "🦁",
    "rabbit": "🐰",
    "monkey": "🐵",
    "chick": "🐥",
    "owl": "🦉",
    "penguin": "🐧",
    "fish": "🐠",
    "octopus": "🐙",
    "butterfly": "🦋",
    "turtle": "🐢",
    "ladybug": "🐞",
    "whale": "🐳",
}
THINGS: dict[str, str] = {
    "house": "🏠",
    "car": "🚗",
    "bus": "🚌",
    "rocket": "🚀",
    "sailboat": "⛵",
    "tree": "🌲",
    "cactus": "🌵",
    "sunflower": "🌻",
    "mushroom": "🍄",
    "sun": "🌞",
    "moon": "🌙",
    "star": "⭐",
    "umbrella": "☔",
    "key": "🔑",
    "bell": "🔔",
    "balloon": "🎈",
    "guitar": "🎸",
    "clock": "⏰",
    "crown": "👑",
    "heart": "❤",
    "snowman": "⛄",
    "gift": "🎁",
}
# Shapes and letters have one colour each: the word alone fixes what is drawn.
SHAPES: dict[str, tuple[int, int, int]] = {
    "circle": (220, 50, 60),
    "square": (50, 100, 210),
    "triangle": (40, 150, 80),
}
LETTERS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "letter-a": ("A", (190, 40, 90)),
    "letter-b": ("B", (40, 80, 170)),
    "letter-k": ("K", (60, 60, 70)),
}
FRUITS: dict[str, str] = {
    "apple": "🍎",
    "banana": "🍌",
    "strawberry": "🍓",
    "grapes": "🍇",
    "watermelon": "🍉",
    "cherries": "🍒",
}
SMILEYS: dict[str, str] = {
    "smile": "😀",
    "love": "😍",
    "cool": "😎",
    "cry": "😭",
    "angry": "😡",
    "sick": "🤢",
}

PICTOGRAPHS: dict[str, str] = {**ANIMALS, **THINGS, **FRUITS, **SMILEYS}
BASE_WORDS: tuple[str, ...] = (*ANIMALS, *THINGS, *SHAPES, *LETTERS)
# Only subjects that are lopsided and that look right in a mirror.
FLIPPABLE: frozenset[str] = frozenset({"fish", "turtle", "car", "chick", "guitar"})
STYLES: tuple[str, ...] = ("plain", "ink", "neon", "blueprint")
# A set is (words, style). The base model is shown only the first.
SETS: dict[str, tuple[tuple[str, ...], str]] = {
    "base": (BASE_WORDS, "plain"),
    "fruits": (tuple(FRUITS), "plain"),
    "smileys": (tuple(SMILEYS), "plain"),
    "ink": (BASE_WORDS, "ink"),
    "neon": (BASE_WORDS, "neon"),
    "blueprint": (BASE_WORDS, "blueprint"),
}
