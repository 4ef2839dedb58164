"""Boundless DAS on hidden states with a planted variable, against pyvene's formula and pyvene itself, and its files."""

import json

import pytest
import torch
from torch.nn import functional as F

from fastsmc.alignment import BoundlessDAS
from fastsmc.alignment.das import check_basis

D = 32


def planted(seed, n=1024, d=D):
    """Two binary variables, each along two of d directions, amid noise; the head says whether both are on.

    Returns:
        hb, hs, labels under the interchange of the first variable, head.
    """
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q

    def states():
        z = torch.randint(0, 2, (n, 2), generator=generator).float() * 2 - 1
        noise = torch.randn(n, d - 4, generator=generator)
        return torch.cat([z[:, :1].expand(-1, 2), z[:, 1:].expand(-1, 2), noise], 1) @ turn.T

    def head(h):
        c = h @ turn[:, :4]
        both = 4.0 * torch.minimum(c[:, :2].mean(1), c[:, 2:].mean(1))
        return torch.stack([-both, both], 1)

    hb, hs = states(), states()
    return hb, hs, head(hb + (hs - hb) @ turn[:, :2] @ turn[:, :2].T).argmax(1), head


def agreement(basis, hb, hs, labels, head):
    return (head(hb + (hs - hb) @ basis @ basis.T).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("seed, rank", [(0, None), (1, None), (2, None), (3, 8)])
def test_planted_subspace_is_found(seed, rank):
    hb, hs, labels, head = planted(seed)
    das = BoundlessDAS(D, seed=seed, rank=rank)
    assert das.fit(hb[:768], hs[:768], labels[:768], head, 800) is das and len(das.history) == 800
    basis, held = das.basis(), (hb[768:], hs[768:], labels[768:], head)
    assert basis.shape[1] <= 8 and basis.dtype == torch.float32
    assert agreement(torch.zeros(D, 1), *held) < 0.85  # without an intervention
    assert agreement(basis, *held) >= 0.99
    assert das.boundary < 0.4 and das.history[-1]["temperature"] == pytest.approx(0.1)


def test_basis_holds_the_columns_before_the_boundary():
    das = BoundlessDAS(8)
    for b, k in ((1.0, 8), (0.5, 4), (0.43, 3), (0.44, 4), (0.07, 1), (1e-3, 1)):
        das._b.data.fill_(b)
        assert das.basis().shape == (8, k)
        torch.testing.assert_close(das.basis(), das.rotation().detach()[:, :k])
    low = BoundlessDAS(8, rank=2)
    assert low.rotation().shape == (8, 2) and low.basis().shape == (8, 1)


@pytest.mark.parametrize("rank, mask", [(None, "one-sided"), (5, "one-sided"), (None, "pyvene")])
def test_rotation_is_orthonormal_and_its_gradient_is_that_of_differences(rank, mask):
    das = BoundlessDAS(6, seed=1, rank=rank, mask=mask)
    generator = torch.Generator().manual_seed(0)
    das._turn.data = 3.0 * torch.randn(das._turn.shape, generator=generator)
    r = das.rotation()
    torch.testing.assert_close(r.T @ r, torch.eye(r.shape[1]), atol=3e-6, rtol=0)
    das._start, das._turn = das._start.double(), das._turn.detach().double().requires_grad_()
    das._b = das._b.detach().double().requires_grad_()
    hb, hs = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)

    def swapped(turn, b):
        das._turn, das._b = turn, b
        return das.swap(hb, hs, 0.7)

    assert torch.autograd.gradcheck(swapped, (das._turn, das._b))


def pyvene_step(x, b, hb, hs, labels, head, temperature, start):
    """pyvene 0.1.8's BoundlessRotatedSpaceIntervention, written out: torch's orthogonal with its matrix exponential,
    both sides of the mask, the boundary as a share of d within [1e-3, 1], cross entropy + boundary."""
    lower = x.tril()
    weight = start @ torch.matrix_exp(lower - lower.T)
    columns = torch.arange(len(x))
    mask = torch.sigmoid(columns / temperature) * torch.sigmoid((b.clamp(1e-3, 1) * len(x) - columns) / temperature)
    out = ((1.0 - mask) * (hb @ weight) + mask * (hs @ weight)) @ weight.T
    return F.cross_entropy(head(out), labels) + b


def curve_of(das, steps, hb, hs, labels, head):
    return [record["loss"] for record in das.fit(hb, hs, labels, head, steps, batch=len(hb), lr=1e-2).history]


def peer_curve(parameters, loss_at, steps):
    optimizer = torch.optim.Adam([{"params": parameters[:1], "lr": 1e-2}, {"params": parameters[1:], "lr": 1e-2}])
    curve = []
    for temperature in torch.linspace(50.0, 0.1, steps):
        loss = loss_at(temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def test_pyvene_mask_follows_its_formula():
    hb, hs, labels, head = planted(0, n=128)
    das = BoundlessDAS(D, seed=4, mask="pyvene")
    start, x, b = das._start.clone(), torch.zeros(D, D, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    peer = peer_curve([x, b], lambda t: pyvene_step(x, b, hb, hs, labels, head, t, start), 50)
    curve = curve_of(das, 50, hb, hs, labels, head)
    assert curve[-1] < 0.9 * curve[0] and curve == pytest.approx(peer, rel=1e-3)
    ours = curve_of(BoundlessDAS(D, seed=4), 50, hb, hs, labels, head)
    assert ours != pytest.approx(peer, rel=0.02)  # which says that the comparison can fail


def test_pyvene_mask_follows_pyvene():
    interventions = pytest.importorskip("pyvene.models.interventions")
    hb, hs, labels, head = planted(0, n=128)
    torch.manual_seed(0)
    peer = interventions.BoundlessRotatedSpaceIntervention(embed_dim=D)
    das = BoundlessDAS(D, mask="pyvene")
    das._begin(peer.rotate_layer.weight.detach().clone(), 0.5)
    (x,) = peer.rotate_layer.parameters()

    def loss_at(temperature):
        peer.set_temperature(temperature)
        return F.cross_entropy(head(peer(hb, hs)), labels) + peer.intervention_boundaries.sum()

    curve = peer_curve([x, peer.intervention_boundaries], loss_at, 50)
    assert curve_of(das, 50, hb, hs, labels, head) == pytest.approx(curve, rel=0.02)


def test_files(tmp_path):
    hb, hs, labels, head = planted(0, n=64)
    for rank in (None, 5):
        das = BoundlessDAS(D, seed=3, rank=rank).fit(hb, hs, labels, head, 20, lr=0.05)
        das.save(tmp_path)
        loaded = BoundlessDAS.load(tmp_path)
        assert loaded.card == das.card and loaded.card.steps == 20 and loaded.boundary == das.boundary
        assert torch.equal(loaded.basis(), das.basis())
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps(card | {"rank": 6}))
    with pytest.raises(ValueError, match="alignment .*: rotation is \\(32, 5\\), the card says d=32, rank=6"):
        BoundlessDAS.load(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps(card | {"mask": "soft"}))
    with pytest.raises(ValueError, match="alignment .*: mask='soft': must be one of"):
        BoundlessDAS.load(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps(card | {"version": 2}))
    with pytest.raises(ValueError, match="its version is 2; this fastsmc reads 1"):
        BoundlessDAS.load(tmp_path)
    with pytest.raises(ValueError, match="cannot read card.json"):
        BoundlessDAS.load(tmp_path / "nowhere")


def test_a_save_that_is_cut_off_leaves_no_card(tmp_path, monkeypatch):
    das = BoundlessDAS(4)
    das.save(tmp_path)

    def cut_off(self, text):
        self.write_bytes(text[:9].encode())
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_text", cut_off)
    with pytest.raises(OSError, match="no space left"):
        das.save(tmp_path)
    assert not (tmp_path / "card.json").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hb": torch.zeros(4, 5)}, "hb: is \\(4, 5\\); must be \\(n, 32\\)"),
        ({"hs": torch.full((4, D), float("nan"))}, "hs\\[0\\]: is NaN or infinite, as are 4 of 4"),
        ({"hs": torch.zeros(3, D)}, "are 4, 3 and 4; must be as many"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "labels: has -1"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, "labels: has 2; the head has 2 logits"),
        ({"labels": torch.zeros(4)}, "labels: is \\(4,\\) of torch.float32"),
        ({"head": lambda h: h[0]}, "head: gives \\(32,\\) for 4 pairs"),
        ({"head": lambda h: h.detach()[:, :2]}, "head: gives logits without gradients"),
        ({"steps": 0}, "steps=0: must be an integer of at least 1"),
        ({"batch": 0}, "batch=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"temperature": (0.0, 0.0)}, "temperature\\[0\\]=0.0"),
        ({"temperature": (0.1, 50.0)}, "temperature=\\(0.1, 50.0\\): rises"),
        ({"temperature": 3.0}, "temperature=3.0: must be two numbers"),
    ],
)
def test_refusals(change, words):
    asked = dict(hb=torch.zeros(4, D), hs=torch.ones(4, D), labels=torch.tensor([0, 1, 0, 1]), head=lambda h: h[:, :2])
    with pytest.raises(ValueError, match=words):
        BoundlessDAS(D).fit(**{**asked, "steps": 2, **change})


def test_refusals_of_bases_and_sizes():
    with pytest.raises(ValueError, match="basis: its columns are not orthonormal, .* off the identity by up to 1"):
        check_basis(2.0**0.5 * torch.eye(4)[:, :2], 4)
    with pytest.raises(ValueError, match="basis: is \\(3, 4\\); must be \\(4, k\\)"):
        check_basis(torch.eye(4)[:3], 4)
    with pytest.raises(ValueError, match="basis: its columns are not orthonormal"):
        check_basis(torch.full((4, 1), float("nan")), 4)
    with pytest.raises(ValueError, match="rank=9: must be an integer from 1 to 8"):
        BoundlessDAS(8, rank=9)
    with pytest.raises(ValueError, match="mask='soft': must be one of"):
        BoundlessDAS(8, mask="soft")
    with pytest.raises(ValueError, match="rank=2: pyvene has none"):
        BoundlessDAS(8, rank=2, mask="pyvene")
