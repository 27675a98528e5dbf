"""The program as a module, for `python -m` and `torchrun -m`."""

from sparsecli.cli import main

if __name__ == "__main__":
    main()
