"""`python -m dml` is `dml`; torchrun starts it so."""

from dml.cli.main import main

if __name__ == "__main__":
    main()
