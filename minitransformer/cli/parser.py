"""Which verbs and flags there are, and what `--help` says of them."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from minitransformer.cli import verbs
from minitransformer.cli.settings import SETTINGS, number, whole
from minitransformer.data.corpora import corpora
from minitransformer.errors import ConfigError
from minitransformer.version import __version__

_MAIN_SETTINGS = {
    "out_dir": "new folder for the run (default: runs/<data>-<n>)",
    "max_steps": "steps to train",
    "learning_rate": "highest learning rate",
    "batch_size": "rows in a batch",
    "block_size": "tokens in a row, the context",
    "n_layer": "layers",
    "n_head": "attention heads",
    "n_embd": "width of the model",
}
_FIGURES = "also write the figures to this file"
_ROUNDS = {"step": 20, "startup": 3, "efficiency": 5}


class Parser(argparse.ArgumentParser):
    """Refuses as the rest of the package does: `ConfigError`, with the nearest name of an unknown flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            close = get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            fix = f"Did you mean {close[0]}?" if close else ""
            if self.prog.endswith(" train") and os.access(unknown[0], os.F_OK):
                fix = f"To train on that text: --data {unknown[0]}"
            self._refuse(f"unknown argument {unknown[0]!r}", fix)
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self._refuse(message, "")

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse would pass over a stdout that cannot be written

    def _refuse(self, problem: str, fix: str) -> NoReturn:
        raise ConfigError(self.prog.partition(" ")[2] or "usage", problem, fix or f"See `{self.prog} --help`")


def parser() -> Parser:
    """The parser of the whole command line; each verb leaves its function in `run`."""
    parser = Parser(
        prog="minitransformer",
        description="Train and use small transformers on a CPU, from scratch in Python.",
        epilog="example: minitransformer train --max-steps 200",
    )
    parser.add_argument("--version", action="version", version=f"minitransformer {__version__}")
    places = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_train(places)
    resume = _add(places, "resume", verbs.resume, "go on with a run, bit for bit", "resume runs/python-docs-1")
    resume.add_argument("path", metavar="RUN", help="folder of the run")
    _add_device(resume, None)
    resume.add_argument(
        "--max-steps", type=whole, metavar="N", help="train up to this step this time; the schedule ends there too"
    )
    _add_generate(places)
    eval_ = _add(places, "eval", verbs.evaluate, "loss, perplexity and bits per byte", "eval runs/python-docs-1")
    eval_.add_argument("path", metavar="RUN", help="folder of a run or of a saved model")
    _add_device(eval_, "cpu")
    eval_.add_argument("--data", metavar="NAME_OR_PATH", help="other text, used whole (default: its validation text)")
    text, example = "show the op at which NaN or infinity began", "inspect runs/python-docs-1/bad-op-step-12.npz"
    inspect = _add(places, "inspect", verbs.inspect, text, example)
    inspect.add_argument("path", metavar="FILE", help="the .npz file that a training left")
    _add_checks(places)
    _add_bench(places)
    doctor = _add(places, "doctor", verbs.doctor, "check this machine and installation", "doctor --json", seed=False)
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    doctor.add_argument("--compile", action="store_true", help="first compile every kernel, so that no run has to")
    return parser


def _add(
    places: Any, name: str, run: Any, text: str, example: str, *, seed: bool = True, **options: Any
) -> argparse.ArgumentParser:
    parser = places.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example: minitransformer {example}",
        **options,
    )
    parser.set_defaults(run=run)
    if seed:
        parser.add_argument("--seed", type=whole, metavar="S", help="decides every random number (default: always 0)")
    parser.add_argument("--threads", type=whole, metavar="N", help="threads to use (default: all cores)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


_DEVICE = "cpu, cuda, auto (cuda if it can be used) or simulator, a slow GPU in Python"


def _add_device(parser: argparse.ArgumentParser, default: str | None) -> None:
    shown = "that of the run" if default is None else default
    parser.add_argument("--device", default=default, metavar="X", help=f"{_DEVICE} (default: {shown})")


def _add_train(places: Any) -> None:
    usage = "minitransformer train [--data NAME_OR_PATH] [--SETTING VALUE ...]"
    parser = _add(places, "train", verbs.train, "train a GPT on a text", "train --max-steps 200", usage=usage)
    parser.add_argument(
        "--data",
        default="python-docs",
        metavar="WHAT",
        help=f"{', '.join(corpora())}, or a path (default: %(default)s)",
    )
    parser.add_argument("--tokenizer", default="char", metavar="KIND", help="char or byte (default: %(default)s)")
    rest = SETTINGS.keys() - _MAIN_SETTINGS.keys()
    for name in sorted(SETTINGS, key=[*_MAIN_SETTINGS, *SETTINGS].index):
        setting, text = SETTINGS[name], _MAIN_SETTINGS.get(name, argparse.SUPPRESS)
        if name not in rest and setting.default is not None:
            text = f"{text} (default: {setting.shown})"
        parser.add_argument(
            setting.flag, dest=name, type=setting.parse, default=argparse.SUPPRESS, metavar="X", help=text
        )
    # A flag and its default stay on one line: the blank between them comes after the wrapping.
    words = "  ".join(f"{setting.flag}\0{setting.shown}" for name, setting in SETTINGS.items() if name in rest)
    lines = textwrap.wrap(words, 78, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    parser.epilog = "\n".join(
        [
            "every other setting, with its default:",
            *(line.replace("\0", " ") for line in lines),
            "what they mean: python -m pydoc minitransformer.TrainConfig",
            "                python -m pydoc minitransformer.GPTConfig",
            "",
            str(parser.epilog),
        ]
    )


def _add_generate(places: Any) -> None:
    example = "generate runs/python-docs-1 --prompt 'The '"
    parser = _add(places, "generate", verbs.generate, "continue a text", example)
    parser.add_argument("path", metavar="RUN", help="folder of a run or of a saved model")
    _add_device(parser, "cpu")
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue (default: a new line)")
    for name, parse, default, text in (
        ("max-new-tokens", whole, 500, "how many; past its context the model sees the last ones"),
        ("temperature", number, 0.8, "lower is safer; 0 always takes the likeliest token"),
        ("top-k", whole, None, "draw from this many of the likeliest tokens"),
        ("top-p", number, None, "draw from the likeliest that together reach this probability"),
        ("min-p", number, None, "draw from those with this share of the highest probability"),
        ("repetition-penalty", number, 1.0, "above 1: repeat less"),
    ):
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=parse, default=default, metavar="X", help=shown)


def _add_checks(places: Any) -> None:
    text = "compare gradients with derivatives that nobody wrote"
    gradcheck = _add(places, "gradcheck", verbs.gradcheck, text, "gradcheck attention layer_norm")
    gradcheck.add_argument("ops", nargs="*", metavar="OP", help="ops to check (default: all)")
    gradcheck.add_argument("--calls", type=whole, default=20, metavar="N", help="calls drawn of each (default: 20)")
    text = "gradients, kernels and laws of attention, on this machine"
    verify = _add(places, "verify", verbs.verify, text, "verify --json certificate.json")
    verify.add_argument("--examples", type=whole, default=50, metavar="N", help="problems drawn a law (default: 50)")
    for parser in (gradcheck, verify):
        parser.add_argument("--json", type=_writable, metavar="OUT", help="also write the results to this file")


def _add_bench(places: Any) -> None:
    parser = places.add_parser(
        "bench",
        help="measure speed beside PyTorch",
        description="Measure speed and memory beside PyTorch.",
        epilog="example: minitransformer bench step",
    )
    whats = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    step = _add_measure(whats, "step", "one training step beside PyTorch's", "--json step.json")
    _add_shape(step)
    _add_option(step, "--device", str, f"{_DEVICE} (default: cpu)", dest="recipe.device")
    _add_option(step, "--model", str, "gpt, transformer or bert (default: gpt)", dest="recipe.model")
    for name, text in (("compile", "torch.compile too"), ("processes", "two PyTorch processes that share it")):
        step.add_argument(f"--torch-{name}", action="store_true", default=argparse.SUPPRESS, help=f"beside {text}")
    attention = _add_measure(whats, "attention", "attention beside torch's", "--rounds 5", seed=False)
    _add_option(attention, "--backend", str, "what serves ours (default: what serves everybody)")
    _add_option(attention, "--device", str, f"{_DEVICE} (default: cpu)")
    text = "what a first hour on a GPU should tell, in some minutes"
    gpu = _add(whats, "gpu", verbs.bench, text, "bench gpu --json gpu.json", seed=False)
    gpu.set_defaults(module="gpu")
    _add_option(gpu, "--device", str, "cuda, or simulator, which shows that it runs (default: cuda)")
    _add_option(gpu, "--json", _writable, _FIGURES, dest="json_path")
    text = "how kinds of attention grow with the length"
    _add_measure(whats, "efficiency", text, "--plot efficiency.png", seed=False)
    _add_measure(whats, "gemm", "matrix products in NumPy and PyTorch", "--plot gemm.png", seed=False)
    decode = _add_measure(whats, "decode", "generation with a cache beside PyTorch's", "--batch-size 8")
    _add_option(decode, "--device", str, f"{_DEVICE} (default: cpu)", dest="recipe.device")
    _add_option(decode, "--batch-size", whole, "rows generated together (default: 1)")
    _add_measure(whats, "memory", "peak memory of a training beside PyTorch's", "--plot memory.png", seed=False)
    scaling = _add_measure(whats, "scaling", "a training step by threads and load", "--n-embd 384 --n-head 6")
    _add_shape(scaling)
    _add_measure(whats, "startup", "seconds until the first step", "--json startup.json", seed=False)
    text, example = "a whole training beside PyTorch's", "bench time-to-loss --max-steps 500"
    loss = _add(whats, "time-to-loss", verbs.bench, text, example)
    loss.set_defaults(module="time_to_loss")
    text = "steps (default: %(default)s)"
    loss.add_argument("--max-steps", dest="steps", type=whole, default=1000, metavar="N", help=text)
    text = "a gradient check beside torch.autograd.gradcheck"
    gradcheck = _add(whats, "gradcheck", verbs.bench, text, "bench gradcheck", seed=False)
    gradcheck.set_defaults(module="gradients")
    for what in (loss, gradcheck):
        what.add_argument("--json", dest="json_path", type=_writable, metavar="OUT", help=_FIGURES)


def _add_measure(places: Any, name: str, text: str, example: str, *, seed: bool = True) -> argparse.ArgumentParser:
    """A benchmark whose flags are the options of its `run`, by name; the defaults of that hold where none is given."""
    parser = _add(places, name, verbs.bench, text, f"bench {name} {example}", seed=seed)
    parser.set_defaults(module=name)
    if name != "memory":
        _add_option(parser, "--rounds", whole, f"blocks of each side (default: {_ROUNDS.get(name, 10)})")
    _add_option(parser, "--json", _writable, _FIGURES, dest="json_path")
    _add_option(parser, "--plot", _writable, "draw them into this .png, .svg or .pdf", dest="plot_path")
    return parser


def _add_shape(parser: argparse.ArgumentParser) -> None:
    """The flags of `train` that decide how much work a step is, and how many steps make a block."""
    for name in ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "shards"):
        setting = SETTINGS[name]
        text = f"{_MAIN_SETTINGS.get(name, 'parts of a batch, which run together')} (default: {setting.shown})"
        _add_option(parser, setting.flag, setting.parse, text, dest=f"recipe.{name}")
    _add_option(parser, "--steps", whole, "steps in a block (default: 10)")


def _add_option(parser: argparse.ArgumentParser, flag: str, parse: Any, text: str, **options: Any) -> None:
    parser.add_argument(flag, type=parse, metavar="X", default=argparse.SUPPRESS, help=text, **options)


def _writable(text: str) -> Path:
    """Refused now rather than after the minutes that a measurement takes."""
    if Path(text).is_dir() or not os.access(Path(text).parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that can be written to, got {text!r}")
    return Path(text)
