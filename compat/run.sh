#!/usr/bin/env bash
# Other projects' suites against a running server:  compat/run.sh langchain|schemathesis [URL]
# Their clients, in Python and JavaScript (node must be on PATH), against a running server of nano:  compat/run.sh clients [URL]
# Claude Code, headless (node and npm must be on PATH; the API is started in the test's process):  compat/run.sh claude-code
# Codex, headless (npm must be on PATH; the API runs in the test's process):  compat/run.sh codex
# openai-agents and the AI SDK with the code interpreter (npm must be on PATH; the API runs in the test's process):  compat/run.sh tools
# Evaluations with inspect-ai and BFCL's data, against a running server of nano:  compat/run.sh eval [URL]
# Ray Serve, with a local cluster:  compat/run.sh ray
# The gateway smg in front of two servers:  compat/run.sh gateway
# The examples that need packages of others, against a running server of nano:  compat/run.sh examples [URL]
# The page in a browser (chromium must be on PATH; starts a server of its own):  compat/run.sh page
# All of them, long, against a server that this starts:  compat/run.sh nightly
set -euo pipefail
cd "$(dirname "$0")/.."
suite="${1:?langchain, schemathesis, clients, examples, claude-code, codex, tools, page, eval, ray, gateway or nightly}"
export TEST_SERVER_URL="${2:-http://127.0.0.1:8000}"
venv=.venv-compat
if [[ "$suite" != claude-code && "$suite" != codex && "$suite" != tools && "$suite" != ray && "$suite" != eval && "$suite" != gateway && compat/requirements.txt -nt "$venv/.installed" ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -qq --disable-pip-version-check -r compat/requirements.txt
    touch "$venv/.installed"
fi
case "$suite" in
    langchain) "$venv/bin/python" -m pytest -c /dev/null --rootdir compat -o asyncio_mode=auto \
        -o asyncio_default_fixture_loop_scope=session -o asyncio_default_test_loop_scope=session compat/test_langchain.py -q ;;
    schemathesis)
        # OpenAI's requests to what this server serves (compat/reduce_openapi.py), for a model called gpt-oss-nano; what has no
        # limit of its own is written until the context ends: --max-model-len 2048 keeps that short
        "$venv/bin/schemathesis" run compat/openai.yaml --url "$TEST_SERVER_URL/v1" --checks not_a_server_error \
            --phases fuzzing --max-examples "${EXAMPLES:-1000}" --generation-deterministic --request-timeout 120
        ;;
    clients)
        "$venv/bin/python" -m pytest -c /dev/null --rootdir compat -o asyncio_mode=auto \
            -o asyncio_default_fixture_loop_scope=function compat/test_pydantic_ai.py compat/test_anthropic.py -q
        mkdir -p .venv-node
        cp compat/package.json compat/clients.test.mjs .venv-node/
        (cd .venv-node && npm install --silent --no-fund --no-audit --no-package-lock && node --test clients.test.mjs)
        ;;
    examples)
        "$venv/bin/pip" install -qq --disable-pip-version-check "gradio>=6,<7"
        mkdir -p .venv-node
        (cd .venv-node && { [ -d node_modules/openai ] || npm install --silent --no-fund --no-audit --no-package-lock --no-save "openai@^6"; })
        "$venv/bin/python" -m pytest -c /dev/null --rootdir compat -p no:asyncio compat/test_examples.py -q
        ;;
    claude-code)
        npm install --silent --no-fund --no-audit --no-package-lock --ignore-scripts --prefix .venv-node/claude \
            "@anthropic-ai/claude-code@${CLAUDE_CODE_VERSION:-2.1.332}"
        CLAUDE_CODE="$(ls "$PWD"/.venv-node/claude/node_modules/@anthropic-ai/claude-code-linux-*/claude | head -1)" \
            .venv/bin/python -m pytest compat/test_claude_code.py -q
        ;;
    codex)
        npm install --silent --no-fund --no-audit --no-package-lock --prefix .venv-node/codex \
            "@openai/codex@${CODEX_VERSION:-0.171.0}"
        CODEX="$PWD/.venv-node/codex/node_modules/.bin/codex" .venv/bin/python -m pytest compat/test_codex.py -q
        ;;
    tools)
        [[ -f .venv-agents/.installed ]] || { python3 -m venv .venv-agents && .venv-agents/bin/pip install -qq \
            --disable-pip-version-check "openai-agents>=0.24,<1" && touch .venv-agents/.installed; }
        npm install --silent --no-fund --no-audit --no-package-lock --prefix .venv-node/ai "ai@^6" "@ai-sdk/openai@^3"
        AGENTS_PYTHON="$PWD/.venv-agents/bin/python" AI_SDK="$PWD/.venv-node/ai" \
            .venv/bin/python -m pytest compat/test_code_interpreter.py -q
        ;;
    eval)
        if [[ requirements-eval.txt -nt .venv-eval/.installed ]]; then
            python3 -m venv .venv-eval
            .venv-eval/bin/pip install -qq --disable-pip-version-check -r requirements-eval.txt pytest
            touch .venv-eval/.installed
        fi
        .venv-eval/bin/python -m pytest -c /dev/null --rootdir compat compat/test_eval.py -q
        ;;
    ray)
        if [[ requirements-ray.txt -nt .venv-ray/.installed ]]; then
            python3 -m venv .venv-ray
            .venv-ray/bin/pip install -qq --disable-pip-version-check -r requirements-ray.txt
            # what the server needs is in .venv
            (cd .venv/lib/python3*/site-packages && pwd) > "$(echo .venv-ray/lib/python3*/site-packages)/server.pth"
            touch .venv-ray/.installed
        fi
        PYTHONPATH=. RAY_USAGE_STATS_ENABLED=0 .venv-ray/bin/python -m pytest -c /dev/null --rootdir compat compat/test_ray.py -q
        ;;
    gateway)
        [[ -x .venv-smg/bin/smg ]] || { python3 -m venv .venv-smg && .venv-smg/bin/pip install -qq "smg==${SMG_VERSION:-1.13.0}"; }
        SMG="$PWD/.venv-smg/bin/smg" .venv/bin/python -m pytest compat/test_gateway.py -q
        ;;
    page)
        mkdir -p reports
        TEST_SERVER_PYTHON="$PWD/.venv/bin/python" \
            "$venv/bin/python" -m pytest -c /dev/null --rootdir compat -p no:asyncio compat/test_page.py -q
        ;;
    nightly)
        url=http://127.0.0.1:18917 log="$(mktemp)" failed=0
        .venv/bin/python src/server.py --model nano --port 18917 --cpu-kv-cache-gib 0.2 --max-model-len 2048 >"$log" 2>&1 &
        server=$!
        trap 'kill $server 2>/dev/null; wait $server || true; rm -f "$log"' EXIT
        for _ in $(seq 120); do
            curl -fsS -o /dev/null "$url/ready" 2>/dev/null && break
            kill -0 $server 2>/dev/null || break
            sleep 1
        done
        curl -fsS -o /dev/null "$url/ready" || { cat "$log"; exit 1; }
        for part in langchain schemathesis clients examples claude-code codex tools page eval ray gateway; do
            EXAMPLES=10000 compat/run.sh $part "$url" || { echo "compat $part: FAILED"; failed=1; }
        done
        exit $failed
        ;;
    *) echo "unknown suite '$suite'" >&2; exit 2 ;;
esac
