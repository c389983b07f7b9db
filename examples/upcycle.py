"""A trained dense model as the start of a Mixture-of-Experts one, and back to a smaller dense one."""

import torch

import fastmoe_rs
from fastmoe_rs.distillation import distillation_loss
from fastmoe_rs.integrations.dense import dense_pretrained, upcycle_pretrained
from tiny import dense_model, text


def next_byte(model, ids):
    return model(input_ids=ids, labels=ids).loss


def train(model, loss, learning_rate=1e-2):
    """Three times through the text; the mean loss of other text afterwards."""
    pieces, held_out = text(160).split([128, 32])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for ids in 3 * pieces.split(8):
        loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return next_byte(model, held_out).item()


def main():
    model = dense_model()
    print(f"dense model, trained:        loss {train(model, next_byte):.3f}")

    # Experts start as copies of the MLP, most of each drawn anew so that they part. A Qwen3 becomes a
    # Qwen3-MoE; fastmoe_rs.upcycling.upcycle_model puts nn.MoE layers into models of other families.
    moe = fastmoe_rs.accelerate(upcycle_pretrained(model, num_experts=8, top_k=2, redraw=0.9))
    print(f"upcycled model, trained:     loss {train(moe, next_byte):.3f}")

    # The student's MLPs start as the average of the experts by their load, and follow the teacher.
    watched = fastmoe_rs.watch(moe.requires_grad_(False))
    moe(text(32))
    load = {name: stats.load for name, stats in watched.stats().items()}
    watched.close()
    student = dense_pretrained(moe, load)
    with torch.no_grad():
        held_out = text(160)[128:]
        print(f"dense student, untrained:    loss {next_byte(student, held_out):.3f}")
    loss = train(
        student,
        lambda model, ids: distillation_loss(model(ids).logits, moe(ids).logits, temperature=2.0),
        learning_rate=3e-3,
    )
    print(f"dense student, distilled:    loss {loss:.3f}")


if __name__ == "__main__":
    main()
