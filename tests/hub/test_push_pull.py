"""Over HTTP: push, pull without the package, pin a revision, and break an upload off."""

import sys
import threading
from pathlib import Path

import pytest
from checkpoints import save_with_outputs, text_config
from hub_server import HubServer
from testing import build, tost_config

from modeling_sumagg import SumAggForCausalLM, ToSTForImageClassification
from modeling_sumagg.publishing.hub import create_model_card


@pytest.fixture
def hub():
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_push_pull_pin_and_break_off(tmp_path, hub, clean_python, start_script, run_script):
    root = tmp_path / "checkpoints"
    model = build(SumAggForCausalLM, text_config(lm_head_bias=False, tie_word_embeddings=False))
    save_with_outputs(model, root / "SumAggForCausalLM")
    images = build(ToSTForImageClassification, tost_config())
    save_with_outputs(images, root / "ToSTForImageClassification")
    create_model_card(
        model,
        model_id="user/language",
        dataset_type="random",
        dataset_name="random tokens",
        steps=0,
        hyperparameters={"seed": 0},
        metrics={"perplexity": 61.0},
        baselines={"uniform": {"perplexity": 61.0}},
    ).save(root / "card.md")

    push = start_script(sys.executable, "push.py", root, HF_ENDPOINT=hub.endpoint)
    printed = []
    for line in push.stdout:
        printed.append(line)
        if line == "third\n":
            break
    else:
        raise AssertionError("".join(printed)[-6000:])
    revisions = [line.split()[1] for line in printed if line.startswith("revision")]
    repository = hub.repositories["user/language"]
    before = list(repository.commits)
    hub.stall.set()
    push.stdin.write("\n")
    push.stdin.flush()
    assert hub.stalled.wait(60)
    push.kill()
    push.wait()
    hub.stall.clear()
    assert repository.commits == before

    assert {path.name for path in Path(root / "SumAggForCausalLM").glob("*.py")} <= set(repository.commits[-1][1])
    output = run_script(clean_python, "pull.py", root, *revisions, HF_ENDPOINT=hub.endpoint)
    assert output.endswith("ok\n")
    downloads = [
        path.rpartition("/")[2] for method, path in hub.requests if (method, path[:14]) == ("GET", "/user/language")
    ]
    # The two revisions have other weights and the same code, which its ETag tells.
    assert downloads.count("model.safetensors") == 2
    assert sum(name.endswith("_modeling_sumagg.py") for name in downloads) == 1
