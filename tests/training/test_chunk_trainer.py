"""`ChunkTrainer` against the same training on whole sequences."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from datasets import Dataset
from testing import build, sumagg_config
from transformers import TrainingArguments, default_data_collator

from modeling_sumagg import SumAggForCausalLM, SumAggForMaskedLM, SumAggForSequenceClassification
from modeling_sumagg.training.chunk_trainer import ChunkTrainer


def rows_of(model_class, count=8, length=13):
    rows = []
    for i in range(count):
        ids = torch.randint(61, (length,)).tolist()
        labels = [-100 if i % 3 == 0 and token < 5 else ids[token] for token in range(length)]
        is_classifier = model_class is SumAggForSequenceClassification
        rows.append({"input_ids": ids, "labels": i % 3 if is_classifier else labels})
    return Dataset.from_list(rows)


def trained(model_class, folder, rows, chunk_length, sequence_parallel=False, **arguments):
    model = build(model_class, sumagg_config("hybrid", num_labels=3))
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    trainer = ChunkTrainer(
        model,
        TrainingArguments(
            str(folder),
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            learning_rate=1e-2,
            max_grad_norm=0.5,
            **{**settings, **arguments},
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
        chunk_length=chunk_length,
        sequence_parallel=sequence_parallel,
    )
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("model_class", [SumAggForCausalLM, SumAggForSequenceClassification])
def test_training_is_that_on_whole_sequences(model_class, smoothing, tmp_path):
    rows = rows_of(model_class)
    whole, chunks = (
        trained(model_class, tmp_path, rows, chunk_length, label_smoothing_factor=smoothing)
        for chunk_length in (None, 4)
    )
    histories = [
        [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, chunks)
    ]
    assert len(histories[0]) == 4
    torch.testing.assert_close(torch.tensor(histories[1]), torch.tensor(histories[0]), rtol=1e-4, atol=0)
    for parameter, expected in zip(chunks.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)


def test_evaluation_gives_losses_of_tokens(tmp_path):
    rows = rows_of(SumAggForCausalLM, count=3)
    trainer = trained(SumAggForCausalLM, tmp_path, rows, 4, max_steps=1)
    found = trainer.predict(rows)
    model = trainer.model.eval()
    for row, losses in zip(rows, found.predictions, strict=True):
        with torch.no_grad():
            log_probabilities = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for token in range(1, 13):
            label = row["labels"][token]
            expected = 0.0 if label == -100 else -log_probabilities[token - 1, label].item()
            assert losses[token - 1] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_resuming_goes_the_same_way(tmp_path):
    rows, constant = rows_of(SumAggForCausalLM), {"lr_scheduler_type": "constant"}
    through = trained(SumAggForCausalLM, tmp_path / "through", rows, 4, max_steps=4, **constant)
    trained(
        SumAggForCausalLM, tmp_path / "halves", rows, 4, max_steps=2, save_strategy="steps", save_steps=2, **constant
    )
    resumed = trained(
        SumAggForCausalLM,
        tmp_path / "halves",
        rows,
        4,
        max_steps=4,
        resume_from_checkpoint=f"{tmp_path}/halves/checkpoint-2",
        **constant,
    )
    for parameter, expected in zip(resumed.model.parameters(), through.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_work_with_chunks_is_refused(tmp_path):
    model = build(SumAggForCausalLM, sumagg_config("pure"))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="Chunks do not work with `compute_loss_func`"):
        ChunkTrainer(model, arguments, compute_loss_func=lambda *args, **kwargs: 0, chunk_length=4)
    layerwise = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, optim="galore_adamw_layerwise")
    with pytest.raises(ValueError, match="steps within the backward pass"):
        ChunkTrainer(model, layerwise, chunk_length=4)
    with pytest.raises(ValueError, match="`sequence_parallel` needs several processes"):
        ChunkTrainer(model, arguments, sequence_parallel=True)
    with pytest.raises(TypeError, match="got a SumAggForMaskedLM"):
        ChunkTrainer(build(SumAggForMaskedLM, sumagg_config("pure", is_causal=False)), arguments, chunk_length=4)


def compare_over_processes(rank, folder):
    """Two processes that compute parts of each sequence train as two that compute different sequences."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    rows = rows_of(SumAggForCausalLM, count=12)
    for averaged in (True, False):
        settings = {"num_train_epochs": 1, "average_tokens_across_devices": averaged}
        data_parallel = trained(SumAggForCausalLM, folder, rows, None, False, **settings)
        for chunk_length in (None, 4):
            parts = trained(SumAggForCausalLM, folder, rows, chunk_length, True, **settings)
            histories = [
                [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
                for trainer in (data_parallel, parts)
            ]
            torch.testing.assert_close(torch.tensor(histories[1]), torch.tensor(histories[0]), rtol=1e-4, atol=0)
            pairs = zip(parts.model.parameters(), data_parallel.model.parameters(), strict=True)
            for parameter, expected in pairs:
                torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)
    losses = [parts.evaluate(rows)["eval_loss"] for parts.chunk_length in (None, 4)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    with pytest.raises(ValueError, match="`chunk_length` must be a multiple of it, got 5"):
        trained(SumAggForCausalLM, folder, rows, 5, True)
    with pytest.raises(ValueError, match="`sequence_parallel` does not work with a classifier of sequences"):
        trained(SumAggForSequenceClassification, folder, rows, None, True)
    dist.destroy_process_group()


@pytest.mark.slow
def test_each_sequence_is_cut_over_the_processes(tmp_path):
    mp.spawn(compare_over_processes, args=(str(tmp_path),), nprocs=2)
