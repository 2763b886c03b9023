"""The playground: one page for a browser, and the policy under which the browser runs it.

The page holds its own style and script. The policy allows these two by their hashes and nothing
else, and connections to this server alone, so that no text of a model could do anything even if
the page inserted it as HTML, which it does not.
"""

import base64
import functools
import hashlib
import pathlib
import re

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

PAGE = pathlib.Path(__file__).with_name("playground.html")


async def page(_: Request) -> Response:
    """The page, with its headers."""
    html, headers = _loaded()
    return HTMLResponse(html, headers=headers)


@functools.cache
def _loaded() -> tuple[str, dict[str, str]]:
    html = PAGE.read_text(encoding="utf-8")
    return html, {
        "content-security-policy": policy(html),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def policy(html: str) -> str:
    """The Content-Security-Policy of a page with one inline style and one inline script."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(html, 'script')}",
            f"style-src {_hash(html, 'style')}",
            "connect-src 'self'",
            "img-src data:",  # the empty icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _hash(html: str, tag: str) -> str:
    """The hash by which a policy allows the contents of the page's only `tag`."""
    [contents] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digest = hashlib.sha256(contents.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
