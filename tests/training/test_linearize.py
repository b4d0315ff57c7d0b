"""From a pretrained transformer to a model of constant state, by the command."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from testing import WORDS, assert_close, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import modeling_sumagg.training.linearize as module
from modeling_sumagg.__main__ import main
from modeling_sumagg.publishing.pretrained import convert_pretrained, load_teacher
from modeling_sumagg.training.linearize import linearize


WINDOW, SINKS = 6, 2


@pytest.fixture
def folder(tmp_path):
    """A folder with a teacher, its card, and a text."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    teacher = LlamaForCausalLM(config)
    teacher.save_pretrained(tmp_path / "teacher")
    word_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: mit\n---\n")
    words = [WORDS[3 + int(i)] for i in torch.randint(57, (4000,))]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(words[i : i + 20]) for i in range(0, 4000, 20)))
    return tmp_path


@pytest.fixture
def unchecked(monkeypatch):
    """Write the card without loading the folder in another process, which takes seconds."""
    monkeypatch.setattr(module, "save_model_card", functools.partial(module.save_model_card, check=False))


def command(folder, *options: str, output: str = "out") -> list[str]:
    arguments = {
        "--model_name_or_path": folder / "teacher",
        "--train_file": folder / "text.txt",
        "--output_dir": folder / output,
        "--window": WINDOW,
        "--sinks": SINKS,
        "--block_size": 32,
        "--long_block_size": 64,
        "--chunk_length": 24,
        "--per_device_train_batch_size": 2,
        "--learning_rate": 0.01,
        "--logging_steps": 1,
        "--save_steps": 1,
    }
    return ["linearize", *(str(part) for pair in arguments.items() for part in pair), *options]


def run(folder, *options: str, output: str = "out") -> None:
    main(command(folder, *options, output=output))


def test_without_steps_the_weights_are_those_of_the_teacher(folder):
    run(folder, "--steps", "0")
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert model.config.layer_types == ["sliding_attention"] * 3
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher")
    input_ids = torch.randint(3, 60, (1, 30))
    reach = WINDOW + SINKS
    with torch.no_grad():
        own, expected = (each(input_ids).logits for each in (model, teacher))
    # Every layer sees all of so many tokens.
    assert_close(own[:, :reach], expected[:, :reach])
    assert (own - expected)[:, reach + 1 :].abs().max() > 0.1
    card = ModelCard.load(folder / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "teacher")
    assert "the last 6 tokens and the first 2" in card.text
    assert not (folder / "out" / "stages").exists()


def test_the_gate_begins_closed():
    set_seed(0)
    teacher = convert_pretrained(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=60,
                hidden_size=16,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_hidden_layers=2,
                intermediate_size=8,
            )
        )
    )
    input_ids = torch.randint(60, (2, 40))
    with_sum, without = (linearize(teacher, [], window=5, sinks=1, with_sum=it).eval() for it in (True, False))
    with torch.no_grad():
        assert torch.equal(with_sum(input_ids).logits, without(input_ids).logits)


def test_the_gradients_of_the_first_stage_are_those_of_all_distances_together(tmp_path):
    set_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
    teacher = convert_pretrained(LlamaForCausalLM(LlamaConfig(vocab_size=60, num_hidden_layers=3, **sizes)))
    student = linearize(teacher, [1], window=4, sinks=1)
    with torch.no_grad():
        for parameter in [*teacher.parameters(), *student.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    input_ids = torch.randint(60, (2, 30))
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    trainer = module.StageTrainer(model=student, args=arguments, stage="mixers", teacher=teacher)
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer.training_step(student, {"input_ids": input_ids})
    names = [name for name, parameter in student.named_parameters() if parameter.grad is not None]
    actual = [student.get_parameter(name).grad.clone() for name in names]
    assert {name.split(".mixer.")[0] for name in names} == {"model.layers.0", "model.layers.2"}

    calls = {}
    for i in (0, 2):
        teacher.model.layers[i].mixer.register_forward_hook(
            lambda layer, args, kwargs, output, i=i: calls.__setitem__(i, (args[0], kwargs, output[0])),
            with_kwargs=True,
        )
    teacher(input_ids)
    student.zero_grad()
    # The masks of a pass of the student.
    layouts = []
    student.model.layers[0].register_forward_pre_hook(lambda layer, args: layouts.append(args[1]))
    student(input_ids, use_cache=False)
    total = torch.zeros(())
    for i, (inputs, kwargs, target) in calls.items():
        output = student.model.layers[i].mixer(inputs, layouts[0], position_embeddings=kwargs["position_embeddings"])[
            0
        ]
        total = total + (output - target).square().sum() / target.square().sum() / 4
    total.backward()
    assert_close(loss, total)
    for name, gradient in zip(names, actual, strict=True):
        assert_close(gradient, student.get_parameter(name).grad)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True


def test_a_run_that_was_stopped_in_every_stage_goes_on_to_the_same_weights(folder, unchecked, monkeypatch):
    options = ("--steps", "4", "3", "3", "--keep_attention", "every_3")
    run(folder, *options, output="whole")
    expected = AutoModelForCausalLM.from_pretrained(folder / "whole").state_dict()
    history = json.loads((folder / "whole" / "stages.json").read_text())
    assert [entry["stage"] for entry in history if "loss" in entry] == ["mixers"] * 4 + ["logits"] * 3 + ["text"] * 3
    measured = [(entry["step"], entry["eval_perplexity"]) for entry in history if "eval_perplexity" in entry]
    assert [step for step, _ in measured] == list(range(11))
    card = ModelCard.load(folder / "whole" / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(measured[-1][1], rel=1e-4)
    assert history[-1]["tokens"] == 7 * 2 * 32 + 3 * 2 * 64

    train = module.StageTrainer.train

    def stopped(self, resume_from_checkpoint=None):
        if resume_from_checkpoint is None:
            self.add_callback(Stop())
        return train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(module.StageTrainer, "train", stopped)
    for _ in range(3):
        with pytest.raises(SystemExit) as stop:
            run(folder, *options, output="parts")
        assert stop.value.code == 130
    run(folder, *options, output="parts")
    actual = AutoModelForCausalLM.from_pretrained(folder / "parts").state_dict()
    for name, tensor in expected.items():
        assert_close(actual[name], tensor)


# Runs a command once for each way to be killed, in a copy of a process that has imported what it needs.
KILLED = """
import functools, json, os, signal, sys
import modeling_sumagg.training.linearize as module
from modeling_sumagg.__main__ import main
from transformers import TrainerState

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dies(cls, name, where, halfway):
    method = getattr(cls, name)
    def replaced(self, *args, **kwargs):
        at = getattr(self, "state", self).global_step
        if [getattr(self, "stage", where[0]), at] != where:
            return method(self, *args, **kwargs)
        halfway(self, method, *args, **kwargs)
        die()
    setattr(cls, name, replaced)

def write_half(state, method, path):
    method(state, path)
    os.truncate(path, os.path.getsize(path) // 2)

def nothing(*args, **kwargs):
    pass

def kill(stage, step, place):
    if place == "step":
        dies(module.StageTrainer, "training_step", [stage, step], lambda self, method, *args: method(self, *args))
    elif place == "optimizer":
        dies(module.StageTrainer, "_save_optimizer_and_scheduler", [stage, step], nothing)
    elif place == "state":
        train = module.StageTrainer.train
        def train_in_stage(self, **kwargs):
            if self.stage == stage:
                dies(TrainerState, "save_to_json", [stage, step], write_half)
            return train(self, **kwargs)
        module.StageTrainer.train = train_in_stage
    elif place == "card":
        module.save_model_card = lambda *args, **kwargs: die()

module.save_model_card = functools.partial(module.save_model_card, check=False)
for arguments, way in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        if way:
            kill(*way)
        main(arguments)
        sys.stdout.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-signal.SIGKILL if way else 0), (way, status)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_in_every_stage_goes_on_to_the_same_weights(folder):
    options = ("--steps", "4", "--keep_attention", "every_3")
    ways = [
        ("mixers", 2, "step"),
        ("mixers", 3, "optimizer"),
        ("logits", 2, "step"),
        ("logits", 4, "state"),
        ("text", 2, "optimizer"),
        ("text", 3, "step"),
        ("after", 0, "card"),
    ]
    runs = [(command(folder, *options, output="parts"), way) for way in [*ways, None]]
    runs.append((command(folder, *options, output="whole"), None))
    process = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(runs)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.returncode == 0, process.stdout[-6000:]
    assert not (folder / "parts" / "stages").exists()
    actual, expected = (
        AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in ("parts", "whole")
    )
    for name, tensor in expected.items():
        assert_close(actual[name], tensor)


def test_untied_embeddings_learn_apart(folder, unchecked):
    run(folder, "--steps", "0", "2", "0", "--untie_embeddings")
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher")
    assert teacher.config.tie_word_embeddings and not model.config.tie_word_embeddings
    distance = model.lm_head.weight - model.model.embed_tokens.weight
    assert distance.abs().max() > 1e-3
    with pytest.raises(SystemExit, match="tie_word_embeddings False, now tie_word_embeddings True"):
        (folder / "out" / "stages").mkdir()
        (folder / "out" / "stages" / "command.json").write_text('{"tie_word_embeddings": "False"}')
        run(folder, "--steps", "0", "2", "0")


@pytest.mark.parametrize(
    ("options", "rates"),
    [((), [0.01, 0.001, 0.001]), (("--learning_rates", "3e-3", "2e-4", "1e-5"), [3e-3, 2e-4, 1e-5])],
)
def test_each_stage_has_its_learning_rate(folder, unchecked, monkeypatch, options, rates):
    used = []
    train = module.StageTrainer.train

    def recorded(self, **kwargs):
        used.append(self.args.learning_rate)
        return train(self, **kwargs)

    monkeypatch.setattr(module.StageTrainer, "train", recorded)
    run(folder, "--steps", "1", *options)
    assert used == pytest.approx(rates)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--learning_rates", "1e-3"), "takes three numbers above 0"),
        (("--keep_attention", "every_1"), "keeps every layer"),
        (("--keep_attention", "some"), "must be none, auto or every_N, got 'some'"),
        (("--steps", "1", "2"), "one number from 0 or three"),
        (("--sinks", "-1"), "--sinks must be at least 0"),
        (("--max_steps", "5"), "leave --max_steps"),
        (("--block_size", "100000"), "has less than --block_size 100000 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(folder, options, reason):
    with pytest.raises(SystemExit, match=reason):
        run(folder, *options)
    assert not (folder / "out" / "config.json").exists()


def test_a_teacher_without_a_licence_needs_one(folder):
    (folder / "teacher" / "README.md").unlink()
    with pytest.raises(SystemExit, match="give it as --license"):
        run(folder, "--steps", "0")


def test_another_command_does_not_go_on_from_the_stages_of_the_first(folder):
    stages = folder / "out" / "stages"
    stages.mkdir(parents=True)
    (stages / "command.json").write_text('{"sliding_window": "12"}')
    with pytest.raises(SystemExit, match="sliding_window 12"):
        run(folder, "--steps", "1")


def test_auto_keeps_the_layers_that_cost_most(folder, unchecked, capsys):
    run(folder, "--steps", "0", "--keep_attention", "auto")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layer ")]
    costs = [float(line.split()[2]) for line in lines]
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["layer_types"].index("full_attention") == costs.index(max(costs))
    assert config["layer_types"].count("full_attention") == 1


def test_the_benchmark_of_linearized_models(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmarks")
    import linearized

    texts = {"validation": {"text": [(folder / "text.txt").read_text()]}}
    monkeypatch.setattr(linearized, "news_articles", lambda wheel, cache_dir: texts)
    options = "--windows 64 --lengths 32 --decode_after 200 400 --num_steps 1 --num_texts 2 --far 4 --key_after 8 --num_keys 1"
    command = ["linearized.py", "--model_name_or_path", str(folder / "teacher"), "--cache_dir", str(folder)]
    monkeypatch.setattr("sys.argv", [*command, *options.split()])
    linearized.main()
    teacher, _, windows, _ = map(json.loads, capsys.readouterr().out.splitlines())
    # Keys and values of 2 heads of 4 float32 in 3 layers.
    assert teacher["bytes after 400"] == 401 * 2 * 2 * 4 * 4 * 3
    assert windows["bytes after 400"] == windows["bytes after 200"] == (63 + 4) * 2 * 2 * 4 * 4 * 3
    # Rows are shorter than the window, so both models are the same.
    assert windows["news, 32 tokens"] == pytest.approx(teacher["news, 32 tokens"], rel=1e-4)


def test_the_benchmark_of_joins(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmarks")
    import joins

    # Its task is the teacher's layer, and its window is the layer of the command.
    teacher = convert_pretrained(load_teacher(str(folder / "teacher"), dtype=torch.float32)).eval()
    student = linearize(teacher, [], window=6, sinks=2, with_sum=False).eval()
    place, outputs = torch.arange(24), []
    is_seen = (place[:, None] - place < 6) | (place < 2)
    rows = [{"input_ids": torch.randint(60, (24,)).tolist()}]
    for model in (teacher, student):
        model.model.layers[0].mixer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    (task,) = joins.tasks_of(teacher, 0, rows, is_seen)
    with torch.no_grad():
        student.model(torch.tensor([rows[0]["input_ids"]]), use_cache=False)
        attention = teacher.model.layers[0].mixer
        assert_close(task.target, outputs[0])
        assert_close(attention.out_proj(task.windowed.flatten(2)), outputs[1])
        alone = joins.distance(joins.Join(attention, is_seen, 6), attention, task)
        assert joins.distance(joins.GatedSum(attention, is_seen, 6), attention, task) == alone
    for make in (joins.GatedSum, joins.OneNormaliser, joins.MixedMeans, joins.MixedMeansOfTokens):
        join = make(attention, is_seen, 6)
        begin = joins.distance(join, attention, task).item()
        assert joins.learn(join, attention, [task], [task], 20, 1e-2) < begin
    # One softmax over all that is seen and unseen, if nothing unseen counts.
    normalised = joins.OneNormaliser(attention, is_seen, 6)
    torch.nn.init.constant_(normalised.logit, -50.0)
    assert_close(normalised(task), task.windowed)

    texts = {split: {"text": [(folder / "text.txt").read_text()]} for split in ("train", "validation")}
    monkeypatch.setattr(joins, "news_articles", lambda wheel, cache_dir: texts)
    options = "--window 6 --sinks 2 --layers 1 --block_size 24 --num_texts 4 --steps 30 --learning_rates 0.01 0.1"
    folders = ["--model_name_or_path", folder / "teacher", "--cache_dir", folder, "--output_dir", folder / "results"]
    monkeypatch.setattr("sys.argv", ["joins.py", *map(str, folders), *options.split()])
    joins.main()
    table = (folder / "results" / "joins.md").read_text()
    distances = json.loads((folder / "results" / "joins.json").read_text())["distances"]
    assert table in capsys.readouterr().out and table.count("\n") == 2 + len(joins.JOINS)
    assert all(list(of_layers) == ["1"] for of_layers in distances.values())


def test_a_repetition_from_far_away(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmarks")
    from linearized import is_far_repetition

    # The pair 1 2 comes at the places 0, 5 and 7 of the second token.
    tokens = [1, 2, 3, 4, 5, 1, 2, 1, 2]
    assert is_far_repetition(tokens, 3).nonzero().flatten().tolist() == [5]
    assert is_far_repetition(tokens, 1).nonzero().flatten().tolist() == [5, 7]


class CopyingModel:
    """Predicts the token that came after the last place with the same token, as an induction head does."""

    def __call__(self, input_ids, use_cache, logits_to_keep):
        tokens, logits = input_ids[0].tolist(), torch.zeros(1, input_ids.shape[1], 64)
        for place, token in enumerate(tokens):
            earlier = [i for i in range(place) if tokens[i] == token]
            if earlier:
                logits[0, place, tokens[earlier[-1] + 1]] = 1
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_pass_keys_are_counted_where_they_are_copied(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmarks")
    from linearized import recalled

    # Every word is a token, and a key is one: it came after "is".
    vocabulary: dict[str, int] = {}

    def tokenizer(text, add_special_tokens):
        words = text.replace(".", " .").split()
        return {"input_ids": [vocabulary.setdefault(word, len(vocabulary)) for word in words]}

    assert recalled(CopyingModel(), tokenizer, [60] * 20, 10, 3) == 1
    misleading = [tokenizer("is", False)["input_ids"][0], 61] * 10
    assert recalled(CopyingModel(), tokenizer, misleading, 10, 3) == 0
