"""SparseMoE inside a transformer other than CLIP: a small causal model learns to sort digits.

    python examples/sparse_transformer.py             # about 20 seconds on one CPU core

A sequence is a list of 3 to 8 digits, an equals sign, and the digits in order; the model is trained to continue after
the equals sign. Shorter sequences are padded, and the padding is left out of the experts' work with a mask.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipup import SparseMoE, aux_loss, moe_metrics

EQUALS, PADDING, VOCABULARY = 10, 11, 12
LONGEST = 8
LENGTH = 2 * LONGEST + 1


class Block(nn.Module):
    """A pre-norm transformer block whose MLP is sparse."""

    def __init__(self, width: int, heads: int, num_experts: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.moe = SparseMoE(
            width, 2 * width, num_experts=num_experts, top_k=2, capacity_factor=1.25, balance_weight=0.01, z_weight=1e-4
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [batch, length, width]; mask: [batch, length] bool, False on padding."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.moe(self.norm_2(x), mask)


class SortingTransformer(nn.Module):
    """Predicts the next token of a sequence; [batch, length] ids to [batch, length, VOCABULARY] logits."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2, num_experts: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList(Block(width, heads, num_experts) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != PADDING
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def make_batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences [size, LENGTH], and targets [size, LENGTH] with -100 wherever there is nothing to predict."""
    digits = torch.randint(0, 10, (size, LONGEST), generator=generator)
    lengths = torch.randint(3, LONGEST + 1, (size,), generator=generator)
    sequences = torch.full((size, LENGTH), PADDING)
    targets = torch.full((size, LENGTH), -100)
    for row, (values, length) in enumerate(zip(digits, lengths.tolist(), strict=True)):
        ordered = values[:length].sort().values
        sequences[row, :length] = values[:length]
        sequences[row, length] = EQUALS
        sequences[row, length + 1 : 2 * length + 1] = ordered
        targets[row, length : 2 * length] = ordered
    return sequences, targets


def train(steps: int, batch_size: int = 64, seed: int = 0) -> tuple[SortingTransformer, list[float]]:
    """Trains a fresh model; returns it with the loss of every step, in nats a digit."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SortingTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(steps):
        sequences, targets = make_batch(batch_size, generator)
        loss = F.cross_entropy(model(sequences).flatten(0, 1), targets.flatten())
        (loss + aux_loss(model)).backward()  # the losses that keep the experts evenly used
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {history[-1]:.3f}  {describe(model)}")
    return model, history


def describe(model: nn.Module) -> str:
    """How evenly the experts were used in the last forward."""
    loads = [f"{float(m['load'].max() * len(m['load'])):.2f}" for m in moe_metrics(model).values()]
    dropped = [f"{float(m['dropped']):.1%}" for m in moe_metrics(model).values()]
    return f"busiest expert over mean, by layer: {', '.join(loads)}  dropped: {', '.join(dropped)}"


@torch.no_grad()
def accuracy(model: nn.Module, size: int = 256, seed: int = 1) -> float:
    """Share of the digits of fresh sequences that the model gets right."""
    sequences, targets = make_batch(size, torch.Generator().manual_seed(seed))
    asked = targets >= 0
    return (model.eval()(sequences).argmax(-1) == targets)[asked].float().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    model, _ = train(parser.parse_args(argv).steps)
    print(f"digits right on fresh sequences: {accuracy(model):.1%}")


if __name__ == "__main__":
    main()
