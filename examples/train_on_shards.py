"""Your own training loop over codeflow shards: `python train_on_shards.py data/`."""

import sys

import torch

from codeflow.load import ShardDataset
from codeflow.train.config import ModelConfig
from codeflow.train.model import LoopCoder
from codeflow.train.trainer import collate


def main(path: str, steps: int = 100) -> float:
    rows = ShardDataset(path, seed=0, epochs=None)  # add rank= and world_size= to share the stream
    model = LoopCoder(ModelConfig(vocab_size=rows.manifest.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.zeros(())
    for step, row in zip(range(1, steps + 1), rows, strict=False):
        input_ids, labels, documents = collate([row], "cpu")
        loss = model(input_ids, documents, labels).loss / (labels >= 0).sum().clamp(min=1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
