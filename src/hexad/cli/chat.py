"""`hexad chat`: a conversation on the terminal, or on a pipe."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hexad.cli import print_error
from hexad.cli.run import Answer, chat_prompt, check_text, generate, tolerant_stdout, write
from hexad.errors import HexadError, PromptError
from hexad.params import SamplingParams

if TYPE_CHECKING:
    from hexad.llm import LLM

_HELP = '''\
/regen             answer the last message again
/undo              take back the last message and its answer
/clear             forget the conversation; the system message stays
/system TEXT       set the system message; without TEXT remove it
/set NAME VALUE    set a sampling parameter; without NAME VALUE show them all
/save FILE         write the conversation to a new JSON file
/exit              leave; so do Ctrl-D, and Ctrl-C twice
"""                begins and ends a message of several lines; a \\ at the end of a line continues it
A space before / makes it part of a message. Ctrl-C during an answer stops the answer.'''

_SETTABLE = [field.name for field in fields(SamplingParams) if field.name != "ignore_eos"]


def chat(model: str, system: str | None, params: SamplingParams, settings: Mapping[str, Any]) -> None:
    """Talks until the input ends or /exit. stdout gets the answers alone, stderr all other words."""
    tolerant_stdout()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that `check_text` can refuse just this message
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` its line editing and history)

    from hexad.llm import LLM

    with LLM(model, **settings) as llm:
        Conversation(llm, model, params, system).loop()


class Conversation:
    """A model, the messages so far, and the parameters of the next answer."""

    def __init__(self, llm: LLM, model: str, params: SamplingParams, system: str | None) -> None:
        self.llm = llm
        self.model = model
        self.params = params
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.left = False

    def loop(self) -> None:
        """Reads and answers until the user leaves."""
        if sys.stdin.isatty():
            _note(f"{self.model}. /help lists the commands, Ctrl-D leaves.")
        interrupted = False
        while not self.left:
            try:
                message = read_message()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                _note("\nCtrl-C again or Ctrl-D leaves.")
                continue
            interrupted = False
            try:
                if message.startswith("/"):
                    self.command(message)
                elif message.strip():
                    self.say(check_text(message.strip()))
            except HexadError as error:
                print_error(error)

    def command(self, line: str) -> None:
        """Carries out a /command."""
        name, _, argument = line[1:].strip().partition(" ")
        action = _COMMANDS.get(name)
        if action is None:
            _note(f"There is no command /{name}; /help lists them. A space before / makes it a message.")
        else:
            action(self, argument.strip())

    def say(self, text: str) -> None:
        """Streams the answer to a message. A message that gets none is not kept.

        Raises PromptError if the conversation has outgrown the context.
        """
        self.messages.append({"role": "user", "content": text})
        answer = None
        try:
            answer = self._answer()
        except PromptError as error:
            if len(self.messages) > 1:
                error.add_note("/undo takes back the last exchange, /clear the whole conversation.")
            raise
        finally:
            if answer is None or not answer.text:
                self.messages.pop()
            else:
                self.messages.append({"role": "assistant", "content": answer.text})
        _note("[stopped]" if answer is None else _summary(answer))

    def _answer(self) -> Answer | None:
        """None if it was interrupted before it had anything to show."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        token_ids = chat_prompt(self.llm, system + self.messages, self.model)
        answer = None
        with _interruptions() as stopped, contextlib.suppress(KeyboardInterrupt):
            answer = generate(self.llm, token_ids, self.params, show=write, stopped=stopped)
        write("\n")
        return answer

    def _help(self, _: str) -> None:
        print(_HELP, file=sys.stderr)

    def _regen(self, _: str) -> None:
        if not self.messages:
            _note("There is nothing to answer again.")
            return
        exchange = self.messages[-2:]
        del self.messages[-2:]
        remaining = len(self.messages)
        try:
            self.say(exchange[0]["content"])
        finally:
            if len(self.messages) == remaining:  # no new answer came, so the old one stays
                self.messages += exchange

    def _undo(self, _: str) -> None:
        del self.messages[-2:]
        _note(f"{len(self.messages) // 2} exchanges remain.")

    def _clear(self, _: str) -> None:
        self.messages.clear()

    def _system(self, text: str) -> None:
        self.system = check_text(text) or None

    def _set(self, argument: str) -> None:
        if not argument:
            _note("\n".join(f"{name} = {getattr(self.params, name)}" for name in _SETTABLE))
            return
        name, _, value = argument.partition(" ")
        if name not in _SETTABLE:
            _note(f"There is no parameter {name!r}; there are {', '.join(_SETTABLE)}.")
            return
        self.params = replace(self.params, **{name: _parsed(value.strip())})

    def _save(self, file: str) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            with Path(file).expanduser().open("x", encoding="utf-8") as target:
                json.dump(system + self.messages, target, ensure_ascii=False, indent=2)
        except OSError as error:
            _note(f"The conversation was not saved: {error}.")

    def _exit(self, _: str) -> None:
        self.left = True


_COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "help": Conversation._help,
    "clear": Conversation._clear,
    "system": Conversation._system,
    "undo": Conversation._undo,
    "regen": Conversation._regen,
    "set": Conversation._set,
    "save": Conversation._save,
    "exit": Conversation._exit,
}


def read_message() -> str:
    '''The next message on stdin: a line, lines joined by a trailing backslash, or a block between """.

    Raises EOFError where there is none; the end of the input also ends a block.
    '''
    line = _input("> ")
    if not line.startswith('"""'):
        while line.endswith("\\"):
            line = line[:-1] + "\n" + _input("… ")
        return line
    lines = [line.removeprefix('"""')]
    with contextlib.suppress(EOFError):
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(_input("… "))
    # A space in front, so that a block is never a command.
    return " " + "\n".join(lines).rstrip().removesuffix('"""')


def _input(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")


@contextlib.contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """While the block runs Ctrl-C only sets a flag, which the yielded function reads, so that it does not
    cut through a step of the engine. A second one, of a user in a hurry, raises KeyboardInterrupt."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _summary(answer: Answer) -> str:
    parts = [f"{answer.completion_tokens} tokens"]
    if answer.decode_speed is not None:
        parts.append(f"{answer.decode_speed:.1f} tok/s")
    if answer.finish_reason == "length":
        parts.append("cut off: max_tokens or the context is used up")
    elif answer.finish_reason == "abort":
        parts.append("stopped")
    return f"[{', '.join(parts)}]"


def _parsed(value: str) -> Any:
    """None, an int or a float; SamplingParams refuses anything else by name."""
    if value.lower() == "none":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def _note(text: str) -> None:
    """A word beside the answer: on stderr, dim on a terminal."""
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr)
