"""Makes a Q4_0 GGUF file of a Q4_1 one, to compare speed where llama.cpp has its repacked Q4_0 kernels.

    python -m benchmarks.compare.make_q4_0 SOURCE TARGET

Each Q4_1 tensor is dequantised and quantised again to Q4_0 by the `gguf` package (extra `oracle`); everything
else, the Q8_0 embedding included, is copied as it is. Quantised twice: right for speed, not for quality.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    convert(options.source, options.target)
    print(f"written to {options.target} ({options.target.stat().st_size / 1e6:.1f} MB)")


def convert(source: Path, target: Path) -> None:
    """Writes `target`; an existing file is replaced."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for field in reader.fields.values():
        # Those of the header and the architecture the writer adds itself.
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        element = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if kind == Type.Q4_1:
            data, kind = quantize(dequantize(data, kind), Type.Q4_0), Type.Q4_0
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
