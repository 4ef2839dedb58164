"""The real model is there once, complete, and other names pass through."""

import json

from fastsmc.models import resolve, smollm2


def test_the_model_is_complete_and_found_again():
    path = smollm2()
    assert path == smollm2() and resolve("smollm2") == str(path)
    config = json.loads((path / "config.json").read_text())
    assert config["hidden_size"] == 576 and config["num_hidden_layers"] == 30
    assert (path / "model.safetensors").stat().st_size > 2e8 and (path / "tokenizer.json").exists()


def test_other_names_pass_through():
    assert resolve("org/model") == "org/model" and resolve("/some/where") == "/some/where"
