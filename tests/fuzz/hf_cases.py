"""Hugging Face folders for the fuzzer: config, safetensors, tokenizer and what else lies in one."""

from __future__ import annotations

import json
from functools import cache
from random import Random
from typing import Any

import numpy as np
from tests.fuzz.case import Case
from tests.fuzz.gguf_cases import TEMPLATE
from tests.fuzz.mutate import FLOATS, INTEGERS, any_json, mutate_bytes, mutate_json
from tests.safetensors_writer import assemble, describe

HINTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "config.json": {
        "model_type": ("llama", "mistral", "qwen2", "qwen3", "gemma3", "../llama", "__init__"),
        "architectures": (["LlamaForCausalLM"], ["Qwen3ForCausalLM"], [], ["x"] * 3),
        "rope_scaling": (
            {"rope_type": "linear", "factor": 2.0},
            {"type": "linear", "factor": 0},
            {"rope_type": "yarn"},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
            },
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
            },
            {"rope_type": "longrope"},
            {"rope_type": "dynamic", "factor": 1e300},
            {"factor": 2.0},
            {},
        ),
        "rope_parameters": (
            {"rope_theta": 1e4, "rope_type": "default"},
            {"full_attention": {"rope_type": "default"}},
        ),
        "rope_theta": FLOATS,
        "partial_rotary_factor": (0.5, 0.3, *FLOATS),
        "layer_types": (["full_attention"], ["sliding_attention"], ["x"], [], None, ["full_attention"] * 9),
        "sliding_window": (None, 0, 8, -1, 2**63, 1.5),
        "use_sliding_window": (True, False),
        "max_window_layers": (0, 1, -1),
        "head_dim": (None, 0, 1, 2, 15, 16, 2**40),
        "num_hidden_layers": (0, 1, 2, 4096, 2**31, 10**30),
        "num_attention_heads": (0, 1, 2, 3, 2**31),
        "num_key_value_heads": (None, 0, 1, 2, 3, 2**31),
        "hidden_size": (0, 31, 32, 2**31),
        "vocab_size": (0, 1, 21, 2**40),
        "hidden_act": ("silu", "gelu", None),
        "tie_word_embeddings": (True, False, None, "no"),
        "attention_bias": (True, False),
        "mlp_bias": (True, False),
        "torch_dtype": ("bfloat16", "float64", 7),
        "quantization_config": ({"quant_method": "gptq", "bits": 4}, {}),
        "eos_token_id": (1, [1, 2], [], "x", -1, 2**70),
    },
    "generation_config.json": {
        "temperature": FLOATS,
        "top_k": INTEGERS,
        "top_p": FLOATS,
        "do_sample": (True, False, 3),
        "repetition_penalty": FLOATS,
        "eos_token_id": (0, [0, 1, 2], -1, [[]], 10**9, True),
        "bos_token_id": (0, [1], None),
        "min_p": FLOATS,
        "max_length": INTEGERS,
    },
    "tokenizer_config.json": {
        "chat_template": (
            TEMPLATE,
            "{{",
            [{"name": "default", "template": TEMPLATE}],
            [{"name": "default"}],
            {},
        ),
        "bos_token": ("<s>", {"content": "<s>"}, {"content": 1}, None, "missing"),
        "eos_token": ("</s>", {"content": "</s>"}, None, ["</s>"]),
        "add_bos_token": (True, False, None, "x"),
        "added_tokens_decoder": ({"0": {"content": "<s>"}}, {"-1": {}}, {"x": {"content": "y"}}, []),
        "tokenizer_class": ("LlamaTokenizer", "PreTrainedTokenizerFast", 3),
    },
    "tokenizer.json": {
        "normalizer": (
            None,
            {"type": "NFC"},
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Lowercase"},
            {"type": "Sequence", "normalizers": []},
            {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
            {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
            {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        ),
        "pre_tokenizer": (
            None,
            {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
            {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated", "invert": False},
            {"type": "Metaspace", "replacement": "▁▁"},
            {"type": "Digits"},
        ),
        "post_processor": (
            None,
            {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
            {"type": "ByteLevel"},
            {"type": "Sequence", "processors": [{}]},
        ),
        "decoder": (None, {"type": "ByteLevel"}, {"type": "ByteFallback"}, {"type": "WordPiece"}),
        "truncation": ({"max_length": 1, "strategy": "LongestFirst", "stride": 5, "direction": "Right"},),
        "padding": ({"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_id": 0, "pad_token": "x"},),
        "added_tokens": (
            [],
            [{"id": 2**33, "content": "x"}],
            [{"id": 5, "content": "", "special": True}],
            [
                {
                    "id": 1000,
                    "content": "far",
                    "special": True,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                }
            ],
        ),
        "model": (
            {"type": "BPE"},
            {"type": "Unigram", "vocab": [], "unk_id": 5},
            {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1e308], ["b", 1e308]]},
            {"type": "WordLevel", "vocab": {}, "unk_token": "x"},
            {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []},
            {"type": "BPE", "vocab": {"a": -1}, "merges": []},
            {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []},
            {"type": "BPE", "vocab": {}, "merges": [["a"]]},
            {"vocab": {}, "merges": ["a b"]},
        ),
        "version": ("1.0", "2.0", 1),
    },
    "model.safetensors.index.json": {
        "weight_map": (
            {},
            [],
            {"model.norm.weight": "../../etc/passwd"},
            {"model.norm.weight": "/dev/zero"},
            {"model.norm.weight": ""},
            {"model.norm.weight": "."},
            {"model.norm.weight": "nul\0"},
            {"model.norm.weight": "n" * 5000},
            {"model.norm.weight": 3},
            {"x": "config.json"},
        ),
        "metadata": ({}, None, {"total_size": -1}),
    },
}


@cache
def seeds() -> list[Case]:
    """Folders with one safetensors file or several, with either kind of tokenizer.json, and single files."""
    one, several = _weights(("F32", "BF16", "F16")), _weights(("BF16",), tied=False)
    names = list(several)
    parts = [names[:1], names[1:5], names[5:]]
    files = {}
    index = {}
    for i, part in enumerate(parts, 1):
        file = f"model-0000{i}-of-00003.safetensors"
        files[file] = _safetensors({name: several[name] for name in part})
        index |= dict.fromkeys(part, file)
    files["model.safetensors.index.json"] = _json({"metadata": {"total_size": 1}, "weight_map": index})
    whole = {"model.safetensors": _safetensors(one)}
    return [
        Case(whole | _settings(tied=True, tokenizer=_byte_level())),
        Case(
            whole
            | _settings(tied=True, tokenizer=_byte_fallback())
            | {"chat_template.jinja": TEMPLATE.encode()}
        ),
        Case(files | _settings(tied=False, tokenizer=_byte_level())),
        Case(whole | _settings(tied=True, tokenizer=_byte_level()), "model.safetensors"),
    ]


def mutated_safetensors(random: Random) -> Case:
    """A folder with the bytes, the header or the index of its weights changed."""
    case = random.choice(seeds())
    names = [name for name in case.files if "safetensors" in name]
    if len(names) > 1 and random.random() < 0.15:
        a, b = random.choices(names, k=2)
        files = dict(case.files)
        if random.random() < 0.5:
            del files[a]
        else:
            files[a] = files[b]
        return Case(files)
    name = random.choice(names)
    raw = case.files[name]
    if name.endswith(".json"):
        return Case(case.files | {name: mutate_json(random, raw, HINTS[name])}, case.opened)
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    choice = random.random()
    if choice < 0.35:
        other = random.choice(list(random.choice(seeds()).files.values()))
        changed = mutate_bytes(random, raw, {"length": [(0, 8)]}, 8 + length, other)
    else:
        if choice < 0.6:
            header = mutate_json(random, header)
        elif choice < 0.7:
            header = mutate_bytes(random, header, {}, length, header)
        else:
            header = _changed_header(random, header)
        changed = len(header).to_bytes(8, "little") + header + data
    return Case(case.files | {name: changed}, case.opened)


def mutated_folder(random: Random) -> Case:
    """A folder with one or two of its JSON files changed, taken away or put in another's place."""
    case = random.choice(seeds()[:3])
    files = dict(case.files)
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice([name for name in files if not name.endswith(".safetensors")])
        choice = random.random()
        if choice < 0.05:
            del files[name]
        elif choice < 0.1:
            files[name] = files[random.choice(list(files))]
        elif choice < 0.2 or name.endswith(".jinja"):
            files[name] = mutate_bytes(random, files[name], {}, len(files[name]), b'{"model_type": "llama"}')
        else:
            try:
                files[name] = mutate_json(random, files[name], HINTS.get(name, {}))
            except (ValueError, RecursionError):  # no JSON any more
                continue
    return Case(files)


def _changed_header(random: Random, header: bytes) -> bytes:
    """A header with one or two fields of its entries set to something else."""
    entries, original = json.loads(header), json.loads(header)
    names = [name for name in entries if name != "__metadata__"]
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(names)
        entry, shape, offsets = entries[name], original[name]["shape"], original[name]["data_offsets"]
        match random.randrange(6):
            case 0:
                entry["dtype"] = random.choice(
                    ("F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "f32", "", 7)
                )
            case 1:
                entry["shape"] = random.choice(
                    (
                        [],
                        [0],
                        [1],
                        [-1],
                        [2**63],
                        [2**32] * 2,
                        [2**64 - 1, 2],
                        [1.0],
                        [True],
                        shape[::-1],
                        [*shape, 1],
                        [1] * 300,
                        ["1"],
                        None,
                    )
                )
            case 2:
                place = random.randrange(2)
                value = random.choice(
                    (*INTEGERS, -1, offsets[place] + 1, offsets[place] - 2, True, 1.0, 10**400)
                )
                entry["data_offsets"] = [value if i == place else offset for i, offset in enumerate(offsets)]
            case 3:
                entry["data_offsets"] = original[random.choice(names)]["data_offsets"]
            case 4:
                entry["data_offsets"] = random.choice(
                    (offsets[::-1], [], offsets + offsets, None, any_json(random))
                )
            case _:
                entry.pop(random.choice(list(entry)))
                break
    return json.dumps(entries).encode()


def _safetensors(tensors: dict[str, Any]) -> bytes:
    entries, data = describe(tensors)
    return assemble({"__metadata__": {"format": "pt"}} | entries, data)


def _weights(dtypes: tuple[str, ...], tied: bool = True) -> dict[str, Any]:
    """The tensors of a llama of one layer with a vocabulary of 21."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (21, 32), "model.norm": (32,)}
    if not tied:
        shapes["lm_head"] = (21, 32)
    layer = "model.layers.0."
    shapes |= {layer + "input_layernorm": (32,), layer + "post_attention_layernorm": (32,)}
    shapes |= {layer + "self_attn.q_proj": (32, 32), layer + "self_attn.o_proj": (32, 32)}
    shapes |= {layer + "self_attn.k_proj": (16, 32), layer + "self_attn.v_proj": (16, 32)}
    shapes |= {layer + f"mlp.{name}_proj": (32, 32) for name in ("gate", "up", "down")}
    tensors: dict[str, Any] = {}
    for i, (name, shape) in enumerate(shapes.items()):
        values = rng.standard_normal(shape).astype(np.float32)
        match dtypes[i % len(dtypes)]:
            case "BF16":
                tensors[f"{name}.weight"] = (values.view("<u4") >> 16).astype("<u2")
            case "F16":
                tensors[f"{name}.weight"] = values.astype(np.float16)
            case _:
                tensors[f"{name}.weight"] = values
    return tensors


def _settings(*, tied: bool, tokenizer: Any) -> dict[str, bytes]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": 21,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "eos_token_id": 2,
    }
    return {
        "config.json": _json(config),
        "generation_config.json": _json(
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [2]}
        ),
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(
            {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": TEMPLATE}
        ),
    }


def _added(*texts: str) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": text, **flags} for i, text in enumerate(texts)]


def _byte_level() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *"abcdehlorwĠ!", "he", "ll", "hell", "hello", "or", "lo"]
    merges = [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], ["o", "r"], ["l", "o"]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added("<unk>", "<s>", "</s>"),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _byte_fallback() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in (0, 32, 33, 255)), *"▁adehlorw"]
    tokens += ["he", "ll", "hell", "hello", "▁hello"]
    merges = ["h e", "l l", "he ll", "hell o", "▁ hello"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added("<unk>", "<s>", "</s>"),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
