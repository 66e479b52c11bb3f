"""Filling in the middle: prompts for models that were trained to write what stands between two texts
(Bavarian et al. 2022, arXiv:2207.14255)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hexad.checkpoint.tokenizer import Tokenizer
from hexad.prompts import TokenPrompt
from hexad.server.errors import ApiError
from hexad.server.service import Service

# fmt: off
_NAMES = {
    "prefix": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
               "<|code_prefix|>", "<|prefix|>"),
    "suffix": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
               "<|code_suffix|>", "<|suffix|>"),
    "middle": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
               "<|code_middle|>", "<|middle|>"),
    "pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>"),
    "repository": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<repo_name>"),
    "file": ("<|file_sep|>", "<file_sep>"),
}
# fmt: on
"""What models call the tokens around the parts."""


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """The tokens that a vocabulary has for it. ends: those that end the middle, besides its usual ends."""

    prefix: int
    suffix: int
    middle: int
    repository: int | None
    file: int | None
    ends: tuple[int, ...]

    @classmethod
    def find(cls, tokenizer: Tokenizer) -> FillInTheMiddle | None:
        """None where the vocabulary lacks one of the three that it takes."""
        found: dict[str, int] = {}
        for part, names in _NAMES.items():
            for name in names:
                ids = tokenizer.encode(name, add_special=False)
                if len(ids) == 1 and tokenizer.token_text(ids[0]) == name:
                    found[part] = ids[0]
                    break
        if not {"prefix", "suffix", "middle"} <= found.keys():
            return None
        ends = tuple(found[part] for part in ("pad", "repository", "file") if part in found)
        return cls(
            found["prefix"],
            found["suffix"],
            found["middle"],
            found.get("repository"),
            found.get("file"),
            ends,
        )

    def prompt(
        self,
        service: Service,
        prefix: str,
        suffix: str,
        *,
        start: str = "",
        files: Sequence[tuple[str | None, str]] = (),
        max_tokens: int | None = None,
    ) -> TokenPrompt:
        """The prompt for what goes between prefix and suffix, which begins with `start`.

        files: (name, text) of other files, which stand before it. max_tokens: of the answer.

        What does not fit into the context is left out: of the prefix its beginning and of the suffix its end,
        so that three parts in four are prefix, then the beginning of the files.
        """
        tokenizer = service.tokenizer

        def tokens(text: str, keep_end: bool) -> list[int]:
            most = service.max_prompt_chars  # more cannot fit, and need not be encoded
            text = text[-most:] if keep_end else text[:most]
            return tokenizer.encode(text, add_special=False)

        bos = tokenizer.encode("")[:1] if tokenizer.bos_id in tokenizer.encode("") else []
        begun = tokens(start, True)
        before, after = tokens(prefix, True), tokens(suffix, False)
        room = service.max_model_len - (max_tokens or service.max_model_len // 4)
        room = max(0, room - len(begun) - len(bos) - 3)
        kept_after = min(len(after), max(room // 4, room - len(before)))
        kept_before = min(len(before), room - kept_after)
        before, after = before[len(before) - kept_before :], after[:kept_after]
        context = self._files(files, tokens)
        context = context[max(0, len(context) - (room - kept_before - kept_after)) :]
        ids = [*context, *bos, self.prefix, *before, self.suffix, *after, self.middle, *begun]
        return TokenPrompt(None, ids)

    def _files(
        self, files: Sequence[tuple[str | None, str]], tokens: Callable[[str, bool], list[int]]
    ) -> list[int]:
        """Other files, and the name of the one to be filled in (Hui et al. 2024, arXiv:2409.12186)."""
        if not files:
            return []
        ids: list[int] = []
        if self.repository is not None and self.file is not None:
            ids += [self.repository, *tokens("repository\n", True)]
        for name, text in files:
            if self.file is not None:
                ids += [self.file, *tokens(f"{name or 'tmp'}\n", True)]
            ids += tokens(text if text.endswith("\n") else f"{text}\n", True)
        return [*ids, self.file, *tokens("filename\n", True)] if self.file is not None else ids


def infill_of(service: Service) -> FillInTheMiddle:
    """Raises ApiError for a model that cannot."""
    found = FillInTheMiddle.find(service.tokenizer)
    if found is None:
        raise ApiError(
            400,
            f"The model {service.names[0]!r} cannot fill in the middle: its vocabulary has no tokens for "
            "prefix, suffix and middle.",
            code="not_supported",
        )
    return found
