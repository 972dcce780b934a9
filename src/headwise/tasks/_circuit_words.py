"""Words of the documents of `circuit_mix` beyond those of the tasks' own prompts, so that a model has more to tell apart."""

MORE_NAMES = (
    "Ruth", "Oscar", "Clara", "Henry", "Lucy", "Arthur", "Julia", "Victor", "Nora", "Felix", "Rosa", "Hugo", "Irene", "Walter",
    "Diana", "Edgar", "Maria", "Louis", "Sophie", "Ralph", "Grace", "Otto", "Eva", "Carl", "Ellen", "Bruno", "Ida", "Philip",
    "Vera", "Max",
)  # fmt: skip
MORE_OBJECTS = (
    "hat", "box", "lamp", "chair", "coin", "glove", "scarf", "basket", "candle", "brush", "fork", "spoon", "pillow", "clock",
    "mirror", "towel", "shoe", "button",
)  # fmt: skip
MORE_WORDS = (
    "snow", "rain", "wind", "tree", "leaf", "grass", "sheep", "wolf", "fish", "salt", "sugar", "rice", "copper", "steel", "glass",
    "wood", "sea", "island", "village", "bridge", "doctor", "farmer", "pilot", "baker",
)  # fmt: skip
