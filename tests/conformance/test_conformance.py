"""Every model class, held to the tests that transformers holds its own models to.

For each class of `CLASSES` a test case is made of transformers' mixins, as the test file of a native model does.
`NOT_APPLICABLE` is the one table of what is left out, with reasons.
"""

import functools
import multiprocessing
import sys
import unittest

import pytest
import torch
from source_distribution import import_path

import modeling_sumagg
from modeling_sumagg import SumAggConfig, SumAggMultimodalConfig, SumAggSpeechConfig, ToSTConfig, ToSTTextConfig


try:
    sys.path += import_path()
except OSError as error:
    pytest.skip(f"transformers' source distribution is not to be had: {error}", allow_module_level=True)

from transformers import PreTrainedModel
from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask
from transformers_tests.test_training_mixin import TrainingTesterMixin


TOST = ("ToSTModel", "ToSTForImageClassification", "ToSTBackbone")
SPEECH = ("SumAggSpeechModel", "SumAggForCTC", "SumAggForAudioClassification")
MULTIMODAL = "SumAggForMultimodalRegression"
# test name -> reason; or "ClassName.test name" for one class.
NOT_APPLICABLE: dict[str, str] = {
    "test_bc_cache_name_forward": "it wants a warning: here `past_key_values` is another name, on every version",
    **{
        f"ToSTTextModel.test_model_rope_{name}": "its layers do not attend, and it has rotary positions of two types"
        for name in (
            "scaling_from_config_0_linear",
            "scaling_from_config_1_dynamic",
            "scaling_from_config_2_yarn",
            "with_partial_rotation",
        )
    },
    **{f"{name}.test_attention_outputs": "a membership is [B, K, N]: there are no pairwise weights" for name in TOST},
    **{f"{name}.test_model_get_set_embeddings": "images have no embedding table" for name in TOST},
    **{f"{name}.test_model_get_set_embeddings": "frames have no embedding table" for name in SPEECH},
    **{
        f"{name}.test_can_load_ignoring_mismatched_shapes": "it takes `feature_std`, a list, for an initial scale"
        for name in SPEECH
    },
    f"{MULTIMODAL}.test_hidden_states_output": "there is no stack of blocks, and no hidden state of each",
    f"{MULTIMODAL}.test_retain_grad_hidden_states_attentions": "there is no stack of blocks, and no hidden state of each",
    f"{MULTIMODAL}.test_load_with_mismatched_shapes": "no `AutoModel` makes it: it has no base model",
    f"{MULTIMODAL}.test_can_load_ignoring_mismatched_shapes": "it takes `numeric_std`, a list, for an initial scale",
    "ToSTBackbone.test_retain_grad_hidden_states_attentions": "the first output is a tuple of feature maps",
}

# These run for the classes named among the fast tests, and for the others among the slow ones. A head changes neither what
# attention computes nor how weights are loaded, and a family not how the frame of both is saved and added up by processes.
FAST_FOR: dict[str, set[str]] = {
    name: {
        "SumAggForCausalLM",
        "SumAggForMaskedLM",
        "SumAggForCTC",
        "SumAggForMultimodalRegression",
        "ToSTForCausalLM",
        "ToSTForImageClassification",
    }
    for name in ("test_bc_torch_dtype", "test_eager_matches_sdpa_inference")
} | {
    name: {"SumAggForCausalLM"}
    for name in (
        "test_fsdp2_bf16_training",
        "test_fsdp2_save_load",
        "test_hsdp_grad_accumulation_vs_single_device",
        "test_tp_generation_quantized",
    )
}

multiprocessing.set_forkserver_preload(["transformers.testing_utils", "transformers.trainer_utils", "modeling_sumagg"])
# By default the distributed tests run for a few model types only.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


@pytest.fixture(autouse=True)
def processes_are_forked_off_one_that_has_imported_libraries(monkeypatch):
    """
    Each distributed test starts processes, and importing takes longer than the test. Other modules keep the real `spawn`:
    a process of the fork server has the environment in which the server started.
    """
    forked = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr(torch.multiprocessing, "spawn", forked)


class TextModelTester:
    """Small configs and inputs, under the names that the mixins read."""

    def __init__(self, model_class):
        self.model_class = model_class
        self.causal_lm_class = model_class if model_class.__name__.endswith("ForCausalLM") else None
        self.is_training = True
        self.batch_size, self.seq_length = 3, 7
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 99, 32, 2, 2
        # Two processes halve it: transformers 5.17 shards evenly.
        self.intermediate_size = 48
        self.options = {}

    def get_config(self):
        return self.model_class.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size),
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
        }
        return self.get_config(), inputs


class SumAggTester(TextModelTester):
    def __init__(self, model_class):
        super().__init__(model_class)
        self.options = {"is_causal": not model_class.__name__.endswith(("ForMaskedLM", "ForTokenClassification"))}


class ToSTTextTester(TextModelTester):
    def __init__(self, model_class):
        super().__init__(model_class)
        self.options = {"layer_types": ["token_statistics", "full_attention"], "mlp_gate": True}


class TextTests:
    # No file of ours has the copyright line by which the test would tell that it was written after 2022.
    test_can_init_all_missing_weights_before_2023 = True

    def test_config(self):
        sizes = {"hidden_size": 32, "num_attention_heads": 2}
        ConfigTester(self, config_class=self.model_tester.model_class.config_class, **sizes).run_common_tests()

    def test_attention_outputs(self):
        # It counts one map of pairwise weights a layer.
        self.model_tester.options["layer_types"] = ["full_attention"] * self.model_tester.num_hidden_layers
        super().test_attention_outputs()

    def test_retain_grad_hidden_states_attentions(self):
        # Memberships are read out beside the operator, so that no gradient flows through them.
        self.model_tester.options["layer_types"] = ["full_attention"] * self.model_tester.num_hidden_layers
        super().test_retain_grad_hidden_states_attentions()


class ToSTTester:
    def __init__(self, model_class):
        self.model_class = model_class
        self.is_training = True
        self.batch_size, self.image_size, self.num_channels, self.num_labels = 3, 32, 3, 4
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 2
        self.seq_length = (self.image_size // 8) ** 2

    def get_config(self):
        return ToSTConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_class_attention_layers=1,
            image_size=self.image_size,
            patch_size=8,
            num_labels=self.num_labels,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(shape)}


class ToSTTests:
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def test_retain_grad_hidden_states_attentions(self):
        # Memberships are read out beside the operator, so that no gradient flows through them.
        self.has_attentions = False
        super().test_retain_grad_hidden_states_attentions()

    def test_config(self):
        tester = ConfigTester(self, config_class=ToSTConfig, has_text_modality=False, hidden_size=32)
        tester.run_common_tests()


class SpeechTester(TextModelTester):
    """Frames, of which four make a token: as many tokens as the sequence is long."""

    def __init__(self, model_class):
        super().__init__(model_class)
        self.options = {
            "num_mel_bins": 6,
            "mask_feature_length": 2,
            "mlp_gate": True,
            "layer_types": ["summation", "sliding_attention"],
        }

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        frames = self.seq_length * config.subsampling_factor
        mask = random_attention_mask([self.batch_size, frames])
        mask[0] = 1
        features = floats_tensor([self.batch_size, frames, config.num_mel_bins])
        return config, {"input_features": features, "attention_mask": mask}


class SpeechTests(TextTests):
    test_resize_embeddings = False

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class.__name__.endswith("ForCTC"):
            # Its labels are blanks, and more than tokens that the rows have.
            inputs["labels"] = torch.tensor([[1, 2]] * self.model_tester.batch_size)
        return inputs


class MultimodalTester:
    """Text and numbers; the image branch is tested by its own tests."""

    def __init__(self, model_class):
        self.is_training = True
        self.batch_size, self.seq_length, self.vocab_size, self.hidden_size = 3, 7, 99, 32

    def get_config(self):
        return SumAggMultimodalConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_numeric_features=2,
            head_hidden_sizes=[16],
            max_position_embeddings=64,
        )

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size),
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
            "numeric_features": floats_tensor([self.batch_size, 2]),
        }
        return self.get_config(), inputs


class MultimodalTests:
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True

    def test_config(self):
        sizes = {"vocab_size": 99, "hidden_size": 32}
        tester = ConfigTester(self, config_class=SumAggMultimodalConfig, common_properties=["hidden_size"], **sizes)
        tester.run_common_tests()


CAUSAL_LM_MIXINS = (
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
)
FAMILIES = {
    SumAggConfig: (SumAggTester, TextTests),
    ToSTConfig: (ToSTTester, ToSTTests),
    ToSTTextConfig: (ToSTTextTester, TextTests),
    SumAggMultimodalConfig: (MultimodalTester, MultimodalTests),
    SumAggSpeechConfig: (SpeechTester, SpeechTests),
}


def slow_copy(test):
    """The same test, marked as slow; the mark would else be that of every class that inherits it."""

    @functools.wraps(test)
    def run(self):
        test(self)

    return pytest.mark.slow(run)


def conformance(model_class):
    """The test case of one model class."""
    tester_class, family_tests = FAMILIES[model_class.config_class]
    name = model_class.__name__
    mixins = [family_tests]
    if name.endswith("ForCausalLM"):
        mixins += CAUSAL_LM_MIXINS
    if name.endswith("Backbone"):
        mixins.append(BackboneTesterMixin)

    def set_up(self):
        self.model_tester = tester_class(model_class)

    attributes = {
        "__module__": __name__,
        "all_model_classes": (model_class,),
        "config_class": model_class.config_class,
        "model_tester": None,
        "setUp": set_up,
    }
    case = type(f"{name}Conformance", (*mixins, ModelTesterMixin, unittest.TestCase), attributes)
    for key, reason in NOT_APPLICABLE.items():
        class_name, _, test = key.rpartition(".")
        if class_name in ("", name) and hasattr(case, test):
            setattr(case, test, unittest.skip(reason)(getattr(case, test)))
    for prefix, classes in FAST_FOR.items():
        for test in dir(case) if name not in classes else ():
            # Where a test has parameters, its own name stands for nothing.
            if test.startswith(prefix) and callable(getattr(case, test)):
                setattr(case, test, slow_copy(getattr(case, test)))
    return case


for model_class in vars(modeling_sumagg).values():
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        case = conformance(model_class)
        globals()[case.__name__] = case
del case, model_class
