"""`tercet chat`: a conversation, or one answer."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from tercet.cli.engine_flags import add_session_flags
from tercet.cli.sampling_flags import add_sampling_flags
from tercet.errors import EngineError, TercetError

if TYPE_CHECKING:
    from collections.abc import Generator

    from tercet.cli.session import Session
    from tercet.frontend.outputs import RequestOutput

NAME = "chat"
MAX_TOKENS = 1024
PROMPT = "> "
HELP = """\
/reset   forget the conversation
/quit    leave (so does Ctrl-D)
/help    this list
Ctrl-C interrupts an answer; what came of it stays in the conversation."""


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        usage="tercet chat [--prompt TEXT] [--system TEXT] [--model MODEL | --connect ADDRESS] [options]",
        help="talk with a model",
        description="Talk with a model. On a terminal this is a conversation; with --prompt, or with text on "
        "stdin, it is one answer. Answers are printed as they come, figures go to stderr.",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: what the template adds)")
    add_sampling_flags(parser, max_tokens=MAX_TOKENS)
    add_session_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tercet.cli.session import open_session, print_figures, print_stream, read_stdin

    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = read_stdin()
    with open_session(args) as session:
        conversation = Conversation(session, args.system)
        if prompt is None:
            converse(conversation)
        else:
            output = print_stream(conversation.ask(prompt), [])
            print()
            print_figures(output)
    return 0


class Conversation:
    """Messages so far, and the engine that answers."""

    def __init__(self, session: Session, system: str | None) -> None:
        self.session = session
        self._start = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self._start)
        self._tokenizer = session.tokenizer()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._start)

    def ask(self, text: str) -> Generator[RequestOutput, None, None]:
        """Add what the user says and stream the answer, which is not added.

        Raises:
            ValidationError: the template refuses the conversation, or it is too long for the model.
        """
        self.messages.append({"role": "user", "content": text})
        prompt = self._tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=False
        )
        return self.session.stream(str(prompt), add_special_tokens=False)


def converse(conversation: Conversation) -> None:
    """Ask and answer until the user leaves."""
    try:
        import readline  # noqa: F401  (gives input() line editing and recall)
    except ImportError:
        pass
    print(f"{conversation.session.model_name}: /help shows the commands, Ctrl-D leaves.", file=sys.stderr)
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                pass
            case "/quit":
                return
            case "/reset":
                conversation.reset()
            case "/help":
                print(HELP, file=sys.stderr)
            case text if text.startswith("/"):
                print(f"{text.split()[0]} is no command; /help shows them", file=sys.stderr)
            case text:
                _answer(conversation, text)


def _read_line() -> str | None:
    """A line of the user's; empty after Ctrl-C, None at the end of input."""
    try:
        return input(PROMPT)
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        print()
        return None


def _answer(conversation: Conversation, text: str) -> None:
    """One turn. An interrupted answer stays as far as it came; a failed turn leaves no trace."""
    from tercet.cli.session import print_figures, print_stream

    before = list(conversation.messages)
    pieces: list[str] = []
    try:
        output = print_stream(conversation.ask(text), pieces)
        print()
        print_figures(output)
    except KeyboardInterrupt:
        print("\n[interrupted]", file=sys.stderr)
    except EngineError:
        raise
    except TercetError as error:
        conversation.messages = before
        print(f"\n{error} (/reset starts over)", file=sys.stderr)
        return
    conversation.messages.append({"role": "assistant", "content": "".join(pieces)})
