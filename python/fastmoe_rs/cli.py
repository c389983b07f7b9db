"""The commands of `python -m fastmoe_rs`: demo, doctor, params and convert."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .demo import CHECKPOINT, BadArgument, Config, DemoError

PROGRAM = "python -m fastmoe_rs"
FAILED, BAD_ARGUMENT, INTERRUPTED = 1, 2, 130
GPU = "H200"
MATHS = ("bf16", "f16", "tf32", "f32")
DTYPES = ("float32", "bfloat16", "float16")
OUT = Path("out/demo")
SAVE_EVERY = 50
# Those of `checkpoints`, which needs torch.
LAYOUTS = ("per-expert", "mixtral", "fused", "transposed", "interleaved", "gpt-oss", "fastmoe_rs")
DEFAULTS = Config()
DEMO_MODULES = ("torch", "rich", "matplotlib", "safetensors")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_ARGUMENT, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 1 when it failed, 2 when an argument is bad."""
    parser = Parser(prog=PROGRAM, description="Fast Mixture-of-Experts layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastmoe_rs {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="{demo,doctor,params,convert}", required=True)
    add_demo(commands.add_parser("demo", help="train a small language model", allow_abbrev=False))
    add_doctor(commands.add_parser("doctor", help="check this installation", allow_abbrev=False))
    add_params(commands.add_parser("params", help="count a model's parameters", allow_abbrev=False))
    add_convert(commands.add_parser("convert", help="change a checkpoint's layout", allow_abbrev=False))
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        parser.print_help(sys.stderr)
        return BAD_ARGUMENT
    options = parser.parse_args(arguments)
    try:
        status = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:  # of a command that has nothing to say about it
        return INTERRUPTED
    return status


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a small byte-level Mixture-of-Experts language model."

    def option(name: str, help: str, default: object = None, **options: Any) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, help=help + shown, default=default, **options)

    option("--steps", "training steps", DEFAULTS.steps, type=whole(1))
    option("--experts", "experts a layer", DEFAULTS.experts, type=whole(1))
    option("--top-k", "experts that a token goes to", DEFAULTS.top_k, type=whole(1))
    option("--dtype", "of the matrix products (default: float32, bfloat16 on cuda)", choices=DTYPES)
    option("--device", "where to train, cpu or cuda", DEFAULTS.device)
    option("--text", "a file or folder to learn; without it, Python's standard library", type=Path)
    option("--out", "a folder; an unfinished run found there goes on", OUT, type=Path)
    option("--seed", "of the weights and batches", DEFAULTS.seed, type=whole(0, 2**63 - 1))
    option("--save-every", "steps between checkpoints", SAVE_EVERY, type=whole(1))
    parser.set_defaults(command=demo, parser=parser)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check this installation; exit status 1 when something is broken."
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--explain",
        nargs=5,
        type=whole(1),
        metavar=("T", "H", "I", "E", "K"),
        help="instead, what the layer of these sizes does on a GPU that need not be there: tokens, hidden and"
        " intermediate size, experts, experts per token",
    )
    parser.add_argument("--gpu", help=f"the GPU of --explain (default: {GPU})")
    parser.add_argument("--dtype", help=f"what --explain multiplies (default: {MATHS[0]})", choices=MATHS)
    parser.set_defaults(command=doctor, parser=parser)


def add_params(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Parameters, memory, FLOPs and bytes per token of a model, beside an equally fast dense one. "
        "Active parameters are those that one token uses, both embedding tables in full among them."
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="a config.json of transformers, its folder, or the name of a known model; without it, a list"
        " of those",
    )
    parser.add_argument("--context", help="tokens of context (default: 0)", default=0, type=whole(0))
    parser.add_argument("--tokens", help="tokens decoded a step (default: 1)", default=1, type=whole(1))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=params, parser=parser)


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a safetensors checkpoint with another layout of its experts' weights."
    parser.add_argument("source", help="a safetensors file, or a folder with one or with an index", type=Path)
    parser.add_argument("target", help="a new file or folder", type=Path)
    parser.add_argument("--to", help="the layout wanted", choices=LAYOUTS, required=True)
    parser.add_argument(
        "--from", help="the layout it has; found out if left out", choices=LAYOUTS, dest="from_"
    )
    parser.add_argument("--experts", help="experts a layer, if not those of config.json", type=whole(1))
    parser.add_argument(
        "--max-shard-size", help="of a file, as 500MB (default: 5GB)", default=5 * 10**9, type=size
    )
    parser.set_defaults(command=convert, parser=parser)


def size(text: str) -> int:
    """Bytes of a text such as 500MB."""
    match = re.fullmatch(r"(\d+)(?:([KMGT])B)?", text, re.ASCII)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a size such as 500MB or 5GB")
    return int(match[1]) * 1000 ** (" KMGT".index(match[2] or " "))


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers from `minimum` on, to `maximum` if there is one."""
    wanted = f"from {minimum} on" if maximum is None else f"from {minimum} to {maximum}"

    def parse(text: str) -> int:
        digits = text.isascii() and text.isdigit() and len(text) < 100  # Python reads no endless numbers
        if not digits or not minimum <= int(text) <= (int(text) if maximum is None else maximum):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number {wanted}")
        return int(text)

    return parse


def demo(options: argparse.Namespace) -> int:
    if options.top_k > options.experts:
        options.parser.error(
            f"argument --top-k: got {options.top_k}, wanted at most --experts, {options.experts}"
        )
    missing = [name for name in DEMO_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'fastmoe_rs[demo]'", file=sys.stderr)
        return FAILED
    from rich.console import Console

    from .demo.run import run

    config = Config(
        steps=options.steps,
        experts=options.experts,
        top_k=options.top_k,
        dtype=options.dtype or ("bfloat16" if options.device.startswith("cuda") else DEFAULTS.dtype),
        device=options.device,
        seed=options.seed,
    )
    try:
        run(config, options.out, options.text, options.save_every, Console())
    except BadArgument as error:
        options.parser.error(str(error))
    except DemoError as error:
        print(f"{options.parser.prog}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        saved = (options.out / CHECKPOINT).exists()
        where = f"goes on from the last checkpoint in {options.out}" if saved else "starts again"
        print(f"stopped; the same command {where}", file=sys.stderr)
        return INTERRUPTED
    return 0


def doctor(options: argparse.Namespace) -> int:
    if options.explain:
        return explain(options)
    if options.gpu or options.dtype:
        options.parser.error(f"argument {'--gpu' if options.gpu else '--dtype'}: it goes with --explain only")
    from .doctor import examine, show

    return show(examine(), as_json=options.json)


def explain(options: argparse.Namespace) -> int:
    from . import gpus
    from .explain import Layer, report

    math: Any = options.dtype or MATHS[0]
    tokens, hidden, intermediate, experts, top_k = options.explain
    layer = Layer(tokens, hidden, intermediate, experts, top_k, math=math)
    if layer.top_k > layer.experts:
        options.parser.error(f"argument --explain: got K {layer.top_k}, wanted at most E, {layer.experts}")
    try:
        gpu = gpus.find(options.gpu or GPU)
    except KeyError as error:
        options.parser.error(f"argument --gpu: {error.args[0]}")
    try:
        text = report(layer, gpu, as_json=options.json)
    except (OverflowError, RuntimeError, ValueError) as error:  # sizes beyond what the kernels count
        options.parser.error(f"argument --explain: {error}".partition("\n")[0])
    print(text)
    return 0


def params(options: argparse.Namespace) -> int:
    from .params import overview, report

    if options.model is None:
        print(overview(as_json=options.json))
        return 0
    try:
        text = report(options.model, context=options.context, tokens=options.tokens, as_json=options.json)
    except (KeyError, ValueError) as error:
        options.parser.error(f"argument model: {error.args[0]}")
    print(text)
    return 0


def convert(options: argparse.Namespace) -> int:
    missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"convert needs {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return FAILED
    from .checkpoints import convert_checkpoint

    try:
        report = convert_checkpoint(
            options.source,
            options.target,
            options.to,
            from_=options.from_,
            experts=options.experts,
            max_shard_size=options.max_shard_size,
        )
    except (OSError, ValueError) as error:
        print(f"{options.parser.prog}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"stopped; nothing was written to {options.target}", file=sys.stderr)
        return INTERRUPTED
    print(
        f"{report.layers} layers of {report.experts} experts from {report.source!r} to {report.target!r}: "
        f"{options.target}, {len(report.files)} file{'s' * (len(report.files) > 1)}"
    )
    return 0
