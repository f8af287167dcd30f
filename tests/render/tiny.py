"""The command `stgfast` with a model `tiny`: python -m tests.render.tiny render ..."""

import sys

from stgfast import cli
from stgfast.render import models
from tests.render import pipes

if __name__ == "__main__":
    models.NAMED["tiny"] = pipes.NAMED
    sys.exit(cli.main())
