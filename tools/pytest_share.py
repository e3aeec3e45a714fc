"""pytest plugin: keeps one share of the tests, `TEST_SHARE=k/n`; any n in a row are all of them together.

The share of a test follows from its name alone, scattered so that no share lacks a dtype or a layout.
"""

from __future__ import annotations

import os
import zlib

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, shares = map(int, os.environ.get("TEST_SHARE", "0/1").split("/"))
    mine = [(zlib.crc32(item.nodeid.encode()) - share) % shares == 0 for item in items]
    config.hook.pytest_deselected(items=[item for item, keep in zip(items, mine, strict=True) if not keep])
    items[:] = [item for item, keep in zip(items, mine, strict=True) if keep]
