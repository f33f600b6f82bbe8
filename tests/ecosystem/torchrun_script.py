"""Trains for a few steps under torchrun, with a checkpoint a step. A worker dies once if a file says so.

Arguments: folder of the checkpoints and the result; and optionally the step before which rank 1 dies, once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import perceiver_core as pc
from tests.ecosystem.sharded import double, loss_of, own_part

STEPS = 4


def main(folder: Path, dies_before: int) -> None:
    dist.init_process_group("gloo")
    model, inputs = double("image")
    wrapped = DistributedDataParallel(pc.checkpoint_activations(model))
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    checkpoint, start = folder / "checkpoint.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, STEPS):
        if step == dies_before and dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(3)
        loss_of(wrapped(own_part(inputs))).backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, folder / "new.pt")
            (folder / "new.pt").replace(checkpoint)
        dist.barrier()
    if dist.get_rank() == 0:
        pc.save(wrapped, folder / "model")
        (folder / "started_at.txt").write_text(str(start))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else -1)
