"""Train the published bag of embeddings, a classifier of long documents without any mixer, or a model with layers.

Without arguments: which package of Python's standard library a piece of code is from, which needs no network. The model
is a mean over projected embeddings: single words tell most there, and mixers make no classifier of such data better. It
has no limit of length. `--preset sumagg-pure-small`, `--config_overrides` and a causal language model
(`--model_name_or_path`) give models with layers. Simple baselines are measured beside it.

    python run_text_classification.py
    python run_text_classification.py --train_file a.csv --validation_file b.csv
    python run_text_classification.py --model_name_or_path runs/clm --output_dir runs/from-pretrained
    python run_text_classification.py --model_name_or_path runs/clm --lora_rank 8 --learning_rate 1e-2 \
        --num_train_epochs 4 --output_dir runs/adapted
"""

import copy
import os
from dataclasses import dataclass, field


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from datasets import DatasetDict
from peft import TaskType
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from modeling_sumagg import FAMILIES
from modeling_sumagg.training.embedded_data import standard_library_packages
from modeling_sumagg.training.runs import Results, report, train_and_evaluate
from modeling_sumagg.training.scripts import (
    DecayTrainer,
    LabelledDataArguments,
    TextModelArguments,
    add_adapters,
    encode_labels,
    load_config,
    load_model,
    load_splits,
    load_tokenizer,
    model_max_length,
    parse_arguments,
    run,
    source_of,
    user_errors,
)


# The published classifier without blocks, but with the mean instead of the sum, dropout, and positions without end.
SMALL_CLASSIFIER = {
    "model_type": "sumagg",
    "hidden_size": 256,
    "num_hidden_layers": 0,
    "num_attention_heads": 4,
    "position_embedding_type": "sinusoidal",
    "position_bias": 1.0,
    "pooling": "mean",
    "hidden_dropout": 0.1,
    "classifier_dropout": 0.1,
}


@dataclass
class DocumentArguments(LabelledDataArguments):
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a document to train on; the rest is cut off."})


def end_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer end each text with its end-of-text token, if an empty one has no token otherwise."""
    if not tokenizer("")["input_ids"]:
        tokenizer.add_eos_token = True


def accuracy(outputs: EvalPrediction) -> dict[str, float]:
    return {"accuracy": accuracy_score(outputs.label_ids, outputs.predictions.argmax(axis=1))}


def baseline_results(splits: DatasetDict) -> Results:
    """Accuracy on each held-out split of the most frequent class, and of logistic regression on TF-IDF."""
    tfidf = TfidfVectorizer(token_pattern=r"\b\w+\b")
    classifiers = {
        "most frequent class": DummyClassifier(strategy="most_frequent"),
        "TF-IDF and logistic regression": make_pipeline(tfidf, LogisticRegression(max_iter=1000)),
    }
    x = {name: [text or "" for text in split["text"]] for name, split in splits.items()}
    y = {name: split["labels"][:] for name, split in splits.items()}
    results: Results = {}
    for name, classifier in classifiers.items():
        classifier.fit(x["train"], y["train"])
        results[name] = {s: {"accuracy": classifier.score(x[s], y[s])} for s in splits if s != "train"}
    return results


def main() -> None:
    with user_errors():
        data_arguments, model_arguments, training_arguments = parse_arguments(
            (DocumentArguments, TextModelArguments),
            __doc__,
            output_dir="runs/text-classification",
            num_train_epochs=15,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=5e-3,
            weight_decay=0.1,
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            logging_strategy="epoch",
        )
        is_own = data_arguments.dataset_name or data_arguments.train_file
        source = source_of(data_arguments, "Python's standard library")
        duration = "the progress bar shows how long" if is_own else "about 2 minutes on two cores"
        print(
            f"Trains a classifier of documents on {source} and saves it to {training_arguments.output_dir} ({duration})."
        )
        columns = {"text": data_arguments.text_column_name, "label": data_arguments.label_column_name}
        splits = load_splits(
            data_arguments, standard_library_packages, columns, seed=training_arguments.seed, embedded_name=source
        )
        splits, names = encode_labels(splits)
        tokenizer = load_tokenizer(model_arguments, (text or "" for text in splits["train"]["text"]))
        end_texts(tokenizer)
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        config = load_config(model_arguments, SMALL_CLASSIFIER, tokenizer, **labels)
        model = load_model(AutoModelForSequenceClassification, model_arguments, config)
        tokenizer.model_max_length = model_max_length(config)
        max_length = min(data_arguments.max_length, tokenizer.model_max_length)
        # Truncation would be saved with the tokenizer; models with absolute positions are padded on the right in training.
        encoder = copy.deepcopy(tokenizer)
        encoder.padding_side = "right"
        documents = splits.map(
            lambda batch: {
                "input_ids": encoder([text or "" for text in batch["text"]], truncation=True, max_length=max_length)[
                    "input_ids"
                ]
            },
            batched=True,
            remove_columns=["text"],
        )

    print(
        f"{type(model).__name__}, {model.num_parameters():,} parameters; {splits.num_rows} documents, classes {names}"
    )
    if model_arguments.lora_rank:
        options = {"task_type": TaskType.SEQ_CLS, "modules_to_save": ["score", "pooler"]}
        if model_arguments.target_modules is None and config.model_type in FAMILIES:
            # Which words there are tells most about a document.
            options["target_modules"] = [*FAMILIES[config.model_type].lora_target_modules, "embed_tokens"]
        model = add_adapters(model, model_arguments, **options)
    trainer = DecayTrainer(
        model=model,
        args=training_arguments,
        train_dataset=documents["train"],
        eval_dataset=documents["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(encoder),
        compute_metrics=accuracy,
    )
    held_out = {name: split for name, split in documents.items() if name != "train"}
    results = train_and_evaluate(trainer, held_out, ["accuracy"])
    if trainer.is_world_process_zero():
        report(
            trainer,
            AutoModelForSequenceClassification,
            results | baseline_results(splits),
            held_out,
            base_model=model_arguments.model_name_or_path,
            hyperparameters={"max_length": max_length},
        )


if __name__ == "__main__":
    run(main)
