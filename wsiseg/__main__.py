"""`python -m wsiseg` runs the command line."""

from wsiseg.cli.main import main

if __name__ == "__main__":
    main()
