"""`hexad pull` and `hexad list`: the model store from the command line."""

from __future__ import annotations

from hexad.checkpoint import store


def pull(model: str) -> None:
    """Fetches a model if need be and prints its path, and nothing else, on stdout."""
    print(store.pull(model))


def list_models() -> None:
    """Prints a line for each model: its name, size, and path or "not downloaded"."""
    models = store.list_models()
    width = max(len(model.name) for model in models)
    for model in models:
        path = "not downloaded" if model.path is None else model.path
        print(f"{model.name:<{width}}  {model.size / 1e6:>9,.1f} MB  {path}")
