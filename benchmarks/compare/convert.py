"""Makes what engines read that cannot read a GGUF file, beside the file.

    PYTHON -m benchmarks.compare.convert MODEL.gguf … [--into FOLDER]

PYTHON has torch, transformers, gguf, ctranslate2, onnxruntime-genai, onnx and onnx_ir. Made are MODEL.hf, its
weights dequantised to float32, and of that MODEL.ct2-int8 and MODEL.onnx-int4, each quantised by the engine's
own tool. What is there already stays.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="default: the file's")
    options = parser.parse_args()
    for model in options.models:
        base = (options.into or model.parent) / model.stem
        folder = _make(base, "hf", lambda target, model=model: to_hugging_face(model, target))
        _make(base, "ct2-int8", lambda target, folder=folder: to_ctranslate2(folder, target))
        _make(base, "onnx-int4", lambda target, folder=folder: to_onnx(folder, target))


def to_hugging_face(model: Path, target: Path) -> None:
    """Weights, configuration and tokenizer as transformers reads them out of the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
    # What it saves is not quantised any more, and must not say so.
    loaded.hf_quantizer = None
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.save_pretrained(target)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(target)


def to_ctranslate2(folder: Path, target: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(target), quantization="int8")


def to_onnx(folder: Path, target: Path) -> None:
    """Accuracy level 4 multiplies in int8, its fastest."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", target]
    command += ["-p", "int4", "-e", "cpu", "-c", target / "cache"]
    subprocess.run([*command, "--extra_options", "int4_accuracy_level=4"], check=True)
    shutil.rmtree(target / "cache", ignore_errors=True)


def _make(base: Path, suffix: str, make: Callable[[Path], None]) -> Path:
    """Makes base.suffix, whole or not at all."""
    target = base.with_name(f"{base.name}.{suffix}")
    if not target.exists():
        part = base.with_name(f"{base.name}.{suffix}.part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(target)
    print(target)
    return target


if __name__ == "__main__":
    main()
