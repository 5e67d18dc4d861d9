"""`python -m lowprec`: the `lowprec` command, where its script is not on the PATH."""

from lowprec.cli.main import main

if __name__ == "__main__":
    main()
