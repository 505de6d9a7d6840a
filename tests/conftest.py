import pytest

from support.instance import Instance
from support.paths import demo_model, program


def pytest_configure(config):
    if not program().exists():
        pytest.exit(f"{program()} does not exist: run make build first", 2)


@pytest.fixture(scope="session")
def model():
    return demo_model()


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory, model):
    """Two nodes of one rank each, shared by the tests of a module; stopped in order at its end."""
    with Instance(tmp_path_factory.mktemp("two_nodes"), model, [1, 1]) as instance:
        instance.start()
        yield instance
        instance.stop()
