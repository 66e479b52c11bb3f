"""Opening models: what a path holds, read into hexad's config keys, tensor names and tokenizer."""

from hexad.checkpoint.checkpoint import Checkpoint
from hexad.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
