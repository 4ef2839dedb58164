"""GET /smc: one static page that asks POST /v1/smc and draws what comes back. It loads nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

from fastapi import FastAPI
from fastapi.responses import HTMLResponse


def attach(app: FastAPI) -> None:
    """Adds the route. Like all beside /v1 it asks for no key: the page holds no secret."""
    html = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    headers = {
        "Content-Security-Policy": security_policy(html),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    @app.get("/smc", response_class=HTMLResponse, include_in_schema=False)
    async def smc_page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)


def security_policy(html: str) -> str:
    """Makes the policy under which a page's own scripts and style sheets run, known by hash, and nothing else.

    What it may load is the answers of the server that it came from.
    """

    def own(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(p.encode()).digest()).decode()}'" for p in parts)

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {own('script')}",
            f"style-src {own('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
