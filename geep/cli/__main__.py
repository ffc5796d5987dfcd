"""`python -m geep.cli`: the same as the command `geep`."""

from geep.cli import app

app()
