"""The student that the tests of calls share."""

import pytest

from tests.students import sampled, tiny_student


@pytest.fixture(scope="session")
def student():
    return tiny_student()


@pytest.fixture(scope="session")
def samples(student):
    return sampled(student)
