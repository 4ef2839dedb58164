"""Groups over a model of your own: one call of the model per step, whatever the number of groups. docs/embedding.md."""

import torch
from torch import Tensor, nn

from fastsmc import Population, Potential, SMCParams
from fastsmc.smc import Group, Wants, arrange, finish

VOCAB, HIDDEN = 50, 32


class Model(nn.Module):
    """A recurrent language model. Its cache has a row per slot of each group: the state after the slot's history."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(VOCAB, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.cache: dict[Group, Tensor] = {}

    def prefill(self, group: Group) -> None:
        """Puts all of the prompt but its last token, which the first step appends, into the group's first slot."""
        state = torch.zeros(1, HIDDEN)
        for token in group.prompt[:-1]:
            state = self.cell(self.embed(torch.tensor([token])), state)
        self.cache[group] = state.expand(group.n, -1).clone()

    def append(self, wants: Wants) -> tuple[Tensor, Tensor]:
        """Appends the tokens that groups want; returns logits (R, V) and states (R, H)."""
        cache = torch.cat([self.cache[group] for group in wants.groups])
        if wants.moves is not None:
            cache = cache[wants.moves]
        cache[wants.slots] = states = self.cell(self.embed(wants.tokens), cache[wants.slots])
        self.cache.update(zip(wants.groups, cache.split([group.n for group in wants.groups]), strict=True))
        return self.head(states), states


class FewRepeats(Potential):
    """φ(s) = exp(−2 · tokens that equal the one before)."""

    def complete(self, state):
        return -2.0 * ((state.tokens[:, 1:] == state.tokens[:, :-1]) & (state.tokens[:, 1:] >= 0)).sum(1).double()


@torch.inference_mode()
def main() -> list[Population]:
    torch.manual_seed(0)
    model = Model()
    params = [SMCParams(n_particles=64, max_tokens=20, seed=seed) for seed in range(8)]
    groups = [Group(p, FewRepeats(), prompt=[1, 2, 3], stop_token_ids={0}) for p in params]
    for group in groups:
        model.prefill(group)
    while going := [group for group in groups if not group.done]:
        for cohort in arrange(going):
            finish(cohort.take(*model.append(cohort.wants())))
    return [group.population() for group in groups]


if __name__ == "__main__":
    print("log Z of each group:", ", ".join(f"{population.log_z:.3f}" for population in main()))
