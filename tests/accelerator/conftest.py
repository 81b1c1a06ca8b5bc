"""Marks of the tests that train on an accelerator, or on one that is played."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("slow")
