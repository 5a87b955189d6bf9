import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(threads):
    """No threads that wait for each other's cores: the networks under test are small."""
    torch.set_num_threads(1)
