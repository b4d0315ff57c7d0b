"""What differs between the versions of transformers that this package supports. No other module knows of any difference.

What transformers has is asked of transformers itself. Only the warning about a version that nobody has tested compares
version numbers.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import transformers
from torch.torch_version import TorchVersion
from transformers import Cache, modeling_outputs
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput, logging


logger = logging.get_logger(__name__)

NEWEST_TESTED_TRANSFORMERS = "5.24.0"

# The decode state is called `cache` from transformers 5.24 on, and `past_key_values` before.
CACHE_NAME = "past_key_values" if "past_key_values" in inspect.signature(create_causal_mask).parameters else "cache"


def accepts_cache(forward: Callable) -> Callable:
    """
    Decorate a `forward(self, ..., cache=None, ...)` to take the cache as `past_key_values` too.

    Raises:
        `ValueError`: (the decorated function) a cache under both names, or under a third one, where it would be lost.
    """

    @functools.wraps(forward)
    def forward_with_cache(self, *args, **kwargs):
        kwargs = with_cache_renamed(kwargs, "cache")
        refuse_unknown_caches(kwargs)
        return forward(self, *args, **kwargs)

    return forward_with_cache


def with_cache_renamed(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """
    The arguments with the cache, if there is one, as `name`, `"cache"` or `"past_key_values"`.

    Raises:
        `ValueError`: a cache under both names.
    """
    other = "past_key_values" if name == "cache" else "cache"
    if other not in arguments:
        return arguments
    if arguments[other] is not None and arguments.get(name) is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: pass one of them.")
    cache = arguments[other] if arguments[other] is not None else arguments.get(name)
    return {**{key: value for key, value in arguments.items() if key != other}, name: cache}


def refuse_unknown_caches(arguments: dict[str, Any]) -> None:
    """
    Raise where a decode state came under a name that nothing here reads.

    Args:
        arguments (`dict[str, Any]`): the keyword arguments of a forward pass.

    Raises:
        `ValueError`: a `transformers.Cache` that is not called `cache`.
    """
    for name, value in arguments.items():
        if isinstance(value, Cache) and name != "cache":
            raise ValueError(
                f"A cache was passed as `{name}`, which this version of the model does not know: pass it as `cache`. If "
                f"transformers {transformers.__version__} passed it, install a version up to "
                f"{NEWEST_TESTED_TRANSFORMERS}, or a newer modeling-sumagg."
            )


def _own_name(name: Any) -> Any:
    """The key of an output, in which transformers calls the cache `CACHE_NAME`."""
    return CACHE_NAME if name == "cache" else name


class _CacheUnderBothNames(ModelOutput):
    """An output whose `cache` is its `past_key_values`; transformers 5.24 does the same."""

    if CACHE_NAME != "cache":
        cache = property(lambda self: getattr(self, CACHE_NAME))

        def __contains__(self, name):
            return super().__contains__(_own_name(name))

        def __getitem__(self, name):
            return super().__getitem__(_own_name(name))

        def __setitem__(self, name, value):
            super().__setitem__(_own_name(name), value)

        def __setattr__(self, name, value):
            super().__setattr__(_own_name(name), value)

        def get(self, name, default=None):
            return super().get(_own_name(name), default)


class BaseModelOutputWithPast(_CacheUnderBothNames, modeling_outputs.BaseModelOutputWithPast):
    """transformers' output, with the cache under both names."""


class CausalLMOutputWithPast(_CacheUnderBothNames, modeling_outputs.CausalLMOutputWithPast):
    """transformers' output, with the cache under both names."""


class SequenceClassifierOutputWithPast(_CacheUnderBothNames, modeling_outputs.SequenceClassifierOutputWithPast):
    """transformers' output, with the cache under both names."""


def named_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The cache as a keyword argument of transformers' own functions and output classes."""
    return {CACHE_NAME: cache}


def find_cache(values: dict[str, Any]) -> Cache | None:
    """The cache among arguments or outputs, whatever it is called."""
    return next((value for value in values.values() if isinstance(value, Cache)), None)


def warn_of_untested_transformers() -> None:
    """Warn, once, of a version of transformers that is newer than what the models have been tested with."""
    if TorchVersion(transformers.__version__) > NEWEST_TESTED_TRANSFORMERS:
        logger.warning_once(
            f"This is transformers {transformers.__version__}. These models have been tested with versions up to "
            f"{NEWEST_TESTED_TRANSFORMERS}: something may have been renamed since. Compare a generation with "
            "`use_cache=False` before you rely on it."
        )
