"""`hexad chat`: a conversation on the terminal, or on a pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hexad.cli import note, print_error
from hexad.cli.run import Answer, chat_prompt, check_text, cut_off, generate, write
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
/exit, /quit       leave; so do Ctrl-D, and Ctrl-C twice
"""                begins and ends a message of several lines;
                   a \\ at the end of a line continues it, too
A space before / makes it part of a message.
Ctrl-C during an answer stops the answer.'''

_SETTABLE = [
    field.name
    for field in fields(SamplingParams)
    if field.type in ("float", "int", "int | None") and field.name != "n" and "logprob" not in field.name
]


def chat(model: str, system: str | None, params: SamplingParams, settings: Mapping[str, Any]) -> None:
    """Talks until the input ends or /exit. stdout gets the answers alone, stderr all other words."""
    if sys.stdin is None:
        raise PromptError("There is nobody to talk to, for stdin is closed.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that `check_text` can refuse just this message
    if sys.stdin.isatty():
        edit_lines()

    from hexad.llm import LLM

    with LLM(model, **settings) as llm:
        Conversation(llm, model, params, system).loop()


def edit_lines() -> None:
    """Gives `input` line editing and history, where Python has them, and takes a paste as one input."""
    with contextlib.suppress(ImportError):
        import readline

        if os.environ.get("TERM") != "dumb":  # it takes escape codes
            readline.parse_and_bind("set enable-bracketed-paste on")


class Conversation:
    """A model, the messages so far, and the parameters of the next answer."""

    def __init__(self, llm: LLM, model: str, params: SamplingParams, system: str | None) -> None:
        self.llm = llm
        self.model = model
        self.params = params
        # What was set by hand: greedy params forget top_k and the like, which a later temperature shall find.
        self.chosen: dict[str, Any] = {}
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.left = False

    def loop(self) -> None:
        """Reads and answers until the user leaves."""
        if sys.stdin.isatty():
            note(f"{self.model}. /help lists the commands, Ctrl-D leaves.")
        interrupted = False
        while not self.left:
            try:
                message = read_message()
            except EOFError:
                _end_line()
                return
            except KeyboardInterrupt:
                if interrupted:
                    _end_line()
                    return
                interrupted = True
                note("\nCtrl-C again or Ctrl-D leaves.")
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
        action = _COMMANDS.get(name.lower())
        if action is None:
            note(f"There is no command /{name}; see /help. A space before / makes it a message.")
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
        note("[stopped]" if answer is None else _summary(answer, self.params))

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
            note("There is nothing to answer again.")
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
        note(f"{len(self.messages) // 2} exchanges remain.")

    def _clear(self, _: str) -> None:
        self.messages.clear()
        note("The conversation starts anew.")

    def _system(self, text: str) -> None:
        self.system = check_text(text) or None
        note("The system message is set." if self.system else "There is no system message now.")

    def _set(self, argument: str) -> None:
        if not argument:
            note("\n".join(f"{name} = {getattr(self.params, name)}" for name in _SETTABLE))
            return
        name, _, value = argument.partition(" ")
        if name not in _SETTABLE:
            note(f"There is no parameter {name!r}; /set lists them.")
            return
        chosen = {**self.chosen, name: _parsed(value.strip())}
        self.params = replace(self.params, **chosen)
        self.chosen = chosen
        note(f"{name} = {chosen[name]}")

    def _save(self, file: str) -> None:
        if not file:
            note("Give a file name: /save FILE.")
            return
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            with Path(file).expanduser().open("x", encoding="utf-8") as target:
                json.dump(system + self.messages, target, ensure_ascii=False, indent=2)
        except (OSError, RuntimeError, ValueError) as error:  # the latter: ~nobody/, a NUL in the name
            note(f"The conversation was not saved to {file}: {getattr(error, 'strerror', None) or error}.")
        else:
            note(f"Saved to {file}.")

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
    "quit": Conversation._exit,
}


def read_message() -> str:
    '''The next message on stdin: a line, lines joined by a trailing backslash, a block between """, or lines
    pasted at once.

    A block or a paste begins with a space, so that it is never a command. Raises EOFError where there is no
    message; the end of the input also ends a block.
    '''
    line = _input("> ").rstrip("\n")
    pasted = "\n" in line
    if not line.startswith('"""'):
        while line.endswith("\\"):
            line = line[:-1] + "\n" + _input("… ")
        return " " + line if pasted else line
    lines = [line.removeprefix('"""')]
    with contextlib.suppress(EOFError):
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(_input("… "))
    return " " + "\n".join(lines).rstrip().removesuffix('"""')


def _end_line() -> None:
    """Ends the line of the prompt, that the shell's may start on its own."""
    if sys.stdin.isatty():
        print(file=sys.stderr)


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


def _summary(answer: Answer, params: SamplingParams) -> str:
    parts = [f"{answer.completion_tokens} tokens"]
    if answer.decode_speed is not None:
        parts.append(f"{answer.decode_speed:.1f} tok/s")
    if answer.finish_reason == "length":
        parts.append(cut_off(answer, params, "/set max_tokens"))
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
