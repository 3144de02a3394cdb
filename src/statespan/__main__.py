"""`python -m statespan`: the command line, for where the program `statespan` is not on the path."""

import sys

from statespan.cli import main

if __name__ == "__main__":
    sys.exit(main())
