"""FSDP2, fully_shard: every process holds a part of every weight, experts included, and a part of the batch.

torchrun --nproc-per-node 2 examples/fsdp.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastmoe_rs
from tiny import language_model, text


def train(model, batches):
    """The loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def main():
    dist.init_process_group("gloo")  # on GPUs "nccl", and "cuda" below
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (processes,))

    model = fastmoe_rs.accelerate(language_model())
    for layer in model.model.layers:  # one unit of communication a layer
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    print(f"process {rank} holds {experts.to_local().numel() / experts.numel():.0%} of the experts' weights")

    batches = text(48).split(8)
    losses = train(model, [ids.chunk(processes)[rank] for ids in batches])
    dist.all_reduce(losses)  # the mean over the processes is that of the whole batch

    if rank == 0:
        alone = train(fastmoe_rs.accelerate(language_model()), batches)
        print(f"{processes} processes:", *(f"{loss:.5f}" for loss in losses / processes))
        print("one process: ", *(f"{loss:.5f}" for loss in alone))
    dist.barrier()  # no process leaves while another still works
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
