"""`python -m danlu`."""

from danlu.cli.main import main

if __name__ == "__main__":
    main()
