"""python -m headfold: the command, with a sentence instead of a traceback where its extra is not installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command."""
    try:
        from headfold.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"headfold: the command needs {error.name}, which is not installed. Run: pip install 'headfold[cli]'")
    run()


if __name__ == "__main__":
    main()
