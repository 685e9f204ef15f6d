"""One server for all tests that leave it as it was."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
from http_servers import served


@pytest.fixture(scope="session")
def server():
    with served(api_key="secret", max_open=8, max_body_bytes=20_000) as (address, _):
        yield address
