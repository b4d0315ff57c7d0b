"""The exported page in a real browser: the tokens of `generate`, in constant memory, with a state that is kept."""

import json
import shutil

import pytest
import torch
from browser import HAS_CHROMIUM, Browser
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from modeling_sumagg import SumAggConfig, SumAggForCausalLM
from modeling_sumagg.publishing.export import export_folder


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not HAS_CHROMIUM, reason="needs `chromium` and `chromedriver`: apt-get install chromium chromium-driver"
    ),
    pytest.mark.skipif(not shutil.which("npm"), reason="needs `npm`, which fetches onnxruntime-web"),
]
CONTROL, ENTER, ESCAPE = "\ue009", "\ue007", "\ue00c"
PROMPT = "for name in names:\n    größe = read("


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder of a page, and the model and tokenizer that it was made from."""
    root = tmp_path_factory.mktemp("page")
    bpe = ByteLevelBPETokenizer()
    text = [PROMPT, str(__doc__)] * 3
    bpe.train_from_iterator(text, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save(str(root / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(root / "tokenizer.json"), eos_token="<|endoftext|>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "sliding_window": 8}
    layers = ["summation", "sliding_attention", "summation"]
    config = SumAggConfig(vocab_size=len(tokenizer), layer_types=layers, eos_token_id=None, **sizes)
    model = SumAggForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    export_folder(root / "model", root / "web", to="web")
    return root / "web", model, tokenizer


@pytest.fixture
def browser(page, tmp_path):
    with Browser(page[0], tmp_path) as browser:
        browser.wait(lambda: browser.text("status").startswith("Ready") or "Loading" not in browser.text("status"))
        assert browser.text("status") == "Ready. Nothing leaves this device."
        browser.run(
            "window.tokens = []; document.addEventListener('tokens', (event) => window.tokens.push(...event.detail))"
        )
        yield browser


def begin(browser, prompt: str = PROMPT) -> None:
    browser.run("document.getElementById('prompt').value = arguments[0]", prompt)


def written(browser, count: int) -> list[int]:
    """The tokens, once there are so many; the page pauses."""
    browser.wait(lambda: browser.run("return tokens.length") >= count)
    browser.press(ESCAPE)
    browser.wait(lambda: browser.text("status") == "Paused.")
    return browser.run("return tokens")


def test_the_tokens_of_generate_by_keyboard_and_a_state_that_is_kept(page, browser, tmp_path):
    _, model, tokenizer = page
    begin(browser)
    browser.press(CONTROL, ENTER)
    tokens = written(browser, 200)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=len(tokens) + 100, do_sample=False)[0]
    expected = expected[prompt["input_ids"].shape[1] :].tolist()
    assert tokens == expected[: len(tokens)]
    shown = browser.text("text")
    # The last character may wait for the rest of its bytes.
    assert tokenizer.decode(prompt["input_ids"][0].tolist() + tokens).startswith(shown.rstrip("\ufffd"))
    assert browser.text("length") == str(prompt["input_ids"].shape[1] + len(tokens))

    browser.click("save")
    browser.wait(lambda: list(tmp_path.glob("state-*.safetensors")))
    (state,) = tmp_path.glob("state-*.safetensors")
    browser.click("again")
    assert browser.text("text") == ""
    # Another text in between, and the same continuation.
    begin(browser, "x")
    browser.run("window.tokens.length = 0")
    browser.click("write")
    written(browser, 20)
    browser.run("document.getElementById('file').hidden = false")
    browser.type("file", str(state))
    browser.wait(lambda: browser.text("status").startswith("Restored"))
    assert browser.text("text") == shown
    browser.run("window.tokens.length = 0")
    browser.click("write")
    after = written(browser, 50)[:100]
    assert after == expected[len(tokens) : len(tokens) + len(after)]


def test_a_state_of_another_model_is_refused(page, browser, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    begin(browser)
    browser.click("write")
    written(browser, 5)
    browser.click("save")
    browser.wait(lambda: list(tmp_path.glob("state-*.safetensors")))
    (state,) = tmp_path.glob("state-*.safetensors")
    with safe_open(state, framework="pt") as file:
        about = json.loads(file.metadata()["page"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert {"logits", *(part["name"] for part in json.loads((page[0] / "manifest.json").read_text())["state"])} == set(
        tensors
    )
    for name, metadata in {"other": {"page": json.dumps({**about, "fingerprint": "0"})}, "none": {}}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
    browser.run("document.getElementById('file').hidden = false")
    for name, message in {
        "other": "The state is of another model.",
        "none": "holds no state that this page saved",
    }.items():
        browser.type("file", str(tmp_path / f"{name}.safetensors"))
        browser.wait(lambda message=message: message in browser.text("status"))


def test_memory_is_constant(browser):
    begin(browser)
    browser.click("write")
    memory = []
    # V8 first collects the buffers of many steps at once. The memory rises until then, after some 12,000 steps.
    for count in (14_000, 24_000):
        browser.wait(lambda count=count: browser.run("return tokens.length") >= count)
        memory.append(browser.memory())
    # Each step makes a new state and new logits, together 10 KiB. A page that kept them would grow by 100 MiB.
    assert memory[1] - memory[0] < 50 * 2**20


def test_it_fits_a_phone(page, tmp_path):
    with Browser(page[0], tmp_path, size=(390, 844)) as browser:
        browser.wait(lambda: browser.text("status").startswith("Ready"))
        width, page_width, height = browser.run(
            "return [innerWidth, document.documentElement.scrollWidth, document.getElementById('write').offsetHeight]"
        )
        assert page_width <= width
        # A thumb needs 44 pixels.
        assert height >= 44
