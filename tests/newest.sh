#!/usr/bin/env bash
# What depends on other libraries, with the newest of them that pip finds today, whatever constraints.txt says. PyTorch
# alone is held: its newest builds are for CUDA. Ends with one line that counts; fails where a test does.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
newest=(transformers accelerate peft datasets evaluate huggingface_hub tokenizers)

versions="not installed" counts="0 passed, 1 failed" status=1
if python3 -m venv "$folder" && "$folder/bin/pip" install -q -e '.[test]' "${newest[@]}" --upgrade torch==2.13.0; then
    versions=$("$folder/bin/python" - "${newest[@]}" <<'PYTHON'
import sys
from importlib.metadata import version

print(", ".join(f"{name} {version(name)}" for name in sys.argv[1:]))
PYTHON
    )
    "$folder/bin/python" -m pytest -n 2 --dist worksteal --junitxml "$folder/report.xml" \
        tests/versions tests/generation tests/test_trainer.py tests/test_peft.py tests/test_cache.py tests/hub \
        tests/examples/test_run_clm.py && status=0 || status=$?
    counts=$("$folder/bin/python" - "$folder/report.xml" <<'PYTHON'
import sys
from xml.etree import ElementTree

suite = ElementTree.parse(sys.argv[1]).getroot().find("testsuite")
tests, failed, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
print(f"{tests - failed - errors - skipped} passed, {failed + errors} failed")
PYTHON
    ) || counts="0 passed, 1 failed"
fi
echo "newest: $versions: $counts"
exit "$status"
