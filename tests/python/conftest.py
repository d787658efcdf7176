import marlinq
import pytest
from support import kernel_parameters


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `kernel` runs once for each CPU kernel."""
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", kernel_parameters())


@pytest.fixture
def context() -> marlinq.Context:
    """A context of the test's own."""
    return marlinq.Context("cpu", 2)
