"""`python -m hf_radin`: the command line."""

from hf_radin.cli.main import run

if __name__ == "__main__":
    run()
