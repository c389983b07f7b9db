"""Activation checkpointing: recompute a layer in the backward pass instead of keeping what it computed."""

import torch

import fastmoe_rs
from tiny import language_model, text


def step(model, ids):
    """Loss, gradients, and the bytes that autograd keeps between forward and backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    total = sum(kept.values())
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()], total


def main():
    model = fastmoe_rs.accelerate(language_model(num_hidden_layers=4)).train()
    ids = text(8)
    loss, gradients, kept = step(model, ids)
    model.gradient_checkpointing_enable()
    again, same_gradients, kept_less = step(model, ids)

    # The recomputation routes every token as the forward did, and sums in the same order.
    same = loss == again and all(map(torch.equal, gradients, same_gradients))
    print(f"kept for the backward: {kept / 2**20:.2f} MiB, with checkpointing {kept_less / 2**20:.2f} MiB")
    print(f"loss and gradients are the same to the bit: {same}")


if __name__ == "__main__":
    main()
