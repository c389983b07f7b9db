"""torch.compile of a whole training step's forward and backward, without a graph break."""

import torch

import fastmoe_rs
from tiny import language_model, text


def losses(model, steps=4):
    """The losses of a few training steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for ids in text(8 * steps).split(8):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main():
    expected = losses(fastmoe_rs.accelerate(language_model(num_hidden_layers=1)))
    model = fastmoe_rs.accelerate(language_model(num_hidden_layers=1))
    # fullgraph=True makes a graph break an error: routing and experts are operators that the compiler knows.
    compiled = losses(torch.compile(model, fullgraph=True))
    print("eager:   ", *(f"{loss:.4f}" for loss in expected))
    print("compiled:", *(f"{loss:.4f}" for loss in compiled))


if __name__ == "__main__":
    main()
