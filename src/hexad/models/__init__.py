"""Model definitions, one file per architecture; the file's name is its `model_type`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hexad.errors import CheckpointError, UnsupportedError
from hexad.graph import Graph
from hexad.weights import Weight


def known_models() -> list[str]:
    """The `model_type`s hexad has a definition for."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build_graph(
    config: Mapping[str, Any], weights: Mapping[str, Weight], source: Path | None = None
) -> Graph:
    """The graph of a checkpoint, from its config (Hugging Face's keys) and its weights (Hugging Face's
    names).

    source: the file, for messages. Raises UnsupportedError for an unknown `model_type`, CheckpointError
    for a config or weights that are incomplete or contradict each other, and UnsupportedError for a weight
    that no node reads: a model that stores it computes with it.
    """
    graph = Graph(weights)
    try:
        model = _model(config.get("model_type"))
        model.build(model.Config.from_dict(config), graph)
        _refuse_unread(graph)
    except CheckpointError as error:
        if source is None:
            raise
        raise type(error)(f"{source}: {error}") from error
    return graph


def _refuse_unread(graph: Graph) -> None:
    read = {name for node in graph.nodes for name in node.weights}
    for name in graph.weights:
        if name not in read:
            raise UnsupportedError(f"tensor {name!r:.200} is not supported: not part of this model")


def _model(model_type: object) -> Any:
    """The module that defines an architecture. The name comes out of a file: it is looked up, never just
    imported."""
    if not isinstance(model_type, str):
        raise CheckpointError(f"the config's model_type is {model_type!r}; a name expected")
    if model_type not in known_models():
        raise UnsupportedError(f"unknown architecture {model_type!r}; known are {', '.join(known_models())}")
    return importlib.import_module(f"hexad.models.{model_type}")
