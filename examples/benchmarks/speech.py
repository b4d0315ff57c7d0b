"""Real-time factor of speech recognisers over the length of a recording: seconds of work for a second of audio.

    python examples/benchmarks/speech.py --output_dir speech --threads 1

A preset, at once and streamed in pieces of 100 ms, beside transformers' wav2vec 2.0 and Parakeet of the same width, depth and
heads, with random weights and audio. wav2vec 2.0 hears samples; what makes the log-mel frames for the others is a case
of its own. All have subsampling as their own configs have it: wav2vec 2.0 and Parakeet make tokens of 20 and of 80 ms, the
preset of 40 ms.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from benchmark_utils import BenchmarkArguments, Row, benchmark, compiled, write_results
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    HfArgumentParser,
    ParakeetCTCConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Speech2TextFeatureExtractor,
    Wav2Vec2Config,
)

from modeling_sumagg.configuration import preset_path


FRAMES, STREAMED, WHOLE, BASELINE = "log-mel frames alone", "SumAgg, streamed", "SumAgg", "wav2vec 2.0"
CASES = [WHOLE, STREAMED, BASELINE, "Parakeet", FRAMES]
SAMPLING_RATE, FRAME_RATE = 16000, 100


@dataclass
class SpeechArguments(BenchmarkArguments):
    preset: str = field(default="sumagg-speech-small", metadata={"help": "A speech preset of this package."})
    seconds: list[int] = field(
        default_factory=lambda: [1, 10, 60, 600], metadata={"help": "Lengths of the recording in seconds."}
    )
    piece: int = field(default=10, metadata={"help": "Frames, of 10 ms, that a stream comes in at a time."})

    def __post_init__(self):
        super().__post_init__()
        if min(self.seconds) < 1 or self.piece < 1:
            raise ValueError(
                f"`seconds` and `piece` must be at least 1, got {self.seconds} seconds and pieces of {self.piece} frames."
            )


def configuration(arguments: SpeechArguments, name: str) -> PreTrainedConfig:
    """The preset, or another model of its sizes."""
    config = AutoConfig.from_pretrained(preset_path(arguments.preset))
    sizes = {
        key: getattr(config, key)
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    if name == BASELINE:
        return Wav2Vec2Config(**sizes, vocab_size=config.vocab_size)
    if name == "Parakeet":
        # Tokens of 80 ms, of which ten minutes are more than the 5,000 that it has positions for by default.
        encoder = {**sizes, "num_mel_bins": config.num_mel_bins, "max_position_embeddings": 20000}
        return ParakeetCTCConfig(vocab_size=config.vocab_size, pad_token_id=0, encoder_config=encoder)
    return config


def forward(model: PreTrainedModel, inputs: torch.Tensor) -> None:
    with torch.inference_mode():
        model(inputs)


def stream(model: PreTrainedModel, inputs: torch.Tensor, piece: int) -> None:
    outputs: dict = {}
    with torch.inference_mode():
        for frames in inputs.split(piece, dim=1):
            outputs = model(frames, cache=outputs.get("cache"), use_cache=True)


def prepare_run(arguments: SpeechArguments, name: str, seconds: int) -> Callable[[], object]:
    """What to time of one case."""
    if name == FRAMES:
        extractor = Speech2TextFeatureExtractor(do_ceptral_normalize=False)
        return partial(extractor, torch.randn(seconds * SAMPLING_RATE).numpy(), sampling_rate=SAMPLING_RATE)
    dtype, config = getattr(torch, arguments.dtype), configuration(arguments, name)
    shape = [1, seconds * FRAME_RATE, 80] if name != BASELINE else [1, seconds * SAMPLING_RATE]
    with torch.device(arguments.device):
        model = AutoModelForCTC.from_config(config, dtype=dtype).eval()
        inputs = torch.randn(shape, dtype=dtype)
    if arguments.compile:
        model.forward = compiled(model.forward)
    return partial(stream, model, inputs, arguments.piece) if name == STREAMED else partial(forward, model, inputs)


def real_time_factors(rows: list[Row]) -> str:
    """A Markdown table of seconds of work for a second of audio."""
    sizes, found = sorted({row.size for row in rows}), {(row.case, row.size): row.median / row.size for row in rows}
    lines = [f"| seconds of audio | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 1) + "|"]
    for case in CASES:
        cells = (f"{found[case, size]:.4f}" if (case, size) in found else "–" for size in sizes)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(["Real-time factor, the seconds of work for a second of audio:", "", *lines, ""])


def processor_time(run: Callable[[], object]) -> float:
    """Seconds that all cores together work, whoever else they work for meanwhile."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    (arguments,) = HfArgumentParser(SpeechArguments).parse_args_into_dataclasses()
    arguments.set_up()
    rows = benchmark(arguments, arguments.seconds, CASES, prepare_run)
    title = f"{arguments.preset}, and recognisers of its sizes; streamed in pieces of {arguments.piece * 10} ms"
    write_results(arguments, "speech", title, "seconds of audio", BASELINE, rows)
    length = 10 * min(arguments.seconds)
    factor = processor_time(prepare_run(arguments, STREAMED, length)) / length
    table = real_time_factors(rows) + f"\n{STREAMED}, {length} seconds, in processor time: {factor:.4f}.\n"
    with (Path(arguments.output_dir) / "speech.md").open("a") as file:
        file.write(f"\n{table}")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
