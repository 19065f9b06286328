"""The sizes that every model has."""

ROPE_SCALINGS = ("none", "ntk", "yarn")
