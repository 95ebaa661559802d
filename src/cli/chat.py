"""Talks with a model in the terminal.

    gptoss chat [--effort low] [--system TEXT]
    gptoss chat --local --model 20b

Answers are shown as Markdown while they are written, reasoning is dimmed. ctrl-C ends the answer, ctrl-D the program. A
line that ends with a backslash continues on the next; three quotes begin and end a text of several lines. /help lists
the commands.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from gptoss.cli.remote.answer import CHAT, Answer, read
from gptoss.cli.remote.connection import Connection
from gptoss.cli.remote.conversation import Conversation, load, save
from gptoss.cli.remote.errors import OK, CommandError, UsageError
from gptoss.cli.remote.options import add_local_options, add_server_options, command_parser, count, opened_connection
from gptoss.cli.remote.raw_turn import RawTurn
from gptoss.cli.remote.tool_turn import ToolTurn, tools_of
from gptoss.cli.terminal.answer_view import show
from gptoss.cli.terminal.line_input import LineInput, history_path, kept_history
from gptoss.cli.terminal.style import Style, printable

EFFORTS = ("low", "medium", "high")
SWITCH = {"on": True, "off": False, "show": True, "hide": False}
SPECIAL = re.compile(r"<\|[a-z_0-9]+\|>")
SETTINGS = ("system", "effort", "profile", "max_tokens", "temperature", "seed")


def main(argv: list[str] | None = None) -> int:
    parser = options_parser()
    args = parser.parse_args(argv)
    if args.tools and args.raw:
        parser.error("--raw has no meaning with --tools, whose steps are items and not text")
    if not args.root.is_dir():
        raise UsageError(f"--root: there is no folder {str(args.root)!r}")
    with opened_connection(args) as (connection, model):
        return _talk(connection, model, args)


def _talk(connection: Connection, model: str, args: argparse.Namespace) -> int:
    conversation = load(args.load) if args.load else Conversation(model)
    if args.model or args.local or not args.load:
        conversation.model = model
    for name in SETTINGS:
        if getattr(args, name) is not None:
            setattr(conversation, name, getattr(args, name))
    session = ChatSession(connection, conversation, args)
    with kept_history(history_path() if args.history and sys.stdin.isatty() else None):
        return session.run()


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "")
    add_server_options(parser)
    add_local_options(parser)
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--system", metavar="TEXT", help="instructions for the whole conversation")
    parser.add_argument("--effort", choices=EFFORTS, help="reasoning effort")
    parser.add_argument("--profile", help="latency_first, balanced or quality_first")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="of one answer, reasoning included")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--hide-reasoning", action="store_true", help="do not show the reasoning")
    parser.add_argument(
        "--tools",
        metavar="LIST",
        help="browser, python, apply_patch, mcp:LABEL, with commas between: tools of the server",
    )
    parser.add_argument(
        "--approve", choices=("ask", "always", "never"), default="ask", help="MCP calls and patches (default: ask)"
    )
    parser.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="of the files that patches change")
    parser.add_argument("--raw", action="store_true", help="show prompts and answers as Harmony")
    parser.add_argument("--plain", action="store_true", help="show the text as it comes, not as Markdown")
    parser.add_argument("--load", type=Path, metavar="FILE", help="continue a saved conversation")
    parser.add_argument(
        "--history", action=argparse.BooleanOptionalAction, default=True, help="read and keep earlier questions"
    )
    return parser


class ChatSession:
    """The loop of questions, commands and answers."""

    def __init__(self, connection: Connection, conversation: Conversation, args: argparse.Namespace) -> None:
        self._connection = connection
        self._conversation = conversation
        self._raw, self._reasoning, self._markdown = args.raw, not args.hide_reasoning, not args.plain
        self._raw_ids: list[int] = []  # of the prompt that was shown last
        self._tools = tools_of(args.tools) if args.tools else []
        self._tool_names, self._approve, self._root = args.tools or "", args.approve, args.root
        self._previous_ids: list[str] = []  # of the responses of each turn with tools, without a gap
        self._style = Style.of(sys.stdout)
        self._is_interactive = sys.stdin.isatty()
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("list the commands", self._help),
            "/effort": (f"{', '.join(EFFORTS)}: how much the model reasons", self._effort),
            "/profile": ("latency_first, balanced or quality_first; without a name: the server's", self._profile),
            "/system": ("instructions for the whole conversation; without a text: none", self._system),
            "/reasoning": ("show or hide the reasoning", self._set_reasoning),
            "/tools": ("browser,python,apply_patch,mcp:LABEL or off: tools of the server", self._set_tools),
            "/raw": ("on or off: show prompts and answers as Harmony", self._set_raw),
            "/retry": ("answer the last question again", self._retry),
            "/clear": ("begin a new conversation with the same settings", self._clear),
            "/save": ("FILE: write conversation and settings", self._save),
            "/load": ("FILE: continue a saved conversation", self._load),
            "/quit": ("end; so does ctrl-D", self._quit),
        }

    def run(self) -> int:
        """Reads until the end of the input. Returns the exit code."""
        lines = LineInput(self._style, list(self._commands))
        if self._is_interactive:
            self._note(f"{self._conversation.model} at {self._connection.url}; /help lists the commands, ctrl-D ends")
        while True:
            try:
                text, is_block = lines.read()
                if text:
                    self._handle(text, is_block=is_block)
            except EOFError:
                sys.stdout.write("\n" if self._is_interactive else "")
                return OK
            except KeyboardInterrupt:
                sys.stdout.write("\n")
            except UnicodeDecodeError:
                self._note("error: that is not UTF-8 text", "red")
            except CommandError as error:
                if not self._is_interactive:
                    raise
                self._note(f"error: {error}", "red")

    def _handle(self, text: str, *, is_block: bool) -> None:
        """Runs a command or asks a question. Raises CommandError; EOFError ends the program."""
        if is_block or not text.startswith("/"):
            self._ask(text)
            return
        name, _, rest = text.partition(" ")
        if name not in self._commands:
            raise UsageError(f"no command {name}: /help lists them; a text between three quotes may begin with a slash")
        self._commands[name][1](rest.strip())

    def _ask(self, text: str) -> None:
        """Shows the answer as it is written and keeps it. ctrl-C keeps what is there. Raises CommandError."""
        self._conversation.add_user(text)
        answer = Answer()
        try:
            if self._tools:
                self._show_with_tools(answer)
            elif self._raw:
                self._show_raw(answer)
            else:
                self._show(answer)
        except KeyboardInterrupt:
            self._previous_ids.clear()
            self._note("\nstopped", "yellow")
        finally:
            self._conversation.add_answer(answer.text, answer.reasoning)
        if answer.finish_reason == "length":
            self._note("the answer ends here because it reached its limit of tokens", "yellow")

    def _show(self, answer: Answer) -> None:
        with closing(self._connection.stream(CHAT, self._conversation.body())) as events:
            show(read(events, answer), self._style, reasoning=self._reasoning, markdown=self._markdown)

    def _show_with_tools(self, answer: Answer) -> None:
        earlier = self._previous_ids[-1] if self._previous_ids else None
        turn = ToolTurn(self._connection, self._conversation, self._tools, self._root, self._agrees, earlier, answer)
        try:
            show(turn.pieces(), self._style, reasoning=self._reasoning, markdown=self._markdown)
        except BaseException:
            self._previous_ids.clear()
            raise
        if turn.previous_id is not None:
            self._previous_ids.append(turn.previous_id)

    def _agrees(self) -> bool:
        """Returns whether the person agrees to the step that was shown last; ctrl-D is no."""
        if self._approve != "ask" or not self._is_interactive:
            return bool(self._approve == "always")
        try:
            return input("allow it? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            sys.stdout.write("\n")
            return False

    def _set_tools(self, text: str) -> None:
        if text:
            self._tools, self._tool_names = ([], "") if text == "off" else (tools_of(text), text)
            self._previous_ids.clear()
        self._note(f"tools: {self._tool_names or 'none'}")

    def _show_raw(self, answer: Answer) -> None:
        turn = RawTurn(self._connection, self._conversation.body(), self._raw_ids)
        turn.answer = answer
        sys.stdout.write(self._style(printable(turn.prompt_text()), "dim"))
        self._raw_ids = turn.prompt_ids
        with closing(turn.pieces()) as pieces:
            for piece in pieces:
                sys.stdout.write(SPECIAL.sub(lambda found: self._style(found[0], "cyan"), printable(piece)))
                sys.stdout.flush()
        sys.stdout.write("\n")

    def _help(self, _: str) -> None:
        width = max(map(len, self._commands)) + 2
        self._note("\n".join(f"{name:{width}}{text}" for name, (text, _) in self._commands.items()))

    def _effort(self, text: str) -> None:
        if text not in EFFORTS:
            now = self._conversation.effort or "the profile's"
            raise UsageError(f"/effort takes {', '.join(EFFORTS)}; now it is {now}")
        self._conversation.effort = text
        self._note(f"effort {text}")

    def _profile(self, text: str) -> None:
        self._conversation.profile = text or None
        self._note(f"profile {text or 'of the server'}")

    def _system(self, text: str) -> None:
        self._conversation.system = text or None
        self._note("instructions set" if text else "no instructions")

    def _set_reasoning(self, text: str) -> None:
        self._reasoning = self._switch("/reasoning", text, ("show", "hide"))
        self._note(f"reasoning is {'shown' if self._reasoning else 'hidden'}")

    def _set_raw(self, text: str) -> None:
        if self._tools:
            raise UsageError("/raw has no meaning with tools: /tools off ends them")
        self._raw = self._switch("/raw", text, ("on", "off"))
        self._raw_ids = []
        self._note(f"raw mode is {'on' if self._raw else 'off'}")

    def _switch(self, name: str, text: str, choices: tuple[str, str]) -> bool:
        if text not in choices:
            raise UsageError(f"{name} takes {' or '.join(choices)}")
        return SWITCH[text]

    def _retry(self, _: str) -> None:
        question = self._conversation.take_back()
        self._previous_ids[-1:] = []
        if question is None:
            raise UsageError("there is no question yet")
        self._ask(question)

    def _clear(self, _: str) -> None:
        self._conversation.messages.clear()
        self._raw_ids = []
        self._previous_ids.clear()
        self._note("a new conversation")

    def _save(self, text: str) -> None:
        if not text:
            raise UsageError("/save takes the name of a file")
        save(self._conversation, Path(text).expanduser())
        self._note(f"saved in {text}")

    def _load(self, text: str) -> None:
        if not text:
            raise UsageError("/load takes the name of a file")
        self._conversation = load(Path(text).expanduser())
        self._raw_ids = []
        self._previous_ids.clear()
        self._note(f"{len(self._conversation.messages)} messages with {self._conversation.model}")

    def _quit(self, _: str) -> None:
        raise EOFError

    def _note(self, text: str, colour: str = "dim") -> None:
        sys.stdout.write(self._style(printable(text), colour) + "\n")
        sys.stdout.flush()
