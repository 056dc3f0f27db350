"""`python -m codeflow`: the same as the `codeflow` command."""

from codeflow.cli import main

if __name__ == "__main__":
    main()
