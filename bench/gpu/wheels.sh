#!/usr/bin/env bash
# Fetches what a GPU machine with torch, triton and transformers but without a network still needs, into .wheels:
#
#   bench/gpu/wheels.sh [3.12]      # its Python version
set -euo pipefail
cd "$(dirname "$0")/../.."
version="${1:-3.12}"
packages=(
    msgspec pyzmq llguidance openai-harmony fastapi starlette uvicorn httptools sse-starlette pydantic pydantic-core
    typing-inspection annotated-types annotated-doc structlog limits deprecated wrapt
    prometheus-client psutil pytest-asyncio opentelemetry-api
)
# what such a machine has already: a test compares both lists with what the packages require
machine=(
    accelerate anyio attrs certifi click filelock h11 httpcore httpx huggingface-hub hypothesis idna jinja2 numpy
    nvidia-ml-py packaging pluggy pytest pytest-timeout pytest-xdist pyyaml regex requests safetensors tokenizers torch
    tqdm transformers triton typing-extensions uvloop
)
: "${machine[@]}"
pins=()
for name in "${packages[@]}"; do # the versions that are tested
    pins+=("$(grep -i "^${name//-/[-_]}==" requirements-dev.lock || echo "$name")")
done
platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for glibc in 39 35 34 31 28 27 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$version" \
    --implementation cp "${platforms[@]}" -d .wheels "${pins[@]}"
du -sh .wheels
