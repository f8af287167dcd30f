"""Which requests a server allows: those of its own page and of programs, none of other sites, and with a token only
those that have it.
"""

from __future__ import annotations

import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Pages of other sites must not frame this page, read from it, or run anything in it.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
COOKIE = "stgfast-{port}"  # cookies apply to all ports of a host


def is_loopback(host: str) -> bool:
    """Whether a host is this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Pass allowed requests to an application, and refuse the others; with a token, those without it.

    A browser says where a request comes from: a page cannot change `Origin` and `Sec-Fetch-Site`. A host name that
    resolves to this machine may be another site's, so without a token the host must be this machine's own.
    """

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"a connection: got {scope['type']}, expected http")
        status, why = self._refusal(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
                if not why and self._in_link(scope):
                    cookie = f"{self._cookie(scope)}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                    headers.append("Set-Cookie", cookie)
            await send(message)

        answer = PlainTextResponse(f"{why}\n", status) if why else self.app
        await answer(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        """Why a request is refused; "" if it is allowed."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.token and not is_loopback(_name(host)):
            return 403, "this server answers to localhost alone"
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and not _follows_link(scope, headers):
            return 403, "a page of another site may not use this server"
        origin = headers.get("origin")
        if origin is not None and not _same(origin, host):
            return 403, "a page of another site may not use this server"
        if self.token and not self._has_token(scope, headers):
            return 401, "open the link that stgfast serve printed"
        return 200, ""

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        if self._in_link(scope):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip()):
            return True
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return False
        found = cookies.get(self._cookie(scope))
        return found is not None and self._is_token(found.value)

    def _in_link(self, scope: Scope) -> bool:
        if not self.token or scope["path"] != "/":
            return False
        return self._is_token(QueryParams(scope["query_string"]).get("token", ""))

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self.token.encode())

    @staticmethod
    def _cookie(scope: Scope) -> str:
        server = scope.get("server") or ("", 0)
        return COOKIE.format(port=server[1])


def _name(host: str) -> str:
    """A host without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _same(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(host) and parts.netloc.lower() == host.lower()


def _follows_link(scope: Scope, headers: Headers) -> bool:
    """Whether the request comes from a link to the page, on any site."""
    navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return bool(navigates and scope["method"] == "GET" and scope["path"] == "/")
