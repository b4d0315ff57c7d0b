"""Forward and backward of the published document classifier over the length of the documents.

    python examples/benchmarks/document_classifier.py --output_dir document_classifier

The classifier is one position-modulated sum. Beside it, what its paper compares it with: one softmax attention layer and
the mean of its outputs, both by PyTorch's fused attention and by the formula with its T × T weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from benchmark_utils import BenchmarkArguments, benchmark, compiled, write_results
from transformers import AutoConfig, AutoModelForSequenceClassification, HfArgumentParser

from modeling_sumagg.configuration import preset_path
from modeling_sumagg.training.baselines import AttentionClassifier


BASELINE = "attention"
MODELS = ["sum", BASELINE, "attention, with its weights"]


@dataclass
class ClassifierArguments(BenchmarkArguments):
    lengths: list[int] = field(default_factory=lambda: [128, 256, 512, 1024, 2048], metadata={"help": "Tokens."})
    batch_size: int = 32
    num_attention_heads: int = field(default=8, metadata={"help": "Heads of the attention layer."})

    def __post_init__(self):
        super().__post_init__()
        if min(self.lengths) < 1 or self.batch_size < 1:
            raise ValueError(
                f"`lengths` and `batch_size` must be at least 1, got {self.lengths} and {self.batch_size}."
            )


def prepare_run(arguments: ClassifierArguments, name: str, length: int) -> Callable[[], None]:
    """Forward and backward of one model over a batch."""
    config = AutoConfig.from_pretrained(
        preset_path("sumagg-published-classifier"), max_position_embeddings=length, num_labels=4
    )
    with torch.device(arguments.device):
        if name == "sum":
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AttentionClassifier(config, arguments.num_attention_heads, need_weights=name != BASELINE)
        input_ids = torch.randint(config.vocab_size, (arguments.batch_size, length))
        labels = torch.randint(config.num_labels, (arguments.batch_size,))
    model.to(getattr(torch, arguments.dtype)).train()
    if arguments.compile:
        model.forward = compiled(model.forward)

    def run() -> None:
        model.zero_grad()
        model(input_ids=input_ids, labels=labels)["loss"].backward()

    return run


def main() -> None:
    (arguments,) = HfArgumentParser(ClassifierArguments).parse_args_into_dataclasses()
    arguments.set_up()
    rows = benchmark(arguments, arguments.lengths, MODELS, prepare_run)
    title = f"Document classifier, forward and backward, width 256, {arguments.batch_size} documents a batch"
    write_results(arguments, "document_classifier", title, "tokens", BASELINE, rows)


if __name__ == "__main__":
    main()
