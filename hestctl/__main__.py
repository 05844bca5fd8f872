"""``python -m hestctl``."""

from hestctl.cli.app import main

if __name__ == "__main__":
    main()
