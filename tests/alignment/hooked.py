"""A random Llama of four layers, and what it says with a hidden state replaced by a hook in a full forward pass."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastsmc.trunk import Trunk

VOCAB, LAYERS, H = 11, 4, 32


def make_trunk(seed=0, attention="sdpa", dtype=torch.float32, **config):
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCAB, hidden_size=H, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
        initializer_range=0.3, attn_implementation=attention,
    )  # fmt: skip
    return Trunk(LlamaForCausalLM(LlamaConfig(**shape | config)).to(dtype))


def states(trunk, ids, layer):
    """What a layer puts out, (T, H)."""
    return trunk.watch(ids, layer)[0]


def hooked_logits(trunk, ids, layer, position, change):
    """(V,) of the last position, with the layer's output at `position` put through `change`."""

    def hook(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        x = torch.cat([x[:, :position], change(x[:, position])[:, None], x[:, position + 1 :]], 1)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = trunk.layers[layer].register_forward_hook(hook)
    try:
        return trunk.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
    finally:
        handle.remove()
