"""`python -m jaxtune` is the `jaxtune` command."""

from jaxtune.cli import run

if __name__ == "__main__":
    run()
