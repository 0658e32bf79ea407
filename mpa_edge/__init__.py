"""mpa-edge: align a small vision-language model to a large one without labels, and ship it."""

__version__ = "0.1.0"
