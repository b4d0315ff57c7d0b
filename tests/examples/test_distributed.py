"""Two processes of this machine train as one does, and a killed run goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedConfig

from modeling_sumagg import SumAggConfig, ToSTTextConfig


EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = "def add(first, second):\n    return first + second\n\n\nclass Sum:\n    def __init__(self, terms):\n        pass\n"


def command(launcher: list[str], tmp_path: Path, output_dir: Path, *arguments: object) -> list[str]:
    (tmp_path / "text.txt").write_text("".join(f"{TEXT}# {number}\n" for number in range(200)))
    options = {"train_file": "text.txt", "validation_file": "text.txt", "vocab_size": 300, "block_size": 16}
    options |= {"max_steps": 20, "logging_steps": 1, "learning_rate": 5e-3, "use_cpu": True, "disable_tqdm": True}
    options |= {"eval_strategy": "no", "output_dir": output_dir}
    flags = [item for name, value in options.items() for item in (f"--{name}", value)]
    return [str(item) for item in (sys.executable, *launcher, EXAMPLES / "run_clm.py", *flags, *arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sumagg", "tost_text"])
def test_two_processes_and_accumulated_gradients_have_the_losses_of_one_process(tmp_path, family):
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    overrides = ["--config_overrides", json.dumps({"model_type": family, **TINY})]
    curves, models = {}, {}
    for name, launcher, flags in (
        ("one", [], ["--per_device_train_batch_size", 4]),
        ("ddp", two, ["--per_device_train_batch_size", 2, "--ddp_backend", "gloo"]),
        ("accumulated", [], ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]),
    ):
        line = command(launcher, tmp_path, tmp_path / name, *overrides, *flags)
        process = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900)
        assert process.returncode == 0, process.stderr[-4000:]
        curves[name] = losses(tmp_path / name)
        models[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert len(curves["one"]) == 20 and curves["one"][-1] < curves["one"][0] - 0.5
    expected = models.pop("one").state_dict()
    for name, model in models.items():
        assert curves[name] == pytest.approx(curves["one"], abs=1e-4), name
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-3, msg=f"{name}: {key}")


@pytest.mark.slow
def test_a_killed_run_resumes_on_the_same_loss_curve(tmp_path):
    overrides = ["--config_overrides", json.dumps({"model_type": "sumagg", "hidden_dropout": 0.1, **TINY})]
    flags = [*overrides, "--save_strategy", "steps", "--save_steps", 4]
    whole = command([], tmp_path, tmp_path / "whole", *flags)
    subprocess.run(whole, cwd=tmp_path, env=environment(), check=True, capture_output=True, timeout=900)

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command([], tmp_path, killed, *flags), cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    )
    # The state of the trainer is written last.
    while not (killed / "checkpoint-8" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "trainer_state.json").exists()

    resumed = command([], tmp_path, killed, *flags, "--resume_from_checkpoint", "last")
    subprocess.run(resumed, cwd=tmp_path, env=environment(), check=True, capture_output=True, timeout=900)
    assert losses(killed) == losses(tmp_path / "whole")
    assert (killed / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def train_20_steps(config: PreTrainedConfig, rank: int, num_processes: int) -> list[float]:
    """Losses of 20 steps on the same four sequences a step, shared among the processes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if num_processes > 1:
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sequences = torch.randint(config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(1))
    batch = sequences.chunk(num_processes)[rank]
    losses = []
    for _ in range(20):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if num_processes > 1:
            dist.all_reduce(mean, op=dist.ReduceOp.SUM)
        losses.append(mean.item() / num_processes)
    return losses


def train_sharded(rank: int, rendezvous: str, config: PreTrainedConfig, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    losses = train_20_steps(config, rank, 2)
    if rank == 0:
        Path(output).write_text(json.dumps(losses))
    dist.destroy_process_group()


# accelerate turns FSDP on only with an accelerator: here is what it does there, `fully_shard` of the blocks.
@pytest.mark.slow
@pytest.mark.parametrize("config_class", [SumAggConfig, ToSTTextConfig])
def test_two_processes_that_share_the_weights_have_the_losses_of_one(tmp_path, config_class):
    config = config_class(vocab_size=20, max_position_embeddings=16, **TINY)
    arguments = (str(tmp_path / "rendezvous"), config, str(tmp_path / "losses.json"))
    torch.multiprocessing.spawn(train_sharded, arguments, nprocs=2)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses == pytest.approx(train_20_steps(config, 0, 1), abs=1e-4)
    assert losses[-1] < losses[0] - 0.1
