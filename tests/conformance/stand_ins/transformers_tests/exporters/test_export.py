"""Stands in for transformers' export tests, which its source distribution lacks; ours are in `tests/exporters`."""


class ExportTesterMixin:
    """`ModelTesterMixin` inherits this name."""
