"""Generate text: the same tokens as transformers' own experts give."""

import time

import torch

import fastmoe_rs
from tiny import language_model, text


def generate(model, ids):
    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out, time.perf_counter() - start


def main():
    # One line at loading does it too, once fastmoe_rs.integrations.transformers is imported:
    # AutoModelForCausalLM.from_pretrained(name, experts_implementation="fastmoe_rs")
    model = language_model(initializer_range=0.2).eval()
    ids = text(2, 16)
    model.set_experts_implementation("eager")
    expected, seconds = generate(model, ids)
    tokens, our_seconds = generate(fastmoe_rs.accelerate(model), ids)
    print(f"eager      {seconds:.3f} s:", *expected[0, 16:].tolist())
    print(f"fastmoe_rs {our_seconds:.3f} s:", *tokens[0, 16:].tolist())
    print(f"the tokens are the same: {torch.equal(tokens, expected)}")


if __name__ == "__main__":
    main()
