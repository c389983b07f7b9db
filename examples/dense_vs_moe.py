"""A dense and a Mixture-of-Experts model of equal active size, trained on the same real text."""

import argparse
import time

import torch

import fastmoe_rs
from fastmoe_rs import counting
from tiny import dense_model, language_model, text

BATCH = 16


def train(model, steps):
    """The mean loss of the last tenth of the steps, and tokens a second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = text(BATCH * steps).split(BATCH)
    losses, start = [], time.perf_counter()
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    tokens = sum(ids.numel() for ids in batches)
    rate = tokens / (time.perf_counter() - start)
    return torch.stack(losses[-max(steps // 10, 1) :]).mean().item(), rate


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--experts", type=int, default=8)
    options = parser.parse_args()

    moe = fastmoe_rs.accelerate(
        language_model(num_experts=options.experts, output_router_logits=True, router_aux_loss_coef=0.01)
    )
    # What `python -m fastmoe_rs params config.json` prints: among others, the intermediate size of a dense
    # model whose MLPs have as many weights as a token uses here.
    counted = counting.count(moe.config.to_dict())
    dense = dense_model(counted.dense_intermediate)
    sizes = {
        "dense": (dense.num_parameters(), dense.num_parameters()),
        "moe": (counted.total, counted.active),
    }
    for name, model in {"dense": dense, "moe": moe}.items():
        loss, rate = train(model, options.steps)
        total, active = sizes[name]
        print(f"{name:<5} {total:>9,} parameters, {active:,} active: loss {loss:.3f}, {rate:,.0f} tokens/s")


if __name__ == "__main__":
    main()
