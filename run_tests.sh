#!/usr/bin/env bash
# Sets up what is missing and runs the checks:  ./run_tests.sh [all|lint|unit|engine|kernels|e2e|p0] [pytest options]
set -uo pipefail
cd "$(dirname "$0")"
source scripts/env.sh
ensure_environment requirements-dev.txt || exit 1

suite="${1:-all}"
[ $# -gt 0 ] && shift
export PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
status=0

lint() {
    .venv/bin/ruff format --check -q . || { echo "ruff format: run 'make format'"; status=1; }
    .venv/bin/ruff check -q . || status=1
    .venv/bin/mypy --no-error-summary || status=1
}

case "$suite" in
    all)
        lint
        .venv/bin/python -m pytest tests "$@" || status=1
        ;;
    lint) lint ;;
    unit|engine|kernels|e2e|p0) .venv/bin/python -m pytest "tests/$suite" "$@" || status=1 ;;
    *)
        echo "unknown suite '$suite': all, lint, unit, engine, kernels, e2e or p0" >&2
        exit 2
        ;;
esac
exit $status
