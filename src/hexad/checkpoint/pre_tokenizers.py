"""How a text is split into words before byte-level BPE, by the names that GGUF files give these ways.

The patterns are the models' own (from their tokenizer.json), in the Oniguruma syntax that `tokenizers` uses.
GGUF files name them in `tokenizer.ggml.pre`, by the list in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_REST = rf"{_SYMBOLS}|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_CONTRACTED = rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}"
_GPT4O = rf"{_CONTRACTED}|\p{{N}}{{1,3}}|{_CASED_REST}"
_DEEPSEEK3_WORD = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+"
)
_DEEPSEEK3 = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", rf"{_DEEPSEEK3_WORD}[\r\n]*|{_SPACES}")
_IDEOGRAPHS = r"[一-龥ࠀ-一가-퟿]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_KIMI = [part.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]") for part in _CASED]

# Letters with a case, as DeepSeek's authors listed them: fewer than today's Unicode has.
_CASED_LETTERS = re.sub(
    "[0-9A-F]+",
    lambda code: chr(int(code[0], 16)),
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A "
    "38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF "
    "1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D "
    "1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 "
    "1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F "
    "2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F "
    "A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943",
).replace(" ", "")


@dataclass(frozen=True, slots=True)
class Split:
    """One way of splitting, and what else goes with it in the models that use it.

    patterns: applied in turn, each to the pieces that the former made. nfc: normalise to NFC first.
    ignore_merges: a word that is a token is that token, whatever the merges say. add_bos: what an absent
    `add_bos_token` means.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


DEFAULT = Split((_GPT2,))
"""GPT-2's, for files that name none."""

_DIGITS_FIRST = (r"\p{N}", _GPT2)

# fmt: off
_NAMES: dict[str, Split] = {
    "default gpt-2 phi-2 jais trillion exaone4 gigachat mellum a.x-4.0 granite-docling": DEFAULT,
    "mpt olmo": Split((_GPT2,), nfc=True),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": Split(_DIGITS_FIRST),
    "command-r": Split(_DIGITS_FIRST, nfc=True),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 midm-2.0":
        Split((_LLAMA3,), ignore_merges=True, add_bos=True),
    "dbrx smaug-bpe chatglm-bpe glm4": Split((_LLAMA3,)),
    "minicpm5": Split((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), ignore_merges=True),
    "jais-2": Split((
        rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+"
        + "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"|\s",
    )),
    "qwen2 deepseek-r1-qwen kormo": Split((_QWEN2,), nfc=True),
    "stablelm2 megrez hunyuan grok-2 solar-open": Split((_QWEN2,)),
    "laguna": Split((r"[^\n]+|\n+", _QWEN2)),
    "ufakzeka": Split((_QWEN2.removeprefix(f"{_CONTRACTION}|"),)),
    "qwen35": Split((_QWEN35,), nfc=True),
    "seed-coder": Split((rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    "bailingmoe bailingmoe2 llada-moe": Split((
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    )),
    "exaone-moe": Split((
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    )),
    "tekken": Split((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Split((_GPT4O,)),
    "tiny_aya cohere2moe": Split((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    "kimi-k2": Split((
        rf"[\p{{Han}}]+|{_KIMI[0]}{_CONTRACTION}?|{_KIMI[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_REST}",
    )),
    "youtu": Split((
        r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
        rf"{_CONTRACTED}|\p{{N}}|{_CASED_REST}",
    ), ignore_merges=True),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Split(_DEEPSEEK3),
    "spark2_5": Split((*_DEEPSEEK3[:2], rf"{_DEEPSEEK3_WORD}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    "deepseek-coder": Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}")),
    "deepseek-llm": Split((
        r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _IDEOGRAPHS,
        r"\p{N}",
    )),
    "falcon": Split((r"[\p{P}$+<=>^`|~]+", _GPT2, r"[0-9][0-9][0-9]")),
    "bloom poro-chat gpt3-finnish": Split((_BLOOM,)),
    "viking": Split((_BLOOM, r"\p{N}")),
    "chameleon": Split((
        r"<sentinel:[0-9]+>", r"IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]", _GPT2,
    ), add_bos=True),
}
# fmt: on

SPLITS = {name: split for names, split in _NAMES.items() for name in names.split()}
"""Ways of splitting by the names that they have in GGUF files."""
