#!/usr/bin/env bash
# Sets up what is missing and runs the checks:
#
#   ./run_tests.sh [nano|20b|120b] [all|lint|quick|engine|kernels|integration|e2e|p0|performance] [pytest options]
#
# Without arguments everything, on the embedded model. With 20b or 120b only what a live server shows: all, p0 or
# performance; without the checkpoint or the GPU for it that ends at once with exit code 3 and says what is missing.
# A report (results.txt, results.json, servers' logs) is left in reports/<time>-<model>-<suite>; all of them leave four.
set -uo pipefail
cd "$(dirname "$0")"
source scripts/env.sh

model=nano
case "${1:-}" in nano | 20b | 120b) model="$1"; shift ;; esac
suite="${1:-all}"
[ $# -gt 0 ] && shift
[ "$suite" = unit ] && suite=quick # its name before
case "$suite" in
    all | lint | quick | unit | engine | kernels | integration | e2e | p0 | performance) ;;
    *)
        echo "unknown suite '$suite': all, lint, quick, engine, kernels, integration, e2e, p0 or performance" >&2
        exit 2
        ;;
esac
if [ "$model" != nano ] && [[ ! "$suite" =~ ^(all|p0|performance)$ ]]; then
    echo "suite '$suite' runs on small checkpoints of its own; with $model choose all, p0 or performance" >&2
    exit 2
fi
ensure_environment requirements-dev.txt || exit 1

# bytecode is kept, as the tests start many servers
export PYTHONDONTWRITEBYTECODE= TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
.venv/bin/python -m gptoss.cli.preflight --model "$model" || exit
status=0

lint() {
    .venv/bin/ruff format --check -q . || { echo "ruff format: run 'make format'"; status=1; }
    .venv/bin/ruff check -q . || status=1
    .venv/bin/mypy --no-error-summary || status=1
}

report() { # name -> its folder
    echo "reports/$(date -u +%Y%m%d-%H%M%S)-$model-$1"
}

cores=() # to run on, as a command's prefix

run() { # folder of the report, pytest arguments
    "${cores[@]}" .venv/bin/python -m pytest "${@:2}" --model "$model" --report "$1" || status=1
    echo "report: $1/results.txt"
}

halves() { # of the cores: prefixes that keep a command on each
    first_half=() second_half=()
    command -v taskset >/dev/null || return 0
    read -r one other < <(.venv/bin/python -c "
import os
cores = sorted(os.sched_getaffinity(0))
half = (len(cores) + 1) // 2
print(*(','.join(map(str, part)) for part in (cores[:half], cores[half:] or cores)))")
    first_half=(taskset -c "$one") second_half=(taskset -c "$other")
}

all() { # pytest options. Servers take long to start and wait much, so that the engine's tests can run beside them
    local rest=(tests/engine tests/kernels) folder
    folder="$(report engine)"
    if [ -e /dev/nvidia0 ]; then # which each would want for itself
        run "$folder" "${rest[@]}" "$@"
        run "$(report e2e)" tests/e2e "$@"
        run "$(report quick)" tests/quick "$@"
    else
        output="$(mktemp)"
        halves # threads of both on all cores would wait for one another
        cores=("${first_half[@]}")
        "${second_half[@]}" .venv/bin/python -m pytest "${rest[@]}" "$@" --model "$model" --report "$folder" >"$output" 2>&1 &
        beside=$!
        trap 'kill $beside 2>/dev/null; rm -f "$output"' EXIT
        run "$(report e2e)" tests/e2e "$@"
        run "$(report quick)" tests/quick "$@"
        wait $beside || status=1
        beside=
        cores=()
        cat "$output"
        echo "report: $folder/results.txt"
    fi
    run "$(report p0)" tests/p0 "$@" # alone, as it measures
}

case "$suite" in
    lint) lint ;;
    all)
        if [ "$model" = nano ]; then
            lint
            all "$@"
        else
            run "$(report p0)" tests/p0 "$@"
        fi
        ;;
    integration) run "$(report "$suite")" tests/engine tests/e2e "$@" ;;
    performance) run "$(report "$suite")" tests/p0/test_4_performance.py "$@" ;;
    *) run "$(report "$suite")" "tests/$suite" "$@" ;;
esac
exit $status
