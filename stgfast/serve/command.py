"""`stgfast serve`: the page of a folder, at an address of this machine."""

from __future__ import annotations

import argparse
import os
import re
import secrets
import socket
import sys
from pathlib import Path

from stgfast.errors import SettingsError, wrong

VARIABLE = "STGFAST_TOKEN"
INTERRUPTED = 130


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder of clips")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8765, help="port (default: 8765; 0: any free port)")
    parser.add_argument(
        "--token", action="store_true", help=f"ask for one on this machine too; {VARIABLE} in the environment is it"
    )


def run_serve(arguments: argparse.Namespace) -> int:
    from stgfast.queue.desk import Desk
    from stgfast.queue.state import StoreError

    try:
        with Desk(arguments.out):
            pass  # it exists and is not damaged
        token = token_for(arguments.host, asked=arguments.token)
        listening = listen(arguments.host, arguments.port)
    except SettingsError as error:
        sys.stderr.write(f"stgfast serve: {error}\n")
        return 2
    except StoreError as error:
        sys.stderr.write(f"stgfast serve: {error}\n")
        return 3
    sys.stdout.write(f"{link(listening, arguments.host, token)}\n")
    sys.stdout.flush()
    return _serve(arguments.out, listening, token)


def token_for(host: str, *, asked: bool) -> str:
    """The token in the link to the page; "" if everybody on this machine may open it."""
    from stgfast.serve.guard import is_loopback

    given = os.environ.get(VARIABLE, "")
    if given and not re.fullmatch(r"[A-Za-z0-9_-]{16,200}", given):
        raise wrong(VARIABLE, "another text", "16 or more of letters, digits, _ and -")
    if is_loopback(host) and not (asked or given):
        return ""
    return given or secrets.token_urlsafe(24)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket at an address of this machine."""
    if not 0 <= port < 1 << 16:
        raise wrong("--port", port, "a number from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise wrong("--host", f"{host}, port {port}", f"an address of this machine ({error})") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise wrong("--port", port, f"one of {host} that is free ({error})") from None
    return made


def link(listening: socket.socket, host: str, token: str) -> str:
    port = listening.getsockname()[1]
    shown = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http://{shown}:{port}/{f'?token={token}' if token else ''}"


def _serve(out: Path, listening: socket.socket, token: str) -> int:
    import uvicorn

    from stgfast.serve.app import application

    config = uvicorn.Config(
        application(out, token),
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        access_log=False,  # it would contain the token
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=2,  # a playing video would keep it open
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
