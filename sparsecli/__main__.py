"""`python -m sparsecli`, which `torchrun -m` needs."""

from sparsecli.cli import main

if __name__ == "__main__":
    main()
