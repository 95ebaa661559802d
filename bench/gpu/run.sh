#!/usr/bin/env bash
# Tests and measures on one NVIDIA GPU in nine minutes, without downloads, the most important first:
#
#   bench/gpu/run.sh [step ...]     # all steps below, or those that are named
#   REHEARSE=1 bench/gpu/run.sh     # the same on a CPU, on a tiny model: whether every step runs to its end
#
# Each step is a process with a limit of its own; what it found is in $OUT (reports/gpu) at once, and none ends the others.
# A step that is named replaces its own earlier results and keeps those of the others; a whole run moves what is in $OUT to
# $OUT/earlier-DATE first. The steps: packages environment smoke decode-20b profile tests decode-120b prefill http kernels ncu
# SECONDS_FOR_ALL (540; in a rehearsal 7200): the time of all steps together.
# Packages that the machine lacks can lie as wheels in .wheels (bench/gpu/wheels.sh fetches them where there is a network),
# compiled kernels in .tcache (python -m bench.kernels.dry_run --gpu-run --compile .tcache): both are taken if they are there.
set -uo pipefail
known=(packages environment smoke decode-20b profile tests decode-120b prefill http kernels ncu)
for name in "$@"; do
    case "$name" in -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac
    [[ " ${known[*]} " == *" $name "* ]] || { echo "run.sh: unknown step '$name'; the steps are: ${known[*]}" >&2; exit 2; }
done
REHEARSE="${REHEARSE:-0}"
total="${SECONDS_FOR_ALL:-540}"
[ "$REHEARSE" = 1 ] && total="${SECONDS_FOR_ALL:-7200}"
[[ "$total" =~ ^[0-9]+$ ]] || { echo "run.sh: SECONDS_FOR_ALL is '$total', expected whole seconds" >&2; exit 2; }
cd "$(dirname "$0")/../.." || exit 2
[ -e gptoss ] || ln -s src gptoss # where links were not copied
OUT="${OUT:-reports/gpu}"
[ -n "${PYTHON:-}" ] || { PYTHON=python3 && [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; }
mkdir -p "$OUT" || exit 2
if [ $# = 0 ] && [ -e "$OUT/rows.jsonl" ]; then
    earlier="$OUT/earlier-$(date -u +%Y%m%dT%H%M%S)"
    mkdir -p "$earlier" || exit 2
    for name in rows.jsonl ceilings.json results.json log.txt http.txt server.txt precompile.txt tests.xml; do
        [ ! -e "$OUT/$name" ] || mv "$OUT/$name" "$earlier/" || exit 2
    done
    echo "== the earlier results are in $earlier"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/tcache}"
[ -d .tcache ] && mkdir -p "$TRITON_CACHE_DIR" && cp -rn .tcache/. "$TRITON_CACHE_DIR"/
if [ "$REHEARSE" = 1 ]; then export REHEARSE TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=; else unset TRITON_INTERPRET; fi
status=0
wanted=" $* "
started=$SECONDS

step() { # name, seconds, command: its output goes to log.txt and, the end of it, here
    local name="$1" limit="$2" from=$SECONDS code left
    [ "$wanted" = "  " ] || [[ "$wanted" == *" $name "* ]] || return 0
    left=$((total - 10 - (SECONDS - started)))
    [ "$REHEARSE" = 1 ] && limit=600
    ((limit > left)) && limit=$left
    shift 2
    note begin "$name"
    if ((limit < 5)); then
        echo "== $name: no time left" | tee -a "$OUT/log.txt"
        note end "$name" --code -1
        status=1
        return 0
    fi
    STEP="$name" timeout -k 5 "$limit" "$@" >"$OUT/step.txt" 2>&1
    code=$?
    { echo "== $name"; cat "$OUT/step.txt"; echo "== exit code $code"; } >>"$OUT/log.txt"
    tail -n 12 "$OUT/step.txt" | cut -c1-300
    rm -f "$OUT/step.txt"
    echo "== $name: exit code $code, $((SECONDS - from)) s, at $((SECONDS - started)) s"
    note end "$name" --code "$code" --seconds $((SECONDS - from))
    [ $code = 0 ] || status=1
}

note() { "$PYTHON" -m bench.gpu.rows "$@" --out "$OUT" || status=1; }

packages() { # a folder for .wheels; without it kernels and model still run
    if [ "$REHEARSE" = 1 ] || ! compgen -G '.wheels/*.whl' >/dev/null; then echo "none"; return; fi
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --upgrade --target "$SITE" .wheels/*.whl && ls "$SITE" | wc -l
}

environment() {
    nvidia-smi -L 2>/dev/null || echo "no nvidia-smi"
    "$PYTHON" -c 'import sys, torch, triton; print(sys.version.split()[0], torch.__version__, triton.__version__)'
    echo "compiled kernels at hand: $(find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l)"
}

precompile() { # what the starts compile, by many processes, while the first steps run
    exec nice timeout 90 "$PYTHON" -m bench.kernels.dry_run --gpu-run --compile "$TRITON_CACHE_DIR" \
        --workers "$(($(nproc) > 2 ? $(nproc) - 2 : 1))"
}

steps() { "$PYTHON" -m bench.gpu.steps "$1" --model "${2:-20b}" --out "${3:-$OUT}"; }

SITE="${TMPDIR:-/tmp}/site"
export PYTHON OUT SITE
export -f environment packages steps
tests=(tests/kernels -n 8 -k "gpu and not compiled and not bench and not dry")
[ "$REHEARSE" = 1 ] && tests=(tests/kernels/test_gpu_sampling.py)

# the limits together are less than SECONDS_FOR_ALL (a test adds them up), the first decode figures come within two minutes
step packages 25 bash -c packages
PYTHONPATH="$SITE:$PYTHONPATH"
step environment 10 bash -c environment
if [ "$REHEARSE" = 0 ]; then
    precompile >"$OUT/precompile.txt" 2>&1 &
    trap "kill $! 2>/dev/null" EXIT # it may outlast the steps
fi
step smoke 45 bash -c 'steps smoke'
step decode-20b 60 bash -c 'steps decode 20b'
step profile 35 bash -c 'steps profile 20b'
step tests 75 "$PYTHON" -m pytest -q "${tests[@]}" -W default -p no:cacheprovider --junitxml "$OUT/tests.xml"
step decode-120b 70 bash -c 'steps decode 120b'
step prefill 40 bash -c 'steps prefill 20b'
step http 105 bash -c 'steps http 20b'
step kernels 25 bash -c 'steps kernels 20b'
profiler=()
if command -v ncu >/dev/null && [ "$REHEARSE" = 0 ]; then
    profiler=(ncu --clock-control none --section SpeedOfLight --section WarpStateStats --launch-count 16
        --kernel-name 'regex:_route_few|_moe_w|_attention|_qkv|_linear')
fi
step ncu 35 "${profiler[@]}" "$PYTHON" -m bench.gpu.steps once --out "${TMPDIR:-/tmp}/gpu-once"
timeout 30 "$PYTHON" -m bench.gpu.steps table --out "$OUT" --of "$@" || status=1
exit $status
