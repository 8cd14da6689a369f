"""The command `diffscaler`: starts the commands, and says so if what they need is not installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.stderr.write(
            f"diffscaler: the command line needs {error.name}; run: pip install 'diffscaler[cli]'\n"
        )
        raise SystemExit(1) from None
    app()


if __name__ == "__main__":
    main()
