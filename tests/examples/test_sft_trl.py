import pytest
from running import run_alone
from transformers import AutoModelForCausalLM


@pytest.mark.slow
def test_trl_fine_tunes_our_language_models(language_model, tmp_path):
    # TRL needs Python 3.11.
    pytest.importorskip("trl")
    base = language_model("sumagg", "flattened").folder
    run = run_alone(
        "sft_trl.py", tmp_path, "--model", base, "--max_steps", 20, "--max_length", 64, "--learning_rate", 1e-2,
        "--eval_strategy", "no", "--disable_tqdm", True, "--use_cpu", True,
    )  # fmt: skip
    assert "eval_loss" in run.printed
    assert type(AutoModelForCausalLM.from_pretrained(run.folder)).__name__ == "SumAggForCausalLM"
