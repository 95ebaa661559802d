#!/usr/bin/env bash
# Sets up what is missing and serves:  ./run_server.sh [flags]    (./run_server.sh --help shows the flags)
set -euo pipefail
cd "$(dirname "$0")"
source scripts/env.sh
ensure_environment requirements.txt
exec .venv/bin/python src/server.py "$@"
