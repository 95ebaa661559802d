#!/usr/bin/env bash
# Sets up what is missing and serves:  ./run_server.sh [flags]    (./run_server.sh --help shows the flags)
set -euo pipefail
trap '' HUP # reads the keys again once the server is up; until then it is held back
cd "$(dirname "$0")"
source scripts/env.sh
ensure_environment requirements.txt
exec .venv/bin/python src/server.py "$@"
