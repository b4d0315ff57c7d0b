"""LoRA adapters: some requests of a batch take one, others none."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file


pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: `tests/serving/run`")

from serving.engines import Engine, expected_text, make_model, random_prompts


pytestmark = pytest.mark.serving

MODULES = ["in_proj", "hidden_proj", "gate_proj", "q_proj", "v_proj", "out_proj", "up_proj", "sum_gate"]
RANK, ALPHA = 8, 16


@pytest.mark.parametrize("kind", ["defaults", "converted"])
def test_an_adapter_beside_none(kind, tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model = make_model(kind)
    model.save_pretrained(tmp_path / "model")
    adapted, tensors = copy.deepcopy(model), {}
    for name, module in adapted.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in MODULES:
            down, up = 0.1 * torch.randn(RANK, module.in_features), 0.1 * torch.randn(module.out_features, RANK)
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            module.weight.data += ALPHA / RANK * up @ down
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": MODULES, "bias": "none"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    prompts = random_prompts([1, 2, 33, 65, 100, 200])
    # On a CPU vLLM 0.32 runs a request without an adapter through the last place for one, which is empty here.
    options = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    engine = Engine(tmp_path / "model", max_num_batched_tokens=64, **options)
    try:
        outputs = engine.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts * 2],
            SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False),
            lora_request=[LoRARequest("adapter", 1, str(tmp_path / "adapter"))] * 6 + [None] * 6,
            use_tqdm=False,
        )
    finally:
        engine.close()
    expected = [[expected_text(some, prompt, 12) for prompt in prompts] for some in (adapted, model)]
    assert sum(a != b for a, b in zip(*expected, strict=True)) >= 4
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected[0] + expected[1]
