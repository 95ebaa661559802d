#!/usr/bin/env bash
# lm_eval 0.4.13 and a tokenizer API: RemoteTokenizer.eos_token_id may be the id of "<".
#
# One would guess: the id comes from /tokenizer_info (where the server states eos_token_id), or it is checked that the
# text of the token is one token.
# Behaviour: it posts the text of eos_token to /tokenize and takes the first id of the answer. A server whose
# /tokenize reads special tokens as plain text, as one does for text from users, gets "<" as its end token, without an error
# or a warning. bos_token_id and eot_token are found the same way.
# Source: EleutherAI/lm-evaluation-harness, lm_eval/utils.py, RemoteTokenizer.eos_token_id.
# The server below states eos_token "<|return|>", 200002. lm_eval is installed with only what lm_eval.utils imports.
#
# Output seen:
#   /tokenize reads special tokens: eos_token_id 200002
#   /tokenize reads plain text:     eos_token_id 60 ('<')
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 requests==2.34.2 pyyaml==6.0.3 jinja2==3.1.6
"$dir/venv/bin/pip" install -q --no-deps lm_eval==0.4.13
cat >"$dir/show.py" <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lm_eval.utils import RemoteTokenizer

END, END_ID = "<|return|>", 200002


def handler(special):
    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.answer({"eos_token": END, "eos_token_id": END_ID})

        def do_POST(self):
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
            self.answer({"tokens": [END_ID] if special and text == END else list(text.encode())})

        def log_message(self, *args):
            pass

    return Handler


def end_id(special):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(special))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = RemoteTokenizer(f"http://127.0.0.1:{server.server_port}").eos_token_id
    server.shutdown()
    return found


special, plain = end_id(True), end_id(False)
print(f"/tokenize reads special tokens: eos_token_id {special}")
print(f"/tokenize reads plain text:     eos_token_id {plain} ({chr(plain)!r})")
raise SystemExit(0 if (special, plain) == (END_ID, ord("<")) else "the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
