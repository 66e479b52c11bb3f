"""The reference backend against transformers, float32 to float32, on the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny_models import dense, limits_for, one_sequence

from hexad.backends.backend import CompileOptions
from hexad.backends.reference import ReferenceBackend
from hexad.checkpoint.open import open_checkpoint
from hexad.graph.fuse import fuse
from hexad.models import build_graph
from hexad.weights import Weight

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

TEXT = """Twice a day the harbour of Saint-Malo empties and fills again. The Moon pulls at the sea, and the
Sun pulls a little less; where the coast narrows, the water has nowhere to go but up. A table gives the
times and heights for a place, and how high the water comes depends on where the Moon stands, on the shape
of the shore and on the depth in front of it. def tide(t): return 2.5 * cos(2 * pi * t / 12.42) # metres, t
in hours Many shores have two nearly equal high waters each day, others have only one, and some a mixture of
the two: 12:04, 18:17, 00:31, 06:40; heights 4.1 m, 0.6 m, 4.3 m, 0.5 m. "Mind the stairs," said the
fisherman, "they are dry now, but by four o'clock they will not be." His daughter laughed; she had read the
table, he hadn't."""


def reference_logits(
    config: Mapping[str, Any], weights: Mapping[str, Weight], tokens: list[int], *, fused: bool = False
) -> np.ndarray:
    graph = build_graph(config, weights)
    limits = limits_for(batch_rows=len(tokens), context=len(tokens), kv_blocks=len(tokens) // 32 + 1)
    graph = fuse(graph) if fused else graph
    executable = ReferenceBackend().compile(graph, weights, CompileOptions(kv_dtype="f32"), limits)
    executable.forward(one_sequence(tokens))
    return executable.logits()


def transformers_logits(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


def config_of(hf: Any) -> dict[str, Any]:
    """A Hugging Face config under the keys a Checkpoint has."""
    names = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "max_position_embeddings",
        "tie_word_embeddings",
    )  # fmt: skip
    return {name: getattr(hf, name) for name in names} | {"rope_theta": hf.rope_parameters["rope_theta"]}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"num_key_value_heads": 4}, id="mha"),
        pytest.param({"num_key_value_heads": 2}, id="gqa"),
        pytest.param({"num_key_value_heads": 1, "tie_word_embeddings": True}, id="mqa-tied"),
        pytest.param({"num_key_value_heads": 2, "attention_bias": True}, id="attention-bias"),
        pytest.param({"num_key_value_heads": 2, "head_dim": 24}, id="wide-heads"),
        pytest.param({"num_key_value_heads": 2, "sliding_window": None}, id="mistral"),
    ],
)
def test_tiny_models(shape: dict[str, Any], fused: bool) -> None:
    family = "Mistral" if "sliding_window" in shape else "Llama"
    hf = getattr(transformers, f"{family}Config")(
        **{
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "head_dim": 16,
            "vocab_size": 200,
            "max_position_embeddings": 128,
            "initializer_range": 0.15,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "tie_word_embeddings": False,
            "attn_implementation": "eager",
            **shape,
        }
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(hf).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # made as ones and zeros, which would hide a mistake
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    weights = {name: dense(value.numpy()) for name, value in model.state_dict().items()}
    if shape.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 200, 100)]
    expected = transformers_logits(model, tokens)
    assert expected.std() > 0.3
    found = reference_logits(config_of(hf), weights, tokens, fused=fused)
    # float32 sums in another order, over widths of about 100; logits are about 3
    assert np.abs(found - expected).max() <= 1e-4


def test_smollm2(smollm2_path: Path) -> None:
    with open_checkpoint(smollm2_path) as checkpoint:
        config, weights = checkpoint.config, checkpoint.weights
        tokens = checkpoint.tokenizer().encode(TEXT)
        assert len(tokens) >= 200
        hf = transformers.LlamaConfig(
            **{key: config[key] for key in config_of_keys(config)},
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        )
        model = transformers.LlamaForCausalLM(hf).eval()
        state = {name: torch.from_numpy(weight.dequantise().copy()) for name, weight in weights.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert set(missing) <= {"lm_head.weight"}
        assert not unexpected
        model.tie_weights()
        expected = transformers_logits(model, tokens)
        assert expected.std() > 1
        assert np.abs(reference_logits(config, weights, tokens) - expected).max() <= 2e-3


def config_of_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys that Hugging Face's config shares with a Checkpoint's."""
    return [key for key in config if key not in ("model_type", "name", "rope_theta", "rotary_dim")]
