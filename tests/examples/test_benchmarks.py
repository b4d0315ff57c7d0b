"""The benchmarks: what they time is what they say, and each command writes its table."""

import functools
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from modeling_sumagg import SumAggSpeechConfig


TINY_MODEL = ["--hidden_size", "64", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--vocab_size", "96"]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))


@pytest.fixture
def run_benchmark(tmp_path, monkeypatch, capsys):
    """Runs `main` of a benchmark and returns its results and what it printed."""

    def run(module, name: str, *arguments: str) -> tuple[dict, str]:
        command = [*arguments, "--repetitions", "2", "--device", "cpu", "--output_dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [name, *command])
        module.main()
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        printed = capsys.readouterr().out
        assert (tmp_path / f"{name}.md").read_text() in printed
        return json.loads((tmp_path / f"{name}.json").read_text()), printed

    return run


def test_cases_are_timed_in_turn_and_once_before():
    from benchmark_utils import time_interleaved

    calls = []
    seconds = time_interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3, "cpu")
    assert calls == ["a", "b"] * 4
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_table_of_medians_spreads_and_ratios():
    from benchmark_utils import Row, markdown_table

    rows = [
        Row("ours", 16, [1.0, 2.0, 9.0], peak_bytes=2**20),
        Row("peer", 16, [0.006, 0.004, 0.008], peak_bytes=4 * 2**20),
        Row("ours", 1024, [5e-5, 5e-5]),
    ]
    assert (rows[0].median, rows[0].spread) == (2.0, 2.0)
    assert markdown_table(rows, "tokens", "peer") == (
        "Time, and how many times faster than peer:\n"
        "\n| tokens | 16 | 1 024 |\n|---|---|---|\n"
        "| ours | 2.00 s ± 100%, 0.00 × | 50.0 µs ± 0% |\n"
        "| peer | 6.00 ms ± 17% | – |\n"
        "\nPeak memory, and its ratio to that of peer:\n"
        "\n| tokens | 16 | 1 024 |\n|---|---|---|\n"
        "| ours | 1 MiB, 0.25 × | – |\n"
        "| peer | 4 MiB | – |\n"
    )


def test_the_picture_shows_ratios_quartiles_and_several_ticks_in_one_colour_a_model(tmp_path, monkeypatch):
    import benchmark_utils
    from benchmark_utils import COLORS, Row, plot

    figures: list[Figure] = []
    monkeypatch.setattr(benchmark_utils, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    rows = [
        Row(case, size, [seconds, 3 * seconds, 2 * seconds], peak_bytes=size * 2**20)
        for size in (16, 128)
        for case, seconds in (("SumAgg", 0.01), ("GPT-2", 0.02 * size), ("matrix products of SumAgg", 0.01))
    ]
    plot(rows, "title", "tokens", "GPT-2", tmp_path / "a.png")
    ratios, times, memory = figures[0].axes
    assert [axes.get_ylabel() for axes in (ratios, times, memory)] == [
        "times as fast as GPT-2",
        "time (median and quartiles)",
        "peak memory (MiB)",
    ]
    for axes in figures[0].axes:
        drawn = {bars.get_label(): bars for bars in axes.containers}
        assert {name: bars.lines[0].get_color() for name, bars in drawn.items()} == {
            "SumAgg": COLORS["SumAgg"],
            "GPT-2": COLORS["GPT-2"],
            "matrix products of SumAgg": COLORS["SumAgg"],
        }
        low, high = axes.get_ylim()
        assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 4
        assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "128"]
    assert ratios.containers[0].lines[0].get_ydata() == pytest.approx([32, 256])
    (bars,) = times.containers[0].lines[2]
    # Of 10, 20 and 30 ms.
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.015, 0.025])

    plot([Row("SumAgg", 16, [0.01]), Row("SumAgg", 32, [0.0101])], "title", "tokens", "GPT-2", tmp_path / "a.png")
    (times,) = figures[1].axes
    low, high = times.get_ylim()
    assert high > 4 * low


def test_the_decode_state_is_counted_and_drawn_in_the_place_of_memory(tmp_path, monkeypatch):
    import benchmark_utils
    from benchmark_utils import Row, markdown_table, plot, tensor_bytes
    from transformers import DynamicCache, LlamaConfig

    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    for layer in range(2):
        cache.update(*torch.zeros(2, 1, 3, 5, 7), layer)
    # Keys and values of 2 layers, float32.
    assert tensor_bytes({"cache": cache}) == tensor_bytes([cache, cache]) == 2 * 2 * 3 * 5 * 7 * 4

    figures: list[Figure] = []
    monkeypatch.setattr(benchmark_utils, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    rows = [Row("GPT-2", size, [0.1], peak_bytes=2**30, state_bytes=size * 2**20) for size in (16, 32)]
    plot(rows, "title", "tokens", "GPT-2", tmp_path / "a.png")
    assert figures[0].axes[-1].get_ylabel() == "decode state (MiB)"
    assert "| GPT-2 | 16 MiB | 32 MiB |" in markdown_table(rows, "tokens", "GPT-2")


def test_every_case_of_a_benchmark_has_a_colour():
    import document_classifier
    import images
    import language_models
    import operators
    import speech
    from benchmark_utils import COLORS

    models = language_models.configurations(language_models.LanguageModelArguments("out", "cpu"), 2)
    assert {*models, *images.MODELS, *document_classifier.MODELS, *speech.CASES} <= set(COLORS)
    arguments = operators.OperatorArguments("out", device="cuda", compile=True)
    assert {case for name in operators.OPERATORS for case in operators.cases(arguments, name)} <= set(COLORS)
    # No two models of one picture share one.
    for names in (models, images.MODELS, document_classifier.MODELS, speech.CASES):
        assert len({COLORS[name] for name in names}) == len(names)


def test_a_case_that_would_take_too_long_is_left_out(capsys):
    from benchmark_utils import BenchmarkArguments, benchmark

    arguments = BenchmarkArguments("out", device="cpu", repetitions=1, seconds_limit=0.0, memory=False)
    rows = benchmark(arguments, [4, 2], ["a"], lambda arguments, name, size: lambda: None)
    assert [(row.case, row.size) for row in rows] == [("a", 2)]
    assert "a is left out at 4" in capsys.readouterr().out


@pytest.mark.parametrize("grows, sizes", [(True, [2]), (False, [2, 2**20])])
def test_what_does_not_grow_is_let_in_at_every_size(grows, sizes):
    from benchmark_utils import BenchmarkArguments, benchmark

    arguments = BenchmarkArguments("out", device="cpu", repetitions=1, seconds_limit=1.0, memory=False)
    rows = benchmark(arguments, [2, 2**20], ["a"], lambda *_: lambda: time.sleep(1e-4), grows=grows)
    assert [row.size for row in rows] == sizes


@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
def test_every_compiled_function_counts_its_versions_alone(monkeypatch):
    from benchmark_utils import compiled

    # Dynamo counts; a C++ compiler for each version has no part in it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    class Scale(torch.nn.Module):
        def __init__(self, factor: int):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return self.factor * x

    scales = [Scale(factor) for factor in range(1, 4)]
    for scale in scales:
        scale.forward = compiled(scale.forward)
    assert [scale(torch.ones(1)).item() for scale in scales] == [1, 2, 3]


def _allocating(arguments, name: str, size: int):
    """Writes how many bytes the process held at most before the run to the file of the name."""
    before = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    Path(name).write_text(str(int(before) * 1024))
    return lambda: torch.ones(size, dtype=torch.uint8)


def test_peak_memory_is_that_of_one_run_in_its_own_process(tmp_path):
    from benchmark_utils import BenchmarkArguments, run_once

    here = torch.ones(2**30, dtype=torch.uint8)  # must not count
    peak = run_once(BenchmarkArguments("out", "cpu"), _allocating, str(tmp_path / "before"), 2**28).peak_bytes
    before = int((tmp_path / "before").read_text())
    assert peak - before == pytest.approx(2**28, rel=0.1)
    assert before < here.numel()


@pytest.mark.parametrize("training", [False, True])
def test_the_floor_is_the_matrix_products_of_the_model(training):
    import language_models

    work = "training" if training else "prefill"
    arguments = language_models.LanguageModelArguments(
        "out", "cpu", work=work, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=96
    )
    floor = language_models.prepare_run(arguments, "matrix products of ToST", 48)
    model = language_models.build_model(arguments, "ToST", 48)
    input_ids = language_models.random_tokens(arguments, 48)

    def counted(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        counts = counter.get_flop_counts()["Global"]
        return sum(
            count for operator, count in counts.items() if operator in (torch.ops.aten.mm, torch.ops.aten.addmm)
        )

    def whole() -> None:
        if training:
            model(input_ids=input_ids, labels=input_ids).loss.backward()
        else:
            language_models.prefill(model, input_ids)

    assert counted(floor) == counted(whole) > 0


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["SumAgg", "SumAgg, full attention last", "ToST", "RWKV"])
def test_decoding_is_greedy(name, static):
    import language_models

    arguments = language_models.LanguageModelArguments(
        "out", "cpu", work="decode", hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=96
    )
    model = language_models.build_model(arguments, name, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    decoder = language_models.Decoder(model, 16, 64, static)
    decoder.run()
    # The context is 16 zeros, and the first token timed comes after one zero more.
    context = torch.zeros(1, 17, dtype=torch.long)
    expected = model.generate(context, max_new_tokens=language_models.STEPS, do_sample=False, eos_token_id=-1)
    assert decoder.token.item() == expected[0, -1].item()


@pytest.mark.parametrize("name", ["SumAgg", "SumAgg, full attention last", "GPT-2"])
def test_a_prompt_in_pieces_is_the_prompt_at_once(name):
    import language_models

    arguments = language_models.LanguageModelArguments(
        "out", "cpu", work="prefill", hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=96
    )
    model = language_models.build_model(arguments, name, 16)
    input_ids = torch.randint(96, (2, 13))
    expected = language_models.prefill(model, input_ids)
    torch.testing.assert_close(language_models.prefill(model, input_ids, 5).logits, expected.logits)


@pytest.mark.parametrize("work", ["prefill", "decode", "training"])
def test_language_models(run_benchmark, work):
    import language_models

    results, printed = run_benchmark(
        language_models,
        work,
        "--work",
        work,
        "--lengths",
        "8",
        "16",
        "--batch_size",
        "2",
        "--models",
        "SumAgg",
        "GPT-2",
        "--memory",
        "False",
        *TINY_MODEL,
    )
    assert [(row["case"], row["size"]) for row in results["rows"]] == [
        (name, size) for size in (8, 16) for name in ("SumAgg", "GPT-2")
    ]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in results["rows"])
    assert "| GPT-2 |" in printed


def test_images(run_benchmark):
    import images

    arguments = ["--preset", "tost-tiny-12-p16", "--resolutions", "32", "64", "--memory", "False"]
    results, _ = run_benchmark(images, "images", *arguments)
    assert [(row["case"], row["size"]) for row in results["rows"]] == [
        (name, size) for size in (32, 64) for name in ("ToST", "ViT")
    ]


def test_speech(tmp_path, monkeypatch, capsys):
    import speech

    sizes = {"num_mel_bins": 80, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    SumAggSpeechConfig(**sizes).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(speech, "preset_path", lambda name: str(tmp_path / name))
    arguments = ["--preset", "tiny", "--seconds", "1", "2", "--piece", "30", "--repetitions", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["speech", *arguments, "--memory", "False", "--output_dir", str(tmp_path)])
    speech.main()
    rows = json.loads((tmp_path / "speech.json").read_text())["rows"]
    assert [(row["case"], row["size"]) for row in rows] == [(case, size) for size in (1, 2) for case in speech.CASES]
    table = (tmp_path / "speech.md").read_text()
    for case in speech.CASES:
        factors = [row["median"] / row["size"] for row in rows if row["case"] == case]
        assert f"| {case} | {factors[0]:.4f} | {factors[1]:.4f} |" in table
    assert table.partition("\n\n")[0] in capsys.readouterr().out


def test_document_classifier(run_benchmark):
    import document_classifier

    arguments = ["--lengths", "8", "--batch_size", "2", "--memory", "False"]
    results, _ = run_benchmark(document_classifier, "document_classifier", *arguments)
    assert [row["case"] for row in results["rows"]] == ["sum", "attention", "attention, with its weights"]


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("language_models", {"work": "train"}, "`work` must be one of"),
        ("language_models", {"models": ["GPT-5"]}, "GPT-5"),
        ("language_models", {"lengths": [1]}, "`lengths` must be at least 2"),
        ("language_models", {"dtype": "int8"}, "`dtype` must be"),
        ("language_models", {"repetitions": 0}, "`repetitions` must be at least 1, got 0"),
        ("language_models", {"threads": 0}, "`threads` must be at least 1, got 0"),
        ("images", {"resolutions": [100]}, "multiples of 16"),
        ("images", {"batch_size": 0}, "`batch_size` must be at least 1"),
        ("document_classifier", {"lengths": [0]}, "must be at least 1"),
        ("speech", {"piece": 0}, "`seconds` and `piece` must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(module, arguments, message):
    imported = __import__(module)
    names = {"language_models": "LanguageModelArguments", "images": "ImageArguments", "speech": "SpeechArguments"}
    name = names.get(module, "ClassifierArguments")
    with pytest.raises(ValueError, match=message):
        getattr(imported, name)("out", **arguments)
