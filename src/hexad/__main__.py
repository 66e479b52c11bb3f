"""`python -m hexad` is the `hexad` command."""

from __future__ import annotations

from hexad.cli import main

if __name__ == "__main__":
    main()
