"""`stgfast verify`: its arguments and output.

Exit codes: 0 equal to the plain method; 1 not equal; 2 the arguments or the model are wrong.
"""

from __future__ import annotations

import argparse
import sys
from typing import TextIO

from stgfast.render.command import add_model, defaults_of

EQUAL, NOT_EQUAL, WRONG = 0, 1, 2
PROMPT = "a cat walks through tall grass"


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="prompt of the compared call")
    add_model(parser)


def run_verify(arguments: argparse.Namespace, stdout: TextIO | None = None, stderr: TextIO | None = None) -> int:
    from stgfast.errors import DeviceError, SettingsError, UnsupportedPipelineError
    from stgfast.render.calls import arguments_of
    from stgfast.render.loading import Loading
    from stgfast.render.models import described
    from stgfast.render.planning import jobs_of
    from stgfast.verify.run import verify

    stdout, stderr = stdout or sys.stdout, stderr or sys.stderr
    try:
        model = described(arguments.model, trust=arguments.trust)
        (job,) = jobs_of(model, [arguments.prompt], 1, 0, defaults_of(arguments.defaults))
        pipe = model.load(Loading(arguments.dtype, arguments.device, arguments.offload))
        verdict = verify(pipe, **arguments_of(pipe, [job]))
    except (SettingsError, UnsupportedPipelineError, DeviceError) as error:
        stderr.write(f"stgfast verify: {error}\n")
        return WRONG
    stdout.write(f"{verdict}\n")
    return EQUAL if verdict.ok else NOT_EQUAL
