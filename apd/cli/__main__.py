"""``python -m apd.cli``."""

from apd.cli import app

app()
