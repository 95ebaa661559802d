#!/usr/bin/env bash
# Sets up what is missing and runs the checks:
#
#   ./run_tests.sh [nano|20b|120b] [all|lint|unit|engine|kernels|integration|e2e|p0|performance] [pytest options]
#
# Without arguments everything, on the embedded model. With 20b or 120b only what a live server shows: all, p0 or
# performance; without the checkpoint or the GPU for it that ends at once with exit code 3 and says what is missing.
# A report (results.txt, results.json, servers' logs) is left in reports/<time>-<model>-<suite>.
set -uo pipefail
cd "$(dirname "$0")"
source scripts/env.sh

model=nano
case "${1:-}" in nano | 20b | 120b) model="$1"; shift ;; esac
suite="${1:-all}"
[ $# -gt 0 ] && shift
case "$suite" in
    all | lint | unit | engine | kernels | integration | e2e | p0 | performance) ;;
    *)
        echo "unknown suite '$suite': all, lint, unit, engine, kernels, integration, e2e, p0 or performance" >&2
        exit 2
        ;;
esac
if [ "$model" != nano ] && [[ ! "$suite" =~ ^(all|p0|performance)$ ]]; then
    echo "suite '$suite' runs on small checkpoints of its own; with $model choose all, p0 or performance" >&2
    exit 2
fi
ensure_environment requirements-dev.txt || exit 1

export PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
.venv/bin/python -m src.cli.preflight --model "$model" || exit
status=0

lint() {
    .venv/bin/ruff format --check -q . || { echo "ruff format: run 'make format'"; status=1; }
    .venv/bin/ruff check -q . || status=1
    .venv/bin/mypy --no-error-summary || status=1
}

run() { # pytest arguments
    local report
    report="reports/$(date -u +%Y%m%d-%H%M%S)-$model-$suite"
    .venv/bin/python -m pytest "$@" --model "$model" --report "$report" || status=1
    echo "report: $report/results.txt"
}

case "$suite" in
    lint) lint ;;
    all)
        if [ "$model" = nano ]; then
            lint
            run tests "$@"
        else
            run tests/p0 "$@"
        fi
        ;;
    integration) run tests/engine tests/e2e "$@" ;;
    performance) run tests/p0/test_4_performance.py "$@" ;;
    *) run "tests/$suite" "$@" ;;
esac
exit $status
