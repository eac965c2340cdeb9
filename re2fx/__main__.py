"""``python -m re2fx``."""

from .cli import main

main()
