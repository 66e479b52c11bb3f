"""Every architecture and kind of RoPE scaling against transformers, in float32, on tiny random models.

The weights come straight from transformers, and out of a GGUF file written as converters write it. The prompt
is longer than the context before it was stretched and than the sliding windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.gguf_models import gguf_of
from tests.tiny_models import dense, limits_for, make_batch, one_sequence

from hexad.backends.backend import CompileOptions
from hexad.backends.cpu import CpuBackend
from hexad.backends.reference import ReferenceBackend
from hexad.checkpoint.open import open_checkpoint
from hexad.graph.fuse import fuse
from hexad.models import build_graph
from hexad.weights import Weight

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

VOCAB, CONTEXT, ORIGINAL, WINDOW, LAYERS, STEPS = 200, 256, 64, 24, 4, 32
PROMPT = [int(token) for token in np.random.default_rng(0).integers(0, VOCAB, 150)]
MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 24}),
    "llama-3": ("Llama", {"rope": LLAMA3}),
    "llama-linear": ("Llama", {"rope": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("Llama", {"rope": YARN}),
    "llama-yarn-set": ("Llama", {"rope": YARN | {"attention_factor": 1.3, "beta_fast": 8, "beta_slow": 2}}),
    "llama-yarn-scales": ("Llama", {"rope": YARN | {"mscale": 2, "mscale_all_dim": 0.5, "truncate": False}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": WINDOW, "head_dim": 24}),
    "mistral-window-1": ("Mistral", {"sliding_window": 1}),
    "ministral": ("Ministral", {"sliding_window": WINDOW, "layer_types": MIXED, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"rope": YARN}),
    "qwen2-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "rope": LLAMA3},
    ),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "rope": YARN, "num_key_value_heads": 1}),
    "qwen3-windows": (
        "Qwen3",
        {"head_dim": 24, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED,
         "attention_bias": True},
    ),
}  # fmt: skip

# A converter has no place for these in the file.
NOT_IN_GGUF = {"llama-yarn-scales"}


@dataclass
class Oracle:
    """A model of transformers': its config under hexad's keys, weights, and greedy tokens after the prompt;
    the logits that draw them and those of the prompt."""

    config: dict[str, Any]
    weights: dict[str, NDArray[np.float32]]
    logits: NDArray[np.float32]
    tokens: list[int]


def config_of(hf: Any) -> dict[str, Any]:
    """A Hugging Face config under the keys a Checkpoint has."""
    config = hf.to_dict()
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    return config | {"rope_scaling": None if rope["rope_type"] == "default" else rope}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def oracle(case: str) -> Oracle:
    family, changes = CASES[case]
    rope = changes.get("rope", {"rope_type": "default"})
    hf = getattr(transformers, f"{family}Config")(
        **{
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.15,
            "rope_parameters": {**rope, "rope_theta": 5000.0},
            "tie_word_embeddings": False,
            "attn_implementation": "eager",
            "bos_token_id": None,
            "eos_token_id": None,
            **{key: value for key, value in changes.items() if key != "rope"},
        }
    )
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other over so small a model
    model = getattr(transformers, f"{family}ForCausalLM")(hf).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # made as ones, and biases as zeros, which would hide a mistake
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    if hf.tie_word_embeddings:
        del weights["lm_head.weight"]
    with torch.inference_mode():
        found = model.generate(
            torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            do_sample=False, max_new_tokens=STEPS, pad_token_id=0,
            use_cache=False,  # transformers' cache of a window of 1 keeps everything
        )  # fmt: skip
        logits = model(found[:, :-1]).logits[0].numpy()
    torch.set_num_threads(threads)
    return Oracle(config_of(hf), weights, logits, found[0, len(PROMPT) :].tolist())


@dataclass
class Model:
    config: Mapping[str, Any]
    weights: Mapping[str, Weight]


@pytest.fixture(scope="module", params=["weights", "gguf"])
def model(
    request: pytest.FixtureRequest, case: str, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    if request.param == "weights":
        yield Model(oracle.config, {name: dense(array) for name, array in oracle.weights.items()})
        return
    if case in NOT_IN_GGUF:
        pytest.skip("converters leave out what this model sets")
    path: Path = tmp_path_factory.mktemp(case) / "model.gguf"
    path.write_bytes(gguf_of(oracle.config, oracle.weights))
    with open_checkpoint(path) as checkpoint:
        yield Model(checkpoint.config, checkpoint.weights)


@pytest.mark.parametrize("backend", ["reference", "reference, fused", "cpu"])
def test_logits_and_greedy_tokens(model: Model, oracle: Oracle, backend: str, case: str) -> None:
    graph = build_graph(model.config, model.weights)
    graph = graph if backend == "reference" else fuse(graph)
    maker: Any = CpuBackend if backend == "cpu" else ReferenceBackend
    executable = maker().compile(
        graph, model.weights, CompileOptions(compute="float", kv_dtype="f32"), limits_for()
    )
    executable.forward(one_sequence(PROMPT))
    logits = [executable.logits()]
    for step, token in enumerate(oracle.tokens[:-1]):
        executable.forward(make_batch([([token], len(PROMPT) + step, range(CONTEXT // 32))]))
        logits.append(executable.logits())
    found = np.concatenate(logits)
    assert oracle.logits.std() > 0.3
    # float32 sums in another order, over widths of about 100; logits are about 3
    assert np.abs(found - oracle.logits).max() <= 1e-4
    assert found[-STEPS:].argmax(axis=1).tolist() == oracle.tokens


@pytest.mark.parametrize("key", ["rope_scaling", "sliding_window"])
def test_each_setting_matters(oracle: Oracle, key: str) -> None:
    """What the cases are about shows in the numbers: without it they would fail."""
    if not oracle.config.get(key):
        pytest.skip("not set")
    weights = {name: dense(array) for name, array in oracle.weights.items()}
    graph = build_graph(oracle.config | {key: None, "layer_types": None}, weights)
    executable = ReferenceBackend().compile(graph, weights, CompileOptions(kv_dtype="f32"), limits_for())
    executable.forward(one_sequence(PROMPT))
    assert np.abs(executable.logits() - oracle.logits[: len(PROMPT)]).max() > 0.1
