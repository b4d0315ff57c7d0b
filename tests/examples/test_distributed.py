"""Two processes of this machine train as one does, and a killed run goes on where it was."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.launch import prepare_multi_gpu_env
from running import EXAMPLES, environment, losses
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM, PreTrainedConfig

from modeling_sumagg import SumAggConfig, ToSTTextConfig


ACCELERATE = EXAMPLES / "accelerate"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = "def add(first, second):\n    return first + second\n\n\nclass Sum:\n    def __init__(self, terms):\n        pass\n"


def command(launcher: list[object], tmp_path: Path, output_dir: Path, *arguments: object) -> list[str]:
    (tmp_path / "text.txt").write_text("".join(f"{TEXT}# {number}\n" for number in range(200)))
    options = {"train_file": "text.txt", "validation_file": "text.txt", "vocab_size": 300, "block_size": 16}
    options |= {"max_steps": 20, "logging_steps": 1, "learning_rate": 5e-3, "use_cpu": True, "disable_tqdm": True}
    options |= {"eval_strategy": "no", "output_dir": output_dir}
    flags = [item for name, value in options.items() for item in (f"--{name}", value)]
    return [str(item) for item in (sys.executable, *launcher, EXAMPLES / "run_clm.py", *flags, *arguments)]


def accelerate_launch(num_machines: int = 1, machine_rank: int = 0, port: int = 0) -> list[object]:
    """As `ddp.yaml` says it, on two processes without an accelerator."""
    machines = ["--num_machines", num_machines, "--machine_rank", machine_rank]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    options = ["--num_processes", 2, "--mixed_precision", "no", *machines, *address]
    return ["-m", "accelerate.commands.launch", "--config_file", ACCELERATE / "ddp.yaml", *options]


def run_together(commands: list[list[str]], cwd: Path) -> None:
    options = {"cwd": cwd, "env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(line, **options) for line in commands]
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-4000:]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_two_processes_two_nodes_and_accumulated_gradients_have_the_losses_of_one_process(tmp_path):
    # Eight processes that import their libraries; averaging gradients is the same for every family.
    overrides = ["--config_overrides", json.dumps({"model_type": "sumagg", **TINY})]
    port = free_port()
    runs = {
        "one": ([[]], ["--per_device_train_batch_size", 4]),
        "ddp": ([accelerate_launch(port=free_port())], ["--per_device_train_batch_size", 2]),
        "nodes": ([accelerate_launch(2, rank, port) for rank in range(2)], ["--per_device_train_batch_size", 2]),
        "accumulated": ([[]], ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]),
    }
    curves, models = {}, {}
    for name, (launchers, flags) in runs.items():
        folder = tmp_path / name
        run_together([command(launcher, tmp_path, folder, *overrides, *flags) for launcher in launchers], tmp_path)
        curves[name] = losses(folder)
        models[name] = AutoModelForCausalLM.from_pretrained(folder)
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


def train_20_steps(config: PreTrainedConfig, rank: int = 0, plugin: FullyShardedDataParallelPlugin | None = None):
    """Losses of 20 steps on the same four sequences a step, which two processes share where there is a `plugin`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if plugin is not None:
        expected = {type(model).__name__, *model._no_split_modules}
        # All that the function reads of an `Accelerator`.
        state = SimpleNamespace(fsdp_plugin=plugin)
        fsdp2_prepare_model(SimpleNamespace(state=state, is_main_process=rank == 0, mixed_precision="no"), model)
        sharded = {
            type(module).__name__.removeprefix("FSDP") for module in model.modules() if isinstance(module, FSDPModule)
        }
        assert sharded >= expected
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sequences = torch.randint(config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(1))
    batch = sequences if plugin is None else sequences.chunk(2)[rank]
    losses = []
    for _ in range(20):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if plugin is not None:
            dist.all_reduce(mean)
            mean /= 2
        losses.append(mean.item())
    return losses


def train_sharded(rank: int, folder: str, config: PreTrainedConfig) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # From the environment that `accelerate launch` sets.
    losses = train_20_steps(config, rank, FullyShardedDataParallelPlugin())
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


@pytest.fixture
def fsdp2_environment(monkeypatch) -> None:
    """What `accelerate launch` makes of `fsdp2.yaml`."""
    line = ["--config_file", str(ACCELERATE / "fsdp2.yaml"), "--mixed_precision", "no", str(EXAMPLES / "run_clm.py")]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)


def test_the_fsdp2_config_shards_the_weights_and_saves_them_whole(fsdp2_environment):
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT


# accelerate turns FSDP on only with an accelerator: here is what it does to the model there.
@pytest.mark.slow
@pytest.mark.parametrize("config_class", [SumAggConfig, ToSTTextConfig])
def test_two_processes_that_share_the_weights_have_the_losses_of_one(tmp_path, config_class, fsdp2_environment):
    config = config_class(vocab_size=20, max_position_embeddings=16, **TINY)
    torch.multiprocessing.spawn(train_sharded, (str(tmp_path), config), nprocs=2)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses == pytest.approx(train_20_steps(config), abs=1e-4)
    assert losses[-1] < losses[0] - 0.1


def test_the_deepspeed_config_takes_what_trainer_is_told(tmp_path):
    """DeepSpeed itself is not installed: accelerate's reading of the file, filled with the values of a run."""
    plugin = DeepSpeedPlugin(hf_ds_config=str(ACCELERATE / "deepspeed_zero3.json"))
    assert plugin.zero_stage == 3 and plugin.zero3_save_16bit_model is True
    values = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "train_batch_size": 12}
    # Of a key that is "auto" and not among the values, it raises an error.
    plugin.deepspeed_config_process(**values, gradient_clipping=1.0, **{"bf16.enabled": True})
    config = plugin.deepspeed_config
    assert {name: config[name] for name in values} == values
    assert config["gradient_clipping"] == 1.0 and config["bf16"] == {"enabled": True}
