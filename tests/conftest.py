"""What all tests share: real digits, a network trained on them, and one seed."""

import copy

import pytest
import torch

from evenkeel import models
from evenkeel.audit.run import evaluate
from evenkeel.audit.tasks import Classify
from evenkeel.data import Data, digits
from evenkeel.train import fit


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data() -> Data:
    return digits()


@pytest.fixture(scope="session")
def _trained(data):
    return fit(lambda: models.build("resnet8_digits"), *data.train, epochs=8)


@pytest.fixture
def network(_trained):
    """Trained on digits to about 99 %; a copy, so that a test may change it."""
    return copy.deepcopy(_trained)


@pytest.fixture(scope="session")
def accuracy(data):
    """Percent right on the test images."""
    task = Classify()
    return lambda model: task.value(evaluate(model, data, task))
