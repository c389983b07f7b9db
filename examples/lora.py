"""Train LoRA adapters of PEFT on the weights of the experts, in a plain loop."""

import peft
import torch

import fastmoe_rs
from tiny import language_model, text


def main():
    # Experts are parameters [E, 2I, H] and [E, H, I], not linear layers: name them in `target_parameters`.
    options = peft.LoraConfig(
        r=4, lora_alpha=8, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = fastmoe_rs.accelerate(peft.get_peft_model(language_model(), options))
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in adapters.items()}

    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    batches = text(64).split(8)
    for step, ids in enumerate(batches):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss:.4f}")

    # An adapter that is not wired to the experts stays where it was: look at each.
    for name, parameter in adapters.items():
        print(f"{name} moved by {(parameter - start[name]).abs().max():.1e}")

    # Merged into the weights, the adapters cost nothing at inference.
    with torch.no_grad():
        expected = model(input_ids=batches[0]).logits
        merged = model.merge_and_unload()(input_ids=batches[0]).logits
    print(f"merging changes the logits by {(merged - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
