#!/usr/bin/env bash
# Sets up what is missing and runs the checks:
#
#   ./run_tests.sh [nano|20b|120b] [SUITE] [pytest options]
#
#   all          the default: lint and every suite below, on the embedded model
#   lint         format, ruff, mypy
#   quick        no process, no server, no torch: under 30 s (also: unit, its former name)
#   engine, kernels, e2e, p0   the folders of tests/ with these names
#   integration  several processes or a server: tests/integration, tests/engine and tests/e2e
#   performance  the measurements of p0
#   nightly      all with the long forms, then soak, chaos and other projects' clients (hours)
#
# With 20b or 120b only what a live server shows: all, p0 or performance; without the checkpoint or the GPU for it that
# ends at once with exit code 3 and a message that names what is missing.
# Each part leaves a report (results.txt, results.json, servers' logs) in reports/<time>-<model>-<part>.
set -uo pipefail
cd "$(dirname "$0")"
source scripts/env.sh

model=nano
case "${1:-}" in nano | 20b | 120b) model="$1"; shift ;; esac
suite="${1:-all}"
[ $# -gt 0 ] && shift
[ "$suite" = unit ] && suite=quick
case "$suite" in
    all | lint | quick | engine | kernels | integration | e2e | p0 | performance | nightly) ;;
    *)
        echo "unknown suite '$suite': all, lint, quick, engine, kernels, integration, e2e, p0, performance or nightly" >&2
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
reports=()   # folders
outcomes=()  # lines "name: passed" of what leaves no report
started=$SECONDS
# Whole files go to one worker more than there are cores, as tests of servers wait much; at most to four. With a GPU there
# is one worker, as each would want all of its memory.
workers="$(.venv/bin/python -c 'import os; print(min(4, 1 + len(os.sched_getaffinity(0))))' 2>/dev/null || echo 2)"
[ -e /dev/nvidia0 ] && workers=0
side_by_side=(-n "$workers" --dist loadfile --no-loadscope-reorder)

step() { # name, command: runs it and notes how it ended
    local name="$1"
    shift
    if "$@"; then outcomes+=("$name: passed"); else outcomes+=("$name: FAILED") status=1; fi
}

lint() {
    local good=0
    .venv/bin/ruff format --check -q . || { echo "ruff format: run 'make format'"; good=1; }
    .venv/bin/ruff check -q . || good=1
    .venv/bin/mypy --no-error-summary || good=1
    return $good
}

run() { # name of the report, pytest arguments
    local folder
    folder="reports/$(date -u +%Y%m%d-%H%M%S)-$model-$1"
    .venv/bin/python -m pytest "${@:2}" --model "$model" --report "$folder" || status=1
    reports+=("$folder")
}

everything() { # pytest options. The longest files come first, so that no worker is left with one at the end
    run suite "${side_by_side[@]}" tests/e2e tests/engine tests/kernels tests/integration tests/quick "$@"
    run p0 tests/p0 "$@" # alone, as it measures
}

nightly() {
    step lint lint
    everything --nightly --any-requests 10000 --timeout 3600 "$@"
    step soak .venv/bin/python bench/soak.py --minutes 20
    step chaos .venv/bin/python bench/chaos.py
    step "other projects' clients" compat/run.sh nightly
}

case "$suite" in
    lint) step lint lint ;;
    all)
        if [ "$model" = nano ]; then
            step lint lint
            everything "$@"
        else
            run p0 tests/p0 "$@"
        fi
        ;;
    nightly) nightly "$@" ;;
    integration) run "$suite" "${side_by_side[@]}" tests/e2e tests/engine tests/integration "$@" ;;
    performance) run "$suite" tests/p0/test_4_performance.py "$@" ;;
    p0) run "$suite" tests/p0 "$@" ;;
    *) run "$suite" "${side_by_side[@]}" "tests/$suite" "$@" ;;
esac
.venv/bin/python -m tests.support.summary "$((SECONDS - started))" "${outcomes[@]/#/outcome=}" "${reports[@]}" || status=1
exit $status
