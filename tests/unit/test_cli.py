"""The `hexad` command: wrong input, conversations with a scripted model, then SmolLM2."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.gguf_writer import llama, write

from hexad.cli.chat import Conversation, read_message
from hexad.errors import PromptError
from hexad.outputs import CompletionOutput, FinishReason, RequestOutput
from hexad.params import RequestOutputKind, SamplingParams

COMMAND = [sys.executable, "-m", "hexad"]


def hexad(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    settings = {"stdin": subprocess.DEVNULL} | settings if "input" not in settings else settings
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, encoding="utf-8", timeout=120, **settings
    )


class Terminal:
    """A command whose stdin, stdout and stderr are one terminal."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.fd, end = pty.openpty()
        decisive = ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE")
        inherited = {name: value for name, value in os.environ.items() if name not in decisive}
        environment = {**inherited, "TERM": "xterm", "COLUMNS": "80"} | environment
        self.process = subprocess.Popen(
            command, stdin=end, stdout=end, stderr=end, env=environment, start_new_session=True
        )
        os.close(end)
        self.text = ""

    def type(self, text: str, *, after: str = "") -> None:
        """Sends the keys once the screen shows `after`."""
        while after not in self.text:
            self._read()
        os.write(self.fd, text.encode())

    def finish(self) -> str:
        """What was on the screen when the command had ended."""
        try:
            while self._read():
                pass
        except OSError:  # EIO: nobody has the other end any more
            pass
        self.process.wait(60)
        os.close(self.fd)
        return self.text.replace("\r\n", "\n")

    def _read(self) -> bytes:
        if not select.select([self.fd], [], [], 60)[0]:
            self.process.kill()
            pytest.fail(f"Nothing follows {self.text!r}.")
        data = os.read(self.fd, 4096)
        self.text += data.decode(errors="replace")
        return data


# --- what needs no model ---


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run"],
        ["chat"],
        ["inspect"],
        ["pull"],
        ["list"],
        ["run-batch"],
        ["bench"],
        ["bench", "latency"],
        ["bench", "throughput"],
    ],
    ids=lambda arguments: " ".join(arguments) or "hexad",
)
def test_every_command_has_help(arguments: list[str]) -> None:
    result = hexad(*arguments, "--help")
    assert result.returncode == 0
    assert "Usage:" in result.stdout


def test_version() -> None:
    import hexad as package

    assert hexad("--version").stdout == f"hexad {package.__version__}\n"


def test_a_model_with_an_unknown_tokenizer_can_be_inspected_but_not_run(tmp_path: Path) -> None:
    path = tmp_path / "rwkv.gguf"
    path.write_bytes(write(*llama(tokenizer__ggml__model="rwkv")))
    shown = hexad("inspect", str(path))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "rwkv.gguf" in shown.stdout
    refused = hexad("run", "hi", "-m", str(path))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error:")
    assert "its tokenizer is of kind 'rwkv'" in refused.stderr


def test_the_default_model_is_the_same_everywhere() -> None:
    from hexad import LLM, cli
    from hexad.checkpoint import store

    assert cli.DEFAULT_MODEL == store.DEFAULT_MODEL == signature(LLM).parameters["model"].default
    assert store.DEFAULT_MODEL in store.ALIASES


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom hexad.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'torch', 'tokenizers', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["run", "--nonsense"], ["run", "--max-tokens", "many", "hi"], ["bench"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = hexad(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def assert_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    "command", [["run", "hi", "-m"], ["chat"], ["inspect"], ["bench", "latency"], ["bench", "throughput"]]
)
def test_a_file_that_is_no_model_is_a_named_error(command: list[str], tmp_path: Path) -> None:
    missing, empty, text = (tmp_path / f"{name}.gguf" for name in ("missing", "empty", "text"))
    empty.touch()
    text.write_text("This is not a model.\n" * 100)
    for file in (missing, empty, text):
        assert_error(hexad(*command, str(file)), str(file))


def test_an_unknown_model_is_an_error() -> None:
    assert_error(hexad("pull", "nonsense"), "nonsense", "smollm2:135m")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "3"),
        ("--top-p", "0"),
        ("--top-k", "-2"),
        ("--min-p", "2"),
        ("--max-tokens", "0"),
        ("--threads", "0"),
        ("--max-model-len", "-1"),
        ("--compute", "fp8"),
        ("--kv-dtype", "q1"),
    ],
)
def test_a_setting_out_of_range_is_an_error(option: str, value: str) -> None:
    assert_error(hexad("run", "hi", option, value), option.lstrip("-").replace("-", "_"), value)


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [([""], b""), ([" \n"], b""), (["-"], b""), ([], b" \n"), (["-"], b"\xff\xfe"), ([b"\xff"], b"")],
)
def test_a_prompt_without_text_is_an_error(arguments: list[str | bytes], stdin: bytes) -> None:
    result = subprocess.run([*COMMAND, "run", *arguments], input=stdin, capture_output=True)
    assert result.returncode == 1
    assert result.stderr.startswith(b"error: The prompt")


def test_list_shows_what_is_not_downloaded(tmp_path: Path) -> None:
    result = hexad("list", env={**os.environ, "HEXAD_HOME": str(tmp_path)})
    assert result.stdout.split() == ["smollm2:135m", "98.4", "MB", "not", "downloaded"]


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of sh in which `hexad` is the command."""
    script = f'hexad() {{ "{sys.executable}" -m hexad "$@"; }}\n{line}'
    return subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", ["list", "--help", "--version", "run --help"])
def test_a_full_stdout_is_an_error(arguments: str) -> None:
    result = shell(f"hexad {arguments} >/dev/full")
    assert result.stderr == "error: Input or output failed: No space left on device.\n"
    assert result.returncode == 1


@pytest.mark.parametrize("arguments", ["list", "--help", "chat", "run hi"])
def test_a_closed_stdout_is_an_error(arguments: str) -> None:
    result = shell(f"hexad {arguments} >&- </dev/null")
    assert (result.returncode, result.stderr) == (1, "error: stdout: it is closed.\n")


@pytest.mark.parametrize("arguments", ["chat", "run", "run -"])
def test_a_closed_stdin_is_an_error_where_it_is_read(arguments: str) -> None:
    assert_error(shell(f"hexad {arguments} <&-"), "stdin is closed")
    assert shell("hexad list <&-").returncode == 0


def test_a_closed_stderr_does_not_send_errors_to_stdout() -> None:
    result = shell("hexad run '' 2>&-")
    assert (result.returncode, result.stdout) == (1, "")


def test_stdout_may_be_unable_to_show_a_character() -> None:
    result = shell("hexad inspect --help", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    ("environment", "styled"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_escape_codes_can_be_turned_off(environment: dict[str, str], styled: bool) -> None:
    assert ("\033" in Terminal(*COMMAND, "--help", **environment).finish()) is styled
    note = Terminal(sys.executable, "-c", "from hexad.cli import note; note('word')", **environment)
    assert note.finish() == ("\033[2mword\033[0m\n" if styled else "word\n")


def test_reading_a_prompt_from_the_terminal_says_so() -> None:
    terminal = Terminal(*COMMAND, "run", "-", "-m", "nonsense")
    terminal.type("Hello?\n\4", after="Ctrl-D")
    assert "nonsense" in terminal.finish()
    assert terminal.process.returncode == 1


def test_ctrl_c_leaves_the_shell_on_a_new_line() -> None:
    terminal = Terminal(*COMMAND, "run", "-")
    terminal.type("half a quest", after="\r\n")  # of the note
    terminal.type("", after="half a quest")  # the terminal's echo
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish().endswith("half a quest\n")
    assert terminal.process.returncode == 130


# --- conversations with a scripted model ---


class ScriptedLLM:
    """Answers "<number of messages>:<last message>" in pieces of one character; a token is a character."""

    def __init__(self) -> None:
        self.conversations: list[list[dict[str, str]]] = []
        self.interrupt_after: int | None = None
        self.context = 1000

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(
            chat_template=object(),
            apply_chat_template=json.dumps,
            encode=lambda text, add_special: [ord(character) for character in text],
        )

    def stream(self, prompt: dict[str, list[int]], params: SamplingParams) -> Iterator[RequestOutput]:
        messages = json.loads("".join(map(chr, prompt["prompt_token_ids"])))
        if len(messages) > 5:
            raise PromptError("The prompt is too long.")
        self.conversations.append(messages)
        answer = f"{len(messages)}:{messages[-1]['content']}"
        for n in range(1, len(answer) + 1):
            if n == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
            cut = n in (params.max_tokens, self.context)
            reason: FinishReason | None = "length" if cut else "stop" if n == len(answer) else None
            assert params.output_kind is RequestOutputKind.DELTA
            completion = CompletionOutput(0, answer[n - 1], [n], finish_reason=reason)
            yield RequestOutput("0", None, prompt["prompt_token_ids"], [completion], reason is not None)
            if cut:
                return


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Types a text at a conversation and returns it when it is over."""

    def run(
        typed: str, *, system: str | None = None, interrupt_after: int | None = None, context: int = 1000
    ) -> Conversation:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        llm = ScriptedLLM()
        llm.interrupt_after, llm.context = interrupt_after, context
        conversation = Conversation(llm, "scripted", SamplingParams(temperature=0, max_tokens=100), system)  # type: ignore[arg-type]
        conversation.loop()
        return conversation

    return run


Captured = pytest.CaptureFixture[str]


def test_answers_go_to_stdout_and_history_grows(talk: Any, capsys: Captured) -> None:
    conversation = talk("one\n\ntwo\n", system="be brief")
    out, err = capsys.readouterr()
    assert out == "2:one\n4:two\n"
    assert err.count("tok/s") == 2
    roles = [message["role"] for message in conversation.llm.conversations[-1]]
    assert roles == ["system", "user", "assistant", "user"]


def test_undo_clear_regen_and_system(talk: Any, capsys: Captured) -> None:
    talk("one\ntwo\n/undo\nthree\n/regen\n/clear\nfour\n/system short\nfive\n/system\nsix\n")
    assert capsys.readouterr().out.split() == [
        "1:one",
        "3:two",
        "3:three",
        "3:three",
        "1:four",
        "4:five",
        "5:six",
    ]


def test_commands_on_an_empty_conversation(talk: Any, capsys: Captured) -> None:
    talk("/undo\n/regen\n/clear\n/nonsense\n/HELP\n/Quit\nnot read\n")
    out, err = capsys.readouterr()
    assert out == ""
    assert "nothing to answer" in err
    assert "no command /nonsense" in err
    assert "/regen" in err
    assert max(map(len, err.splitlines())) <= 80


def test_commands_that_change_something_say_so(talk: Any, capsys: Captured) -> None:
    talk("/clear\n/system be brief\n/system\n/set top_k 5\n/save\n")
    assert capsys.readouterr().err.splitlines() == [
        "The conversation starts anew.",
        "The system message is set.",
        "There is no system message now.",
        "top_k = 5",
        "Give a file name: /save FILE.",
    ]


def test_an_answer_that_is_cut_off_says_by_which_limit(talk: Any, capsys: Captured) -> None:
    talk("/set max_tokens 4\nlong enough\n/set max_tokens none\nlong enough\n", context=8)
    out, err = capsys.readouterr()
    assert out == "1:lo\n3:long e\n"
    assert "cut off at 4 tokens; /set max_tokens raises it]" in err
    assert "cut off: the context is full]" in err


def test_chat_bounds_its_answers() -> None:
    assert "[default: 1024]" in hexad("chat", "--help").stdout


def test_set_changes_shows_and_checks_parameters(talk: Any, capsys: Captured) -> None:
    params = talk(
        "/set temperature 0.5\n/set max_tokens none\n/set seed 7\n/set top_p 9\n/set colour 1\n/set\n"
    ).params
    assert (params.temperature, params.max_tokens, params.seed, params.top_p) == (0.5, None, 7, 1.0)
    assert talk("/set top_k 5\n/set temperature 0.5\n").params.top_k == 5
    err = capsys.readouterr().err
    assert "error: top_p must be above 0 and at most 1, not 9" in err
    assert "no parameter 'colour'" in err
    assert "temperature = 0.5" in err


def test_save_writes_a_new_file_only(talk: Any, tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "talk.json"
    talk(f"hello\n/save {file}\n/clear\n/save {file}\n/save ~nobody-at-all/x\n", system="be brief")
    assert json.loads(file.read_text()) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "2:hello"},
    ]
    err = capsys.readouterr().err
    assert err.count(f"Saved to {file}.") == 1
    assert f"not saved to {file}: File exists." in err
    assert "not saved to ~nobody-at-all/x" in err


def test_a_full_context_is_explained_and_survived(talk: Any, capsys: Captured) -> None:
    conversation = talk("1\n2\n3\n4\n/undo\n5\n")
    out, err = capsys.readouterr()
    assert out.split() == ["1:1", "3:2", "5:3", "5:5"]
    assert "error: The prompt is too long. /undo takes back" in err
    assert "/clear" in err
    assert len(conversation.messages) == 6


def test_a_regen_that_fails_keeps_the_old_answer(talk: Any, capsys: Captured) -> None:
    conversation = talk("1\n2\n3\n/system pushes it over the limit\n/regen\n")
    assert "error: The prompt is too long." in capsys.readouterr().err
    assert [message["content"] for message in conversation.messages[-2:]] == ["3", "5:3"]


def test_ctrl_c_stops_the_answer_only(talk: Any, capsys: Captured) -> None:
    handler = signal.getsignal(signal.SIGINT)
    conversation = talk("a long message\n/set seed 1\n", interrupt_after=5)
    out, err = capsys.readouterr()
    assert out == "1:a l\n"
    assert "stopped" in err
    assert conversation.messages[-1] == {"role": "assistant", "content": "1:a l"}
    assert conversation.params.seed == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_at_the_prompt_leaves_when_pressed_twice(
    talk: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    script: list[str | type[BaseException]] = [
        KeyboardInterrupt,
        "hi",
        KeyboardInterrupt,
        KeyboardInterrupt,
        "unread",
    ]

    def typed(prompt: str) -> str:
        word = script.pop(0)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr("builtins.input", typed)
    talk("")
    assert capsys.readouterr().out == "1:hi\n"
    assert script == ["unread"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("one line\nnext", "one line"),
        ("first \\\nsecond \\\nthird\nnext", "first \nsecond \nthird"),
        ('"""first\n\n  /second\nthird"""\nnext', "first\n\n  /second\nthird"),
        ('"""\nonly\n"""\nnext', "only"),
        ('"""one"""\nnext', "one"),
        ('"""never closed\n', "never closed"),
        ('"""/help"""', "/help"),
    ],
)
def test_messages_of_several_lines(typed: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    read = read_message()
    assert read.strip() == message
    assert read.startswith("/") is False


@pytest.mark.parametrize(
    ("pasted", "message"),
    [
        ("one\n  two\n", " one\n  two"),
        ("/home: not found\nwhy?", " /home: not found\nwhy?"),
        ('"""one\ntwo"""', " one\ntwo"),
        ("/clear\n", "/clear"),
    ],
)
def test_a_paste_is_one_message(pasted: str, message: str) -> None:
    readline = pytest.importorskip("readline")
    if "GNU" not in readline.__doc__:
        pytest.skip("libedit knows no bracketed paste")
    script = "from hexad.cli.chat import *; edit_lines(); print(ascii(read_message()))"
    terminal = Terminal(sys.executable, "-c", script)
    pasted = pasted.replace("\n", "\r")  # as terminals send it
    terminal.type(f"\033[200~{pasted}\033[201~", after="> ")
    terminal.type("\r")
    assert ascii(message) in terminal.finish()


def test_a_dumb_terminal_gets_no_escape_codes_at_the_prompt() -> None:
    script = "from hexad.cli.chat import *; edit_lines(); print(ascii(read_message()))"
    terminal = Terminal(sys.executable, "-c", script, TERM="dumb")
    terminal.type("hello\r", after="> ")
    screen = terminal.finish()
    assert "'hello'" in screen
    assert "\033" not in screen


# --- SmolLM2 ---

QUESTION = "What is the capital of France?"


@pytest.mark.usefixtures("smollm2_path")
class TestSmolLM2:
    def test_the_first_command_of_the_readme(self) -> None:
        result = hexad("run", QUESTION)
        assert result.returncode == 0, result.stderr
        assert "Paris" in result.stdout
        assert result.stdout.endswith("\n")
        assert result.stderr == ""

    def test_json(self) -> None:
        result = hexad("run", QUESTION, "--json", "--max-tokens", "8")
        answer = json.loads(result.stdout)
        assert "Paris" in answer["text"]
        assert 1 < answer["completion_tokens"] <= 8
        assert answer["prompt_tokens"] > 8
        assert answer["finish_reason"] in ("stop", "length")
        assert all(answer[name] > 0 for name in ("load", "ttft", "prefill_speed", "decode_speed"))

    def test_a_piped_prompt_equals_an_argument(self) -> None:
        piped = hexad("run", "-", "--max-tokens", "16", input=QUESTION + "\n")
        assert piped.stdout == hexad("run", QUESTION, "--max-tokens", "16", "--threads", "1").stdout

    def test_raw_continues_the_text(self) -> None:
        result = hexad("run", "--raw", "The capital of France is", "--max-tokens", "3")
        assert "Paris" in result.stdout

    def test_a_seed_repeats_a_sample(self) -> None:
        options = ("--temperature", "1", "--max-tokens", "24")
        first, again, other = (
            hexad("run", "Tell a story.", *options, "--seed", seed).stdout for seed in "778"
        )
        assert first == again != other

    def test_a_prompt_beyond_the_context_is_an_error(self) -> None:
        assert_error(hexad("run", "word " * 100, "--max-model-len", "64"), "64")

    def test_a_reader_that_leaves_is_no_error(self) -> None:
        with subprocess.Popen(
            [*COMMAND, "run", "Count to one hundred."], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read(1)
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 141

    def test_ctrl_c_exits_quietly_with_130(self) -> None:
        with subprocess.Popen(
            [*COMMAND, "run", "--raw", "1, 2, 3,", "--max-tokens", "4000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b"")

    def test_a_conversation(self) -> None:
        result = hexad("chat", "--max-tokens", "40", input=f"{QUESTION}\n/undo\n/exit\n")
        assert result.returncode == 0
        assert "Paris" in result.stdout
        assert "tok/s" in result.stderr

    def test_inspect(self) -> None:
        result = hexad("inspect")
        assert result.returncode == 0, result.stderr
        assert "q4_1" in result.stdout.lower()

    def test_what_stdout_cannot_show(self) -> None:
        result = shell("hexad inspect", PYTHONIOENCODING="ascii")
        assert (result.returncode, result.stderr) == (0, "")
        assert "float ? " in result.stdout

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    @pytest.mark.parametrize("arguments", ["inspect", "run hi", "run hi --json --max-tokens 1", "chat"])
    def test_a_full_stdout_is_an_error(self, arguments: str) -> None:
        result = shell(f"echo hi | hexad {arguments} >/dev/full")
        assert result.stderr == "error: Input or output failed: No space left on device.\n"
        assert result.returncode == 1

    def test_bench_keeps_its_figures_where_it_cannot_print_them(self, tmp_path: Path) -> None:
        sizes = "--input-len 8 --output-len 4 --iters 1 --warmup 0"
        file = tmp_path / "figures.json"
        assert shell(f"hexad bench latency {sizes} --json {file} >&-").returncode == 1
        assert not file.exists()  # known before it runs
        if Path("/dev/full").exists():
            assert shell(f"hexad bench latency {sizes} --json {file} >/dev/full").returncode == 1
            assert json.loads(file.read_text())["figures"]["decode_tok_s"] > 0

    def test_a_terminal_sees_where_the_answer_is_cut_off(self) -> None:
        screen = Terminal(*COMMAND, "run", "--raw", "1, 2, 3,", "--max-tokens", "4").finish()
        assert screen.endswith("\033[2m[cut off at 4 tokens; --max-tokens raises it]\033[0m\n")

    def test_pull_prints_the_path_alone(self, smollm2_path: Path) -> None:
        result = hexad("pull")
        assert (result.stdout, result.stderr) == (f"{smollm2_path}\n", "")
