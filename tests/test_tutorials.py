"""The tutorials, run as they stand."""

import re
from pathlib import Path

import pytest
import torch

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def run(tutorial: Path) -> dict:
    """All its Python blocks, one after the other in one namespace."""
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", tutorial.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(tutorial), "exec"), names)
    return names


@pytest.fixture(scope="module")
def own_loop():
    return run(TUTORIALS / "clipper-in-your-own-loop.md")


def test_the_loop_around_the_clipper_trains_the_adapter_and_nothing_else(own_loop):
    names = own_loop
    trained = {name for name, parameter in names["model"].named_parameters() if parameter.requires_grad}
    assert trained == set(names["clipper"].parameters) == set(names["noisy"])
    assert all("lora_" in name for name in trained)
    assert all(p.any() for name, p in names["clipper"].parameters.items() if "lora_B" in name)  # they start at zero
    assert names["step"] == names["mechanism"].steps - 1


def test_the_loop_keeps_the_promise_that_it_prints(own_loop):
    mechanism = own_loop["mechanism"]
    assert mechanism.epsilon(delta=1e-3) <= 8
    noisy = torch.cat([tensor.flatten() for tensor in own_loop["noisy"].values()])
    assert noisy.std().item() == pytest.approx(mechanism.noise_stddev, rel=0.3)  # on so many numbers, mostly noise
