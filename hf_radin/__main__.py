"""`python -m hf_radin`: the command line."""

import sys

from hf_radin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
