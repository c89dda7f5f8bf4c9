"""`python -m hfdtl_bayes` is the command line."""

from hfdtl_bayes.cli import main

if __name__ == "__main__":
    main()
