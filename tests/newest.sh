#!/usr/bin/env bash
# Generation, Trainer, PEFT, saving and Hub tests with whatever is newest today. Its last line says what that was and how
# many tests passed; it exits with 0 whatever they say, for a release of tomorrow must not block a change of today.
cd "$(dirname "$0")/.."
python3 -m venv .venv-newest
newest=(transformers accelerate peft datasets evaluate huggingface_hub tokenizers)
if .venv-newest/bin/pip install -q torch==2.13.0 && .venv-newest/bin/pip install -q -e '.[test]' &&
    .venv-newest/bin/pip install -q --upgrade --upgrade-strategy only-if-needed "${newest[@]}"; then
    .venv-newest/bin/python -m pytest -n 2 --dist worksteal -q tests/generation tests/test_trainer.py tests/test_peft.py \
        tests/hub tests/versions tests/test_heads.py tests/test_cache.py | tee .venv-newest/tests.log
    counts=$(tail -1 .venv-newest/tests.log | tr -d '=')
else
    counts="could not be installed"
fi
versions=$(.venv-newest/bin/python - "${newest[@]}" <<'PY'
import importlib.metadata, sys
print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in sys.argv[1:]))
PY
)
passed=$(grep -o '[0-9]* passed' <<<"$counts" || echo "0 passed")
failed=$(grep -oE '[0-9]+ (failed|error)' <<<"$counts" | awk '{sum += $1} END {print sum + 0}')
echo "newest: $versions: $passed, $failed failed"
exit 0
