#!/usr/bin/env bash
# A question, a stream and a structured answer with curl.
set -euo pipefail
url="${GPTOSS_URL:-http://127.0.0.1:8000}" model="${GPTOSS_MODEL:-gpt-oss-nano}"
ask() { curl -fsS -N -H "Authorization: Bearer ${GPTOSS_API_KEY:-none}" --json "$1" "$url/v1/chat/completions"; }

echo "--- an answer"
ask '{"model": "'"$model"'", "messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 200}'
echo
echo "--- a stream"
ask '{"model": "'"$model"'", "messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 200, "stream": true}' | tail -n 3
echo "--- JSON that follows a schema"
ask '{
  "model": "'"$model"'",
  "messages": [{"role": "user", "content": "Give me a city and its country."}],
  "max_tokens": 200,
  "reasoning_budget": 20,
  "response_format": {
    "type": "json_schema",
    "json_schema": {
      "name": "city",
      "schema": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"], "additionalProperties": false}
    }
  }
}'
echo
