"""Folders that transformers saves: the same weights to the last bit, the same logits, the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny_models import limits_for, one_sequence

from hexad import LLM, SamplingParams
from hexad.backends.backend import CompileOptions
from hexad.checkpoint import open_checkpoint
from hexad.graph.fuse import fuse
from hexad.models import build_graph
from hexad.runner.model_runner import make_backend

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

VOCAB = 300
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied, biases": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral, window": ("Mistral", {"sliding_window": 20}),
    "qwen2": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
}


def make(name: str, dtype: str = "float32") -> Any:
    """A random model of transformers, neither sure of the next token nor at a loss."""
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": None,
            "attn_implementation": "eager",
            **changes,
        }
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:  # ones and zeros would hide a mistake
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", ["50KB", "5GB"], ids=["shards", "single"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_state_dicts(tmp_path: Path, name: str, size: str, dtype: str) -> None:
    model = make(name, dtype)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() is (size == "5GB")
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.weights.keys() == state.keys()
        assert checkpoint.config["tie_word_embeddings"] is model.config.tie_word_embeddings
        for key, tensor in state.items():
            weight = checkpoint.weights[key]
            assert weight.format.name == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
            assert weight.shape == tuple(tensor.shape)
            assert weight.arrays["data"].tobytes() == tensor.view(torch.uint8).numpy().tobytes()
            assert weight.dequantise().tobytes() == tensor.float().numpy().tobytes()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(tmp_path: Path, name: str, backend: str) -> None:
    """In float32, on a sequence longer than windows and original contexts."""
    model = make(name)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, VOCAB, 120)]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert expected.std() > 0.3
    with open_checkpoint(tmp_path) as checkpoint:
        graph = build_graph(checkpoint.config, checkpoint.weights)
        graph = graph if backend == "reference" else fuse(graph)
        options, limits = CompileOptions(kv_dtype="f32", compute="float"), limits_for(context=256)
        executable = make_backend(backend).compile(graph, checkpoint.weights, options, limits)
        executable.forward(one_sequence(tokens))
        # float32 sums in another order, over widths of about 100; logits are about 3
        assert np.abs(executable.logits() - expected).max() <= 1e-4


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with a few merges, as the tokenizers library saves it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the sea is calm and the sky is clear over the sea"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_llm_from_a_folder(tmp_path: Path, name: str, backend: str) -> None:
    """32 greedy tokens, as many as transformers', text included."""
    model = make(name)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.0, "max_new_tokens": 32}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompts = ["the sea is", "clear skies over the " * 8]
    with LLM(tmp_path, backend=backend, compute="float", kv_dtype="f32", max_num_seqs=4) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=32)
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        token_ids = theirs(prompt)["input_ids"]
        assert output.prompt_token_ids == token_ids
        with torch.inference_mode():
            found = model.generate(
                torch.tensor([token_ids]),
                attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
                do_sample=False, max_new_tokens=32, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        expected = found[0, len(token_ids) :].tolist()
        assert len(expected) == 32
        assert list(output.outputs[0].token_ids) == expected
        assert output.outputs[0].text == theirs.decode(expected, skip_special_tokens=True)
