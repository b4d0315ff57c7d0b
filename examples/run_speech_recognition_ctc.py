"""Train a streaming speech recogniser with `Trainer` and CTC, from scratch or from a checkpoint, and compare it with a
simple baseline.

Without arguments: number words and sentences of Python's documentation, spoken by espeak-ng in twelve voices, and four
more for evaluation; it needs no network. What it saves is for `stream_transcription.py`, which writes while one speaks.

    python run_speech_recognition_ctc.py
    python run_speech_recognition_ctc.py --train_file speech/train.csv --audio_column_name path --text_column_name text
    python run_speech_recognition_ctc.py --train_dir speech --text_column_name transcription
    python run_speech_recognition_ctc.py --model_name_or_path runs/speech-recognition --train_file mine.csv \
        --lora_rank 8 --learning_rate 1e-2 --output_dir runs/my-voice

A csv has a column of audio files, relative to it, and one of transcripts; a folder of audio has a `metadata.csv` with the
columns `file_name` and `transcription`. Audio of any sampling rate and number of channels is resampled and averaged.
"""

import json
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jiwer
import numpy as np
import torch
from datasets import Array2D, Dataset, DatasetDict, Features, Value
from datasets import Sequence as ListOf
from transformers import (
    AutoModelForCTC,
    AutoProcessor,
    EvalPrediction,
    Speech2TextFeatureExtractor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2Processor,
)

from modeling_sumagg import DataCollatorForCTC
from modeling_sumagg.streams.audio import read_audio
from modeling_sumagg.training.plots import plot_alignment
from modeling_sumagg.training.runs import report, train_and_evaluate
from modeling_sumagg.training.scripts import (
    DataArguments,
    DecayTrainer,
    ModelArguments,
    add_adapters,
    load_config,
    load_model,
    load_splits,
    parse_arguments,
    run,
    source_of,
    user_errors,
)
from modeling_sumagg.training.spoken_data import spoken_sentences


SMALL_RECOGNISER = {
    "model_type": "sumagg_speech",
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "conv_kernel_size": 4,
    "mask_feature_prob": 0.125,
}


@dataclass
class SpeechArguments(DataArguments):
    test_file: str | None = field(
        default=None, metadata={"help": "The same, to evaluate on at the end.", "aliases": ["--test_dir"]}
    )
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the audio, or with its files."})
    text_column_name: str = field(default="text", metadata={"help": "Column with the transcripts."})
    max_seconds: float = field(default=20.0, metadata={"help": "Longer utterances are not trained on."})
    num_train_utterances: int = field(default=5000, metadata={"help": "Of the embedded data, to train on."})
    num_held_out_utterances: int = field(default=400, metadata={"help": "Of the embedded data, in each other split."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is not None and Path(path).is_dir():
                # The form of `datasets`' audiofolder, which asks for torchcodec to copy a path.
                setattr(self, name, str(Path(path) / "metadata.csv"))
                self.audio_column_name = "file_name"


# Typographic apostrophes; and characters that are neither seen nor heard, such as soft hyphens and variation selectors.
SAME_LETTERS = {0x2019: "'", 0x02BC: "'", **dict.fromkeys([0x00AD, 0x2060, 0xFEFF, *range(0xFE00, 0xFE10)])}
# Inside of words they decide which forms letters take, as in Persian and Malayalam.
JOINERS = "\u200c\u200d"


def normalize(text: str | None) -> str:
    """Lower case, composed (NFC); anything but letters with their marks, digits and apostrophes becomes one space."""
    if text is None:
        return ""
    composed = unicodedata.normalize("NFC", str(text).lower().translate(SAME_LETTERS))
    kept = "".join(c if c in f"'{JOINERS}" or unicodedata.category(c)[0] in "LMN" else " " for c in composed)
    words = [word.strip(JOINERS) for word in kept.split()]
    return " ".join(word for word in words if any(unicodedata.category(c)[0] in "LN" for c in word))


def make_processor(texts: Sequence[str]) -> Wav2Vec2Processor:
    """Log-mel frames that stream, and the characters of the texts as symbols; the padding is CTC's blank."""
    characters = sorted(set().union(*texts) - {" "})
    symbols = ["<pad>", "<unk>", "|", *characters]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}))
        tokenizer = Wav2Vec2CTCTokenizer(str(file), bos_token=None, eos_token=None)
    return Wav2Vec2Processor(Speech2TextFeatureExtractor(do_ceptral_normalize=False), tokenizer)


def to_features(row: dict[str, Any], processor: Wav2Vec2Processor, folder: Path | None) -> dict[str, Any]:
    """`input_features` `[F, num_mel_bins]`, `labels` and `length` `F`; a relative path is one in `folder`."""
    extractor, audio = processor.feature_extractor, row["audio"]
    if isinstance(audio, str):
        audio = {"path": audio}
    source = audio.get("bytes") or (folder / audio["path"] if folder else Path(audio["path"]))
    samples = read_audio(source, extractor.sampling_rate)
    frames = extractor(samples, sampling_rate=extractor.sampling_rate)["input_features"][0]
    if not len(frames):
        raise ValueError(f"{audio.get('path') or 'The audio'} is too short for one frame of the feature extractor.")
    return {"input_features": frames, "labels": processor.tokenizer(row["text"])["input_ids"], "length": len(frames)}


def statistics(train: Dataset, rows: int = 500) -> dict[str, list[float]]:
    """Means and standard deviations of the mel bins over the first rows of the training data, for the config."""
    frames = np.concatenate(train.with_format("numpy")[:rows]["input_features"])
    return {"feature_mean": frames.mean(axis=0).tolist(), "feature_std": frames.std(axis=0).clip(1e-3).tolist()}


def fits(labels: list[int], length: int, ratio: int, max_frames: float) -> bool:
    """Whether CTC can align the symbols: each takes one of the outputs, and two equal ones a blank between them."""
    needed = len(labels) + sum(a == b for a, b in zip(labels[1:], labels[:-1], strict=True))
    return needed <= length // ratio and length <= max_frames


def error_rates(
    references: Sequence[str], hypotheses: Sequence[str], unknown: str | None = "<unk>"
) -> dict[str, float]:
    """
    Word and character error rate: edits over the words (characters) of the references, 0 is perfect.

    `unknown` stands for one letter that is no symbol. The model cannot write it, so every such letter is an error.
    """
    if unknown:
        # Two different characters that are in no text.
        references = [text.replace(unknown, "\ue000") for text in references]
        hypotheses = [text.replace(unknown, "\ue001") for text in hypotheses]
    return {"wer": jiwer.wer(list(references), list(hypotheses)), "cer": jiwer.cer(list(references), list(hypotheses))}


def most_likely(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def load_speech(arguments: SpeechArguments, seed: int) -> DatasetDict:
    """The splits with the columns `audio`, not decoded, and `text`, normalised; of the embedded data also `voice`."""
    columns = {"audio": arguments.audio_column_name, "text": arguments.text_column_name}
    numbers = (arguments.num_train_utterances, arguments.num_held_out_utterances)
    splits = load_splits(
        arguments, lambda: spoken_sentences(*numbers), columns, seed=seed, embedded_name="speech of espeak-ng"
    )
    for name, split in splits.items():
        # As text, whatever type its values were read as.
        texts = [normalize(text) for text in split["text"][:]]
        splits[name] = split.remove_columns("text").add_column("text", texts)
    return splits


def main() -> None:
    with user_errors():
        data_arguments, model_arguments, training_arguments = parse_arguments(
            (SpeechArguments, ModelArguments),
            __doc__,
            output_dir="runs/speech-recognition",
            num_train_epochs=9,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=32,
            learning_rate=2e-3,
            weight_decay=0.05,
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            logging_strategy="epoch",
            remove_unused_columns=False,
        )
        is_own = data_arguments.dataset_name or data_arguments.train_file
        source = source_of(data_arguments, "speech of espeak-ng")
        folder = Path(training_arguments.output_dir)
        duration = "the progress bars show how long" if is_own else "about 15 minutes on two cores"
        print(f"Trains a speech recogniser on {source} and saves it to {folder} ({duration}).")
        splits = load_speech(data_arguments, training_arguments.seed)
        texts = {name: split["text"][:] for name, split in splits.items()}
        checkpoint = model_arguments.model_name_or_path
        processor = AutoProcessor.from_pretrained(checkpoint) if checkpoint else make_processor(texts["train"])
        extractor, tokenizer = processor.feature_extractor, processor.tokenizer
        features = Features(
            {
                "input_features": Array2D((None, extractor.num_mel_bins), "float32"),
                "labels": ListOf(Value("int64")),
                "length": Value("int64"),
            }
        )
        files = {name: getattr(data_arguments, f"{name}_file", None) or data_arguments.train_file for name in splits}
        utterances = DatasetDict()
        for name, split in splits.items():
            # A relative path is relative to the file that names it.
            parent = Path(files[name]).parent if files[name] else None
            utterances[name] = split.map(
                to_features,
                fn_kwargs={"processor": processor, "folder": parent},
                remove_columns=split.column_names,
                features=features,
            )
        values = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "ctc_zero_infinity": True}
        if not checkpoint:
            values |= statistics(utterances["train"])
        config = load_config(model_arguments, SMALL_RECOGNISER, **values)
        model = load_model(AutoModelForCTC, model_arguments, config)
        # Frames a logit: there are 100 frames a second.
        ratio = config.inputs_to_logits_ratio * 100 // extractor.sampling_rate
        max_frames = data_arguments.max_seconds * 100
        kept = utterances["train"].filter(
            fits, input_columns=["labels", "length"], fn_kwargs={"ratio": ratio, "max_frames": max_frames}
        )
        dropped = len(utterances["train"]) - len(kept)
        if not len(kept):
            raise ValueError(
                f"None of the {dropped} utterances is at most --max_seconds and has time for its symbols."
            )
        utterances = DatasetDict({**utterances, "train": kept}).with_format("numpy")

    hours = {name: sum(split["length"][:]) / 360_000 for name, split in utterances.items()}
    print(
        f"{type(model).__name__}, {model.num_parameters():,} parameters, {len(tokenizer)} symbols; utterances "
        f"{utterances.num_rows}, hours { ({name: round(float(value), 2) for name, value in hours.items()}) }"
        + (f"; {dropped} are too long, or too fast for their symbols, and left out" if dropped else "")
    )
    if model_arguments.lora_rank:
        model = add_adapters(model, model_arguments, modules_to_save=["lm_head"])

    def metrics_of(outputs: EvalPrediction) -> dict[str, float]:
        symbols = np.where(outputs.predictions < 0, tokenizer.pad_token_id, outputs.predictions)
        labels = np.where(outputs.label_ids < 0, tokenizer.pad_token_id, outputs.label_ids)
        references = tokenizer.batch_decode(labels, group_tokens=False)
        return error_rates(references, tokenizer.batch_decode(symbols), tokenizer.unk_token)

    trainer = DecayTrainer(
        model=model,
        args=training_arguments,
        train_dataset=utterances["train"],
        eval_dataset=utterances["validation"],
        processing_class=processor,
        data_collator=DataCollatorForCTC(processor),
        compute_metrics=metrics_of,
        preprocess_logits_for_metrics=most_likely,
    )
    held_out = {name: split for name, split in utterances.items() if name != "train"}
    results = train_and_evaluate(trainer, held_out, ["wer", "cer"])
    if not trainer.is_world_process_zero():
        return

    ((sentence, _),) = Counter(texts["train"]).most_common(1)
    results["most frequent sentence"] = {
        split: error_rates(texts[split], [sentence] * len(texts[split])) for split in held_out
    }
    shown = "test" if "test" in held_out else [*held_out][-1]
    plot_alignment(model.eval(), processor, utterances[shown][0], folder / "alignment.png")
    report(
        trainer,
        AutoModelForCTC,
        results,
        held_out,
        base_model=checkpoint,
        pictures=", alignment.png an utterance",
        units={"wer": "edits a word", "cer": "edits a character"},
    )


if __name__ == "__main__":
    run(main)
