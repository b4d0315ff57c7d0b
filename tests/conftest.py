import os
import signal
from collections import Counter, defaultdict

import pytest


if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread for each, and for the processes that it starts.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Here and in `seed`, since the process that hands out the tests runs none: the import would take it ten seconds.
    import torch

    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts a command in the background so; the tests of Ctrl-C need it, here and in their own processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)

CONFORMANCE_MARKERS = (
    "accelerate_tests",
    "all_flash_attn_test",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_fsdp_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config):
    for marker in CONFORMANCE_MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' tests")


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker waits for them at the end."""
    longest = ("test_every_step_", "test_in_the_interpreter")
    items.sort(key=lambda item: not item.name.startswith(longest))


def pytest_terminal_summary(terminalreporter):
    """One line per model class: how many of transformers' tests passed, were skipped and failed."""
    counts = defaultdict(Counter)
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if "tests/conformance/test_conformance.py::" in report.nodeid:
                counts[report.nodeid.split("::")[1]]["failed" if outcome == "error" else outcome] += 1
    for name, count in sorted(counts.items()):
        line = ", ".join(f"{outcome} {count[outcome]}" for outcome in ("passed", "skipped", "failed"))
        terminalreporter.write_line(f"{name.removesuffix('Conformance')}: {line}")


@pytest.fixture(autouse=True)
def seed():
    from transformers import set_seed

    set_seed(0)


@pytest.fixture(autouse=True)
def signals():
    """Scripts over streams take signals for their process; the next test finds them as they were."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(descriptor)
