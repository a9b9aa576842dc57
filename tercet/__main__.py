"""`python -m tercet` is the `tercet` command."""

import sys


def main() -> int:
    """Run the command line of this process; returns the exit code. Ctrl-C counts while it is being imported too."""
    try:
        from tercet import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
