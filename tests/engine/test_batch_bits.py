"""What the log says at start-up of a population's companions: whether a row's bits hang on the rows beside it."""

import pytest
import torch
from vllm.model_executor.layers.linear import LinearBase

from fastsmc.vllm import batch_bits
from fastsmc.vllm import model as model_module

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they always may, and no layer is tried")


def unlike(forward, sizes):
    """What a layer gives, and for batches of some sizes the next number to it."""

    def changed(rows, *args):
        out = forward(rows, *args)
        first = out[0] if isinstance(out, tuple) else out
        if len(rows) in sizes:
            first[0, -1] = torch.nextafter(first[0, -1], torch.tensor(torch.inf))
        return out

    return changed


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(model_module.logger, "info", lambda line, *args: lines.append(line % args))
    return lines


def test_nothing_is_said_where_bits_are_the_same(runner, told):
    runner.model._compare_batches()
    assert not told


@pytest.mark.parametrize("which", ["first", "last", "head"])
def test_a_layer_that_differs_is_said_with_its_sizes(runner, told, monkeypatch, which):
    model = runner.model
    layers = [module for module in model._model.modules() if isinstance(module, LinearBase)]
    assert len({(layer.input_size, layer.output_size) for layer in layers}) == 4
    if which == "head":
        monkeypatch.setattr(model, "logits", unlike(model.logits, (17,)))
        want = "17"
    else:  # of each shape the first one is tried
        layer = layers[0] if which == "first" else layers[3]
        monkeypatch.setattr(layer, "forward", unlike(layer.forward, (3, 64)))
        want = "3, 64"
    monkeypatch.setattr(batch_bits, "SIZES", (3, 17, 64))
    model._compare_batches()
    (line,) = told
    assert f"on this CPU, say {want} instead of 2" in line and 'shared_forward="never"' in line


def test_a_gpu_is_told_of_untried(runner, told, monkeypatch):
    monkeypatch.setattr(runner.model, "device", torch.device("cuda"))
    monkeypatch.setattr(model_module, "differing_sizes", None)
    runner.model._compare_batches()
    assert "(on GPUs)" in told[0]
