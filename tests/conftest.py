"""What all tests share: quiet TensorFlow, and `--slow`."""

import os

import pytest

# Before any test module imports TensorFlow; child processes inherit it.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--slow', action='store_true', help='run the tests marked slow too')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_name = any('::' in argument for argument in config.args)
    if config.getoption('--slow') or config.getoption('-m') or by_name:
        return  # they are asked for
    slow = [item for item in items if item.get_closest_marker('slow')]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture
def eager(monkeypatch):
    """See command_line.running_eagerly."""
    from command_line import running_eagerly  # imports TensorFlow, which not all tests need

    with running_eagerly(monkeypatch):
        yield
