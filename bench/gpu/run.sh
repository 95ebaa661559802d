#!/usr/bin/env bash
# Tests and measures on one NVIDIA GPU in nine minutes, without downloads, the most important first:
#
#   bench/gpu/run.sh [step ...]     # all steps below, or those that are named
#   REHEARSE=1 bench/gpu/run.sh     # the same on a CPU, on a tiny model: whether every step runs to its end
#
# Each step is a process with a limit of its own; what it found is in $OUT (reports/gpu) at once, and none ends the others.
# Packages that the machine lacks can lie as wheels in .wheels (bench/gpu/wheels.sh fetches them where there is a network),
# compiled kernels in .tcache (python -m bench.kernels.dry_run --compile .tcache): both are taken if they are there.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ -e gptoss ] || ln -s src gptoss # where links were not copied
OUT="${OUT:-reports/gpu}"
PYTHON="${PYTHON:-python3}"
REHEARSE="${REHEARSE:-0}"
mkdir -p "$OUT"
rm -f "$OUT"/rows.jsonl "$OUT"/ceilings.json "$OUT"/log.txt
[ -x .venv/bin/python ] && PYTHON=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if compgen -G '.wheels/*.whl' >/dev/null && [ "$REHEARSE" = 0 ]; then
    site="${TMPDIR:-/tmp}/site"
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --upgrade --target "$site" .wheels/*.whl && PYTHONPATH="$site:$PYTHONPATH"
fi
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/tcache}"
[ -d .tcache ] && mkdir -p "$TRITON_CACHE_DIR" && cp -rn .tcache/. "$TRITON_CACHE_DIR"/
if [ "$REHEARSE" = 1 ]; then export REHEARSE TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=; else unset TRITON_INTERPRET; fi
status=0
wanted=" $* "
started=$SECONDS

step() { # name, seconds, command: its output goes to log.txt and, the end of it, here
    local name="$1" limit="$2" from=$SECONDS code
    [ "$wanted" = "  " ] || [[ "$wanted" == *" $name "* ]] || return 0
    [ "$REHEARSE" = 1 ] && limit=600
    shift 2
    timeout -k 5 "$limit" "$@" >"$OUT/step.txt" 2>&1
    code=$?
    { echo "== $name"; cat "$OUT/step.txt"; } >>"$OUT/log.txt"
    tail -n 12 "$OUT/step.txt" | cut -c1-300
    rm -f "$OUT/step.txt"
    echo "== $name: exit code $code, $((SECONDS - from)) s, at $((SECONDS - started)) s"
    [ $code = 0 ] || status=1
}

environment() {
    nvidia-smi -L 2>/dev/null || echo "no nvidia-smi"
    "$PYTHON" -c 'import sys, torch, triton; print(sys.version.split()[0], torch.__version__, triton.__version__)'
    echo "compiled kernels at hand: $(find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l)"
}
export -f environment
export PYTHON

precompile() { # what a start compiles, by many processes, while the first steps run
    "$PYTHON" -m bench.kernels.dry_run --model 20b --max-num-seqs 256 --max-num-batched-tokens 4096 \
        --compile "$TRITON_CACHE_DIR" --workers "$(($(nproc) > 2 ? $(nproc) - 2 : 1))"
}

steps() { "$PYTHON" -m bench.gpu.steps "$1" --model "${2:-20b}" --out "$OUT"; }
export -f steps
export OUT

step environment 40 bash -c environment
[ "$REHEARSE" = 0 ] && { precompile >"$OUT/precompile.txt" 2>&1 & }
step smoke 60 bash -c 'steps smoke'
step decode-20b 90 bash -c 'steps decode 20b'
step profile 60 bash -c 'steps profile 20b'
wait # for the compilations
workers=8
[ "$REHEARSE" = 1 ] && workers=1
tests=(tests/kernels -k "gpu and not compiled and not bench and not dry")
[ "$REHEARSE" = 1 ] && tests=(tests/kernels/test_gpu_sampling.py)
step tests 90 "$PYTHON" -m pytest -q "${tests[@]}" -n $workers -W default -p no:cacheprovider --junitxml "$OUT/tests.xml"
step decode-120b 90 bash -c 'steps decode 120b'
step prefill 60 bash -c 'steps prefill 20b'
step http 160 bash -c 'steps http 20b'
step kernels 60 bash -c 'steps kernels 20b'
if command -v ncu >/dev/null && [ "$REHEARSE" = 0 ]; then
    step ncu 90 ncu --clock-control none --section SpeedOfLight --section WarpStateStats --launch-count 12 \
        --kernel-name 'regex:_route_few|_moe_w|_attention|_qkv|_linear' "$PYTHON" -m bench.gpu.steps kernels --out "$OUT/ncu"
fi
"$PYTHON" -m bench.gpu.steps table --out "$OUT" || status=1
exit $status
