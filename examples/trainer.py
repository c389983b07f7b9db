"""Fine-tune a Mixture-of-Experts model with transformers' Trainer, auxiliary loss included."""

import tempfile

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

import fastmoe_rs
from tiny import language_model, text

AUX_COEFFICIENT = 0.01


def show(when, model, ids):
    """The loss that the Trainer trains on, and the two it is made of."""
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    next_byte = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    print(f"{when}: next byte {next_byte:.4f} + {AUX_COEFFICIENT} * auxiliary {out.aux_loss:.4f}", end="")
    print(f" = loss {out.loss:.4f}")


def main():
    # The router stays the model's own, so its auxiliary loss works as ever: ask for it in the configuration.
    model = language_model(output_router_logits=True, router_aux_loss_coef=AUX_COEFFICIENT)
    fastmoe_rs.accelerate(model)

    train, held_out = text(128).split([112, 16])
    show("before", model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
        )
        Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in train]).train()
    model.eval()
    show("after", model, held_out)


if __name__ == "__main__":
    main()
