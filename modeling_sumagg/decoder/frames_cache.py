"""The cache of a model whose blocks go over fewer tokens than its front end over frames."""

from transformers import Cache, DynamicCache, PreTrainedConfig

from .cache import adopt_cache
from .recurrence import RecurrentLayer


class FramesLayer(RecurrentLayer):
    """The cache layer of a front end, the first of its cache, which counts frames where the others count tokens."""

    is_croppable = False

    def activate_past_recording(self) -> None:
        raise ValueError(
            "There is no going back over audio: go on from a copy of the cache (`copy.deepcopy`) instead."
        )


def adopt_cache_of_frames(cache: Cache, config: PreTrainedConfig) -> Cache:
    """
    Make `cache` fit a model with a front end, in place, as [`adopt_cache`] does for one without.

    An empty cache that lacks the layer of the front end, as `DynamicCache(config=config)` does, is given one.

    Args:
        cache (`transformers.Cache`): the cache passed to the model.
        config (`PreTrainedConfig`): the model's config, with `layer_types` of its blocks.

    Returns:
        `transformers.Cache`: the cache of the blocks, whose layers are those of `cache` but for the first.

    Raises:
        `ValueError`: the model can go on from no cache, or not from this one.
    """
    if not config.is_causal:
        raise ValueError("A bidirectional model has no decode state: pass no `cache`.")
    if "full_attention" in config.layer_types:
        raise ValueError(
            "A model of frames with full attention has no decode state, which would grow with them: choose "
            "'sliding_attention' in `layer_types`, or pass no `cache`."
        )
    layers = cache.layers
    if cache.layer_class_to_replicate is not None and not layers:
        layers = DynamicCache(config=config).layers
    if len(layers) == config.num_hidden_layers and not any(layer.is_initialized for layer in layers):
        layers = [FramesLayer(), *layers]
    if not layers or not isinstance(layers[0], FramesLayer):
        raise ValueError(
            "`cache` is not of this model: it begins with a "
            f"{type(layers[0]).__name__ if layers else None} and not with the layer of a front end. Make it with "
            "`DynamicCache(config=model.config)`, and fill it with this model only."
        )
    blocks = Cache(layers=layers[1:])
    adopt_cache(blocks, config)
    cache.layers, cache.layer_class_to_replicate = [layers[0], *blocks.layers], None
    return blocks
