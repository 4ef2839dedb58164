"""Which backends of `weigh`, `draw` and `redraw` can run here, and calls that put tensors where a backend wants them.

Triton's kernels run compiled on a GPU, and interpreted on CPU tensors where TRITON_INTERPRET=1 was set before Triton
was imported: tests/ops/test_interpreted.py starts such a process.
"""

import os

import torch

from fastsmc import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
BACKENDS = ("cpu", "torch", *(("triton",) if INTERPRETED or CUDA else ()))


def slow(backend):
    """An interpreted program takes some milliseconds: fewer and smaller cases then."""
    return backend == "triton" and INTERPRETED


def to(backend, value):
    """Tensors, also those in a (named) tuple, on the backend's device."""
    device = "cuda" if backend == "triton" and CUDA else "cpu"
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [to(backend, v) for v in value]
        return tuple(moved) if type(value) is tuple else type(value)(*moved)
    return value


def _on_cpu(result):
    cpu = [t.cpu() for t in result]
    if isinstance(result, ops.Weighed) and result.lse_psi is result.lse:
        cpu[1] = cpu[0]
    return type(result)(*cpu)


def weigh(logits, log_psi=None, *, backend, **kw):
    """ops.weigh; results on the CPU."""
    logits, log_psi = to(backend, logits), to(backend, log_psi)
    return _on_cpu(ops.weigh(logits, log_psi, backend=backend, **{k: to(backend, v) for k, v in kw.items()}))


def draw(logits, weighed, rows, u, log_psi=None, *, backend, **kw):
    """ops.draw; results on the CPU."""
    args = [to(backend, v) for v in (logits, weighed, rows, u, log_psi)]
    return _on_cpu(ops.draw(*args, backend=backend, **{k: to(backend, v) for k, v in kw.items()}))


def redraw(*args, backend, **kw):
    """ops.redraw; results on the CPU."""
    return _on_cpu(ops.redraw(*to(backend, args), backend=backend, **{k: to(backend, v) for k, v in kw.items()}))


def random_mask(rows, vocab, share=0.5, seed=0):
    """(allowed (rows, vocab) bool, its words (rows, ceil(vocab / 32)) int32, with junk in the bits behind the end)."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.rand(rows, -(-vocab // 32) * 32, generator=g) < share
    return bits[:, :vocab], pack(bits)


def pack(bits):
    """Words of a bool matrix whose width is a multiple of 32."""
    words = (bits.unflatten(1, (-1, 32)).long() << torch.arange(32)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).int()
