#!/usr/bin/env bash
# Everything that one NVIDIA GPU can tell in under ten minutes, with nothing to download:
#
#   bench/gpu/run.sh [--tune] [options of bench/gpu/measure.py]
#
# Tests of the Triton kernels on the GPU, times of kernels, of decode steps and prefill with random weights, the server end to
# end. Ends on one table; reports/gpu/results.json holds the rows. OUT=folder puts them elsewhere.
# Packages that the GPU machine lacks can lie as wheels in .wheels (bench/gpu/wheels.sh fetches them where there is a network).
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT="${OUT:-reports/gpu}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
if [ -x .venv/bin/python ] && .venv/bin/python -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    PYTHON=.venv/bin/python
elif compgen -G '.wheels/*.whl' >/dev/null; then
    folder="${TMPDIR:-/tmp}/gpt-oss-gpu-venv"
    [ -x "$folder/bin/python" ] || "$PYTHON" -m venv --system-site-packages "$folder" || exit 1
    "$folder/bin/pip" install -q --disable-pip-version-check --no-index --no-deps .wheels/*.whl || exit 1
    site="$("$PYTHON" -c 'import site; print(site.getsitepackages()[0])')" # of a venv that we were started from
    echo "$site" >"$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')/outer.pth"
    PYTHON="$folder/bin/python"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
status=0
if [ "${1:-}" = --tune ]; then
    shift
    timeout 400 "$PYTHON" -m bench.gpu.tune --models 20b --write 2>&1 | tee "$OUT/tune.txt" || status=1
    cp src/kernels/gpu/launch_configs.json "$OUT/"
fi
timeout 240 "$PYTHON" -m pytest -q tests/kernels -k "gpu and not compiled" -p no:cacheprovider 2>&1 | tee "$OUT/tests.txt" | tail -15 || status=1
"$PYTHON" -m bench.gpu.measure --out "$OUT" "$@" || status=1
exit $status
