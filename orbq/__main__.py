"""``python -m orbq``: the command line."""

from orbq.cli import main

if __name__ == "__main__":
    main()
