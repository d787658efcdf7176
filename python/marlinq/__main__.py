"""`python -m marlinq`, the same as the command `marlinq`."""

import sys

from marlinq.cli import main

if __name__ == "__main__":
    sys.exit(main())
