import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """No threads that wait for each other's cores: the networks under test are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
