"""Expert parallelism: every process holds a part of the experts and a part of the batch.

torchrun --nproc-per-node 2 examples/expert_parallel.py
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmoe_rs.expert_parallel import clip_grad_norm_, shard_experts
from fastmoe_rs.nn import MoE
from tiny import text


class Bytes(nn.Module):
    """The next byte from the last one, by way of two Mixture-of-Experts layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.layers = nn.ModuleList(MoE(64, 128, 8, 2) for _ in range(2))
        self.head = nn.Linear(64, 256)

    def forward(self, ids):
        x = self.embedding(ids[:, :-1])
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, x.shape[-1:]))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids[:, 1:].flatten())


def train(model, batches):
    """The loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for ids in batches:
        loss = model(ids)
        loss.backward()
        clip_grad_norm_(model, 1.0)  # by the norm of the experts of all processes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def main():
    dist.init_process_group("gloo")  # on GPUs "nccl"
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights in every process
    model = Bytes()
    alone = copy.deepcopy(model)

    shard_experts(model)
    print(f"process {rank} holds {len(model.layers[0].experts.w1)} of 8 experts")
    parallel = DistributedDataParallel(model)  # the mean of all gradients but those of experts

    batches = text(48).split(8)
    losses = train(parallel, [ids.chunk(processes)[rank] for ids in batches])
    dist.all_reduce(losses)  # the mean over the processes is that of the whole batch

    if rank == 0:
        wanted = train(alone, batches)
        print(f"{processes} processes:", *(f"{loss:.5f}" for loss in losses / processes))
        print("one process: ", *(f"{loss:.5f}" for loss in wanted))
    dist.barrier()  # no process leaves while another still works
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
