#!/usr/bin/env bash
# Writes requirements.lock and requirements-dev.lock: the versions in .venv of everything each file needs.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python scripts/lock.py requirements.txt > requirements.lock
.venv/bin/python scripts/lock.py requirements-dev.txt > requirements-dev.lock
