#!/usr/bin/env bash
# llguidance 1.9.1: whether the token that ends the text is counted depends on the method and on how the grammar ends.
#
# One would guess: for a whole legal text with its end token, validate_tokens and try_consume_tokens return the number of
# tokens that consume_token takes, whether the grammar names the end token (`<[261]>`) or leaves it to the matcher.
# Behaviour: consume_token takes both tokens under both grammars. validate_tokens counts the end token only if the grammar
# does not name it. try_consume_tokens counts it under neither, and has stopped before it only if the grammar does
# not name it. A server that checks a draft of several tokens at once and compares with the length refuses legal text.
# Source: guidance-ai/llguidance, parser/src/tokenparser.rs and parser/src/matcher.rs; the Python signatures only
# say "how many of the tokens in the list can be committed" and "how many were successfully consumed".
#
# Output seen:
#   start: "a"           consume_token [True, True]  validate_tokens 2  try_consume_tokens 1, stopped True
#   start: "a" <[261]>   consume_token [True, True]  validate_tokens 1  try_consume_tokens 1, stopped False
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q llguidance==1.9.1
cat >"$dir/show.py" <<'PY'
from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")
text = [ord("a"), tokenizer.eos_token]


def calls(grammar):
    def new():
        return LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)

    single, block = new(), new()
    return [single.consume_token(t) for t in text], new().validate_tokens(text), block.try_consume_tokens(text), block.is_stopped()


seen = []
for grammar in ('start: "a"', f'start: "a" <[{tokenizer.eos_token}]>'):
    one, valid, tried, stopped = calls(grammar)
    print(f"{grammar:<20} consume_token {one}  validate_tokens {valid}  try_consume_tokens {tried}, stopped {stopped}")
    seen.append((one, valid, tried, stopped))
expected = [([True, True], 2, 1, True), ([True, True], 1, 1, False)]
raise SystemExit(0 if seen == expected else "the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
