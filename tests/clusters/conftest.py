"""Marks of the tests that need a cluster."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("cluster")
