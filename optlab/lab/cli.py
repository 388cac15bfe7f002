"""The `optlab` command: checks that its extras are there, and turns mistakes into one line."""

import sys
from importlib.util import find_spec

from optlab.lab.config import BadInput

# What the `race` extra installs, by the names they are imported with.
EXTRAS = ("flax", "matplotlib", "orbax", "rich", "tyro")
_USAGE, _INTERRUPTED = 2, 130  # as a shell counts them


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    missing = [name for name in EXTRAS if find_spec(name) is None]
    if missing:
        return _fail(
            f"optlab: the command line needs {', '.join(missing)}, got an environment without. "
            'Run: pip install "optlab[race]"'
        )
    from optlab.lab import commands  # imports the extras

    try:
        return commands.run(sys.argv[1:] if argv is None else argv)
    except BadInput as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("optlab: stopped at once; what was saved before is whole.", file=sys.stderr)
        return _INTERRUPTED


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return _USAGE
