"""Forward passes or training steps of image models over the resolution.

    python examples/benchmarks/images.py --output_dir images

The Token Statistics Transformer beside transformers' ViT (sdpa) of the same width, depth and patches, with random
weights and images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from benchmark_utils import BenchmarkArguments, benchmark, compiled, write_results
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from modeling_sumagg.configuration import preset_path


BASELINE = "ViT"
MODELS = ["ToST", BASELINE]


@dataclass
class ImageArguments(BenchmarkArguments):
    preset: str = field(default="tost-small-12-p16", metadata={"help": "A vision preset of this package."})
    resolutions: list[int] = field(
        default_factory=lambda: [224, 384, 512, 768, 1024], metadata={"help": "Height and width in pixels."}
    )
    batch_size: int = 1
    training: bool = field(default=False, metadata={"help": "Forward, backward and AdamW instead of forward."})

    def __post_init__(self):
        super().__post_init__()
        patch_size = AutoConfig.from_pretrained(preset_path(self.preset)).patch_size
        if any(resolution <= 0 or resolution % patch_size for resolution in self.resolutions):
            raise ValueError(f"`resolutions` must be positive multiples of {patch_size}, got {self.resolutions}.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")


def configuration(arguments: ImageArguments, name: str, resolution: int) -> PreTrainedConfig:
    """The preset at this resolution, or a ViT of its sizes with heads of 64 channels."""
    config = AutoConfig.from_pretrained(preset_path(arguments.preset), image_size=resolution)
    if name == "ToST":
        return config
    return ViTConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.hidden_size // 64,
        intermediate_size=4 * config.hidden_size,
        patch_size=config.patch_size,
        image_size=resolution,
        num_labels=config.num_labels,
    )


def forward(model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    with torch.inference_mode():
        model(pixel_values=pixel_values)


def training_step(model: PreTrainedModel, pixel_values: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    labels = torch.zeros(len(pixel_values), dtype=torch.long, device=pixel_values.device)
    model(pixel_values=pixel_values, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def prepare_run(arguments: ImageArguments, name: str, resolution: int) -> Callable[[], object]:
    """What to time of one model."""
    dtype = getattr(torch, arguments.dtype)
    config = configuration(arguments, name, resolution)
    with torch.device(arguments.device):
        model = AutoModelForImageClassification.from_config(config, dtype=dtype).train(arguments.training)
        pixel_values = torch.randn(arguments.batch_size, 3, resolution, resolution, dtype=dtype)
    if arguments.compile:
        model.forward = compiled(model.forward)
    if arguments.training:
        return partial(training_step, model, pixel_values, torch.optim.AdamW(model.parameters()))
    return partial(forward, model, pixel_values)


def main() -> None:
    (arguments,) = HfArgumentParser(ImageArguments).parse_args_into_dataclasses()
    arguments.set_up()
    rows = benchmark(arguments, arguments.resolutions, MODELS, prepare_run)
    work = "Training step" if arguments.training else "Forward"
    title = f"{work} of {arguments.preset} and a ViT of its sizes, batches of {arguments.batch_size}"
    write_results(arguments, "images", title, "pixels a side", BASELINE, rows)


if __name__ == "__main__":
    main()
