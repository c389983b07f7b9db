"""What every test shares: the same random numbers each time, and hypothesis without its clock."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("repeatable")


# Waiting threads of many small tests would fight for the cores; tests of threads ask for more.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """torch.set_num_threads for the length of a test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)
