"""Stands in for transformers' generation tests, which its source distribution lacks; ours are in `tests/generation`."""


class GenerationTesterMixin:
    """`ModelTesterMixin` asks that the tests of a generative model inherit this name."""
