"""
A plugin for vLLM (extra `vllm`): continuous batching, paged memory, prefix caching, tensor parallelism and an
OpenAI-compatible server for the models over text. Where the package is installed, `vllm serve folder` knows them.

The models are our own, called module by module: the plugin puts vLLM's linear maps, attention and embedding tables into
them (`layers.py`), keeps their decode states in vLLM's memory (`states.py`), and hands them to vLLM (`models.py`).
Nothing here is imported before vLLM calls `register`, and nothing outside of here imports it.
"""

import logging
import warnings


TESTED_VLLM = "0.32"


def register() -> None:
    """Make the models known to vLLM, which calls this in each of its processes (`vllm.general_plugins`)."""
    import vllm
    from vllm import ModelRegistry

    from .states import register_backend

    if not f"{vllm.__version__}.".startswith(f"{TESTED_VLLM}."):
        warnings.warn(
            f"This is vLLM {vllm.__version__}; the models have been tested with {TESTED_VLLM}. Compare a generation with "
            f"that of transformers before you rely on it, or install `vllm=={TESTED_VLLM}.*`.",
            stacklevel=2,
        )
    register_backend()
    for architecture, served_class in served_models().items():
        ModelRegistry.register_model(architecture, f"{__name__}.models:{served_class}")
    logging.getLogger(__name__).debug("Registered the models of modeling_sumagg with vLLM.")


def served_models() -> dict[str, str]:
    """By the names of the language models, of the classifiers and the bare models beside them, what runs each in vLLM."""
    from ..models.families import FAMILIES

    classes = {
        "AutoModelForCausalLM": "CausalLM",
        "AutoModelForSequenceClassification": "SequenceClassification",
        "AutoModel": "Embedding",
    }
    return {
        family.models[auto_name].__name__: served_class
        for family in FAMILIES.values()
        if "AutoModelForCausalLM" in family.models
        for auto_name, served_class in classes.items()
        if auto_name in family.models
    }
