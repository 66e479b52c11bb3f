"""`hexad run`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hexad.cli import note
from hexad.errors import BackendError, PromptError, TokenizerError
from hexad.params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hexad.llm import LLM
    from hexad.outputs import FinishReason


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer. Times in seconds, speeds in tokens per second.

    ttft: from the request to its first token. prefill_speed: prompt tokens ÷ ttft. decode_speed: of the
    tokens after the first; None if there are none.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None
    ttft: float
    prefill_speed: float
    decode_speed: float | None


def run(
    prompt: str | None,
    model: str,
    params: SamplingParams,
    settings: Mapping[str, Any],
    *,
    raw: bool,
    as_json: bool,
) -> None:
    """Streams the answer to stdout, or prints it as one JSON object when it is finished."""
    prompt = _read_prompt(prompt, raw=raw)

    from hexad.llm import LLM

    begin = time.perf_counter()
    with LLM(model, **settings) as llm:
        load = time.perf_counter() - begin
        token_ids = (
            llm.get_tokenizer().encode(prompt)
            if raw
            else chat_prompt(llm, [{"role": "user", "content": prompt}], model)
        )
        answer = generate(llm, token_ids, params, show=_discard if as_json else write)
    if as_json:
        print(json.dumps({"model": model, "load": load, **asdict(answer)}, ensure_ascii=False))
    else:
        write("\n")
        if answer.finish_reason == "length" and sys.stderr.isatty():
            note(f"[{cut_off(answer, params, '--max-tokens')}]")


def cut_off(answer: Answer, params: SamplingParams, setting: str) -> str:
    """Which limit ended an answer whose finish_reason is "length". setting: what raises max_tokens."""
    if answer.completion_tokens == params.max_tokens:
        return f"cut off at {params.max_tokens} tokens; {setting} raises it"
    return "cut off: the context is full"


def chat_prompt(llm: LLM, messages: Sequence[Mapping[str, str]], model: str) -> list[int]:
    """The token ids of a conversation in the model's chat template. Raises TokenizerError if it has none."""
    tokenizer = llm.get_tokenizer()
    if tokenizer.chat_template is None:
        raise TokenizerError(
            f"{model} has no chat template; it may be a base model. `hexad run --raw` continues plain text."
        )
    # The template's text has the special tokens already.
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special=False)


def generate(
    llm: LLM,
    token_ids: list[int],
    params: SamplingParams,
    *,
    show: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Generates one answer and passes its text to `show` as it grows; `stopped` is asked after each token.

    Raises BackendError if a step fails.
    """
    params = replace(params, output_kind=RequestOutputKind.DELTA)
    begin = first = last = time.perf_counter()
    text, tokens, finish_reason = "", 0, None
    for output in llm.stream({"prompt_token_ids": token_ids}, params):
        last = time.perf_counter()
        if not tokens:
            first = last
        [completion] = output.outputs
        show(completion.text)
        text += completion.text
        tokens += len(completion.token_ids)
        finish_reason = completion.finish_reason
        if finish_reason == "error":
            raise BackendError(completion.error)
        if finish_reason is None and stopped():
            finish_reason = "abort"
            break
    return Answer(
        text=text,
        prompt_tokens=len(token_ids),
        completion_tokens=tokens,
        finish_reason=finish_reason,
        ttft=first - begin,
        prefill_speed=len(token_ids) / (first - begin),
        decode_speed=(tokens - 1) / (last - first) if tokens > 1 else None,
    )


def write(text: str) -> None:
    """Shows text on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def check_text(text: str) -> str:
    """Text from a command line or a terminal. Raises PromptError if its bytes were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"The prompt is not valid UTF-8 (at character {error.start}).") from error
    return text


def _discard(text: str) -> None:
    pass


def _read_prompt(prompt: str | None, *, raw: bool) -> str:
    if prompt is None or prompt == "-":
        if sys.stdin is None:
            raise PromptError("The prompt cannot be read, for stdin is closed; give it as an argument.")
        if sys.stdin.isatty():
            if prompt is None:
                import typer

                raise typer.BadParameter(
                    "give one, or pipe a text in. `hexad chat` holds a conversation.", param_hint="PROMPT"
                )
            note("Ctrl-D on an empty line ends the prompt.")
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise PromptError(f"The prompt on stdin is not valid UTF-8 (at byte {error.start}).") from error
        if not raw:
            prompt = prompt.strip()  # the last newline is the pipe's, not the question's
    if not (prompt if raw else prompt.strip()):
        raise PromptError("The prompt is empty.")
    return check_text(prompt)
