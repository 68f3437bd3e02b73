"""The command line: each verb is one function over functions of the floors below."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from minitransformer import metrics
from minitransformer.checkpoint import RunFolder, next_run_folder
from minitransformer.data import Corpus, TokenDataset, corpus, load_tokenizer, prepare
from minitransformer.data.corpora import corpora
from minitransformer.errors import CheckpointError, ConfigError, MiniTransformerError, NonFiniteError
from minitransformer.models import GPT, GPTConfig, from_pretrained, pretrained_folder
from minitransformer.models.base import config_from_dict
from minitransformer.random import manual_seed
from minitransformer.threads import Workers, get_num_threads, set_num_threads, single_threaded_blas
from minitransformer.training import TrainConfig, Trainer, TrainResult, evaluate
from minitransformer.version import __version__

# nanoGPT's shape for a CPU; the other defaults are those of GPTConfig and TrainConfig.
_SHAPE: dict[str, Any] = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
_MAIN_FLAGS = ("max_steps", "out_dir", "block_size", "n_layer", "n_head", "n_embd", "batch_size", "learning_rate")
_SAMPLE_TOKENS = 300
_EXIT_FAILED, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"minitransformer: {message}")
            return arguments.run(arguments)
    except MiniTransformerError as error:
        if arguments.debug:
            raise
        print(f"minitransformer: {error}", file=sys.stderr)
        return _EXIT_FAILED if isinstance(error, NonFiniteError) else _EXIT_USAGE
    except KeyboardInterrupt:
        print("\nminitransformer: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# --- the parser ------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minitransformer", description="Train and use small transformers on a CPU, from scratch in Python."
    )
    parser.add_argument("--version", action="version", version=f"minitransformer {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_train(verbs)
    resume = _add(verbs, "resume", _resume, "go on with a run, bit for bit", "resume runs/python-docs-1")
    resume.add_argument("path", metavar="RUN", help="folder of the run")
    resume.add_argument("--max-steps", type=int, metavar="N", help="train up to this step instead")
    generate = _add(verbs, "generate", _generate, "continue a text", "generate runs/python-docs-1 --prompt 'The '")
    generate.add_argument("path", metavar="RUN", help="folder of a run or of a saved model")
    generate.add_argument("--prompt", default="\n", metavar="TEXT", help="text to continue (default: a new line)")
    generate.add_argument(
        "--max-new-tokens", type=int, default=500, metavar="N", help="how many (default: %(default)s)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (default: %(default)s)"
    )
    for name, kind, text in (
        ("top-k", int, "only the K likeliest tokens"),
        ("top-p", float, "only the likeliest tokens that together reach this probability"),
        ("min-p", float, "only tokens with this share of the likeliest one's probability"),
    ):
        generate.add_argument(f"--{name}", type=kind, metavar="K" if kind is int else "P", help=text)
    generate.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less (default: 1)"
    )
    evaluate_ = _add(verbs, "eval", _eval, "loss, perplexity and bits per byte", "eval runs/python-docs-1")
    evaluate_.add_argument("path", metavar="RUN", help="folder of a run")
    evaluate_.add_argument(
        "--data", metavar="NAME_OR_PATH", help="other text, used whole (default: its validation text)"
    )
    _add_bench(verbs)
    return parser


def _add(verbs: Any, name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example: minitransformer {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--seed", type=int, metavar="S", help="decides every random number")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to use (default: all cores)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_train(verbs: Any) -> None:
    parser = _add(verbs, "train", _train, "train a GPT on a text", "train --max-steps 200")
    names = ", ".join(corpora())
    parser.add_argument(
        "--data", default="python-docs", metavar="NAME_OR_PATH", help=f"{names}, a file or a folder (python-docs)"
    )
    parser.add_argument("--tokenizer", default="char", metavar="KIND", help="char or byte (char)")
    rest = []
    for name, kind, default in _flags():
        flag = "--" + name.replace("_", "-")
        shown = "runs/<data>-<n>" if name == "out_dir" else _text(default)
        text = f"default {shown}" if name in _MAIN_FLAGS else argparse.SUPPRESS
        parser.add_argument(flag, dest=name, type=kind, metavar="X", help=text)
        if name not in _MAIN_FLAGS:
            rest.append(f"{flag} {shown}")
    parser.epilog = "\n".join(
        [
            "every other setting, with its default (see the docs of GPTConfig and TrainConfig):",
            *textwrap.wrap("  ".join(rest), 98, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False),
            "",
            str(parser.epilog),
        ]
    )


def _add_bench(verbs: Any) -> None:
    parser = verbs.add_parser("bench", help="measure speed beside PyTorch", description="Measure speed.")
    whats = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    step = _add(whats, "step", _bench_step, "one training step beside PyTorch's", "bench step --json step.json")
    step.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to this file")
    loss = _add(
        whats, "time-to-loss", _bench_time_to_loss, "the default training beside PyTorch's", "bench time-to-loss"
    )
    loss.add_argument("--max-steps", type=int, default=1000, metavar="N", help="steps (default: %(default)s)")
    loss.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to this file")


def _flags() -> Iterable[tuple[str, Any, Any]]:
    """(field, parser of its text, default) of every field of both configs that `train` takes."""
    for cls, left_out in ((GPTConfig, {"vocab_size"}), (TrainConfig, {"seed", "threads", "progress"})):
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name not in left_out:
                yield field.name, _parse_as(hints[field.name]), _SHAPE.get(field.name, field.default)


def _parse_as(hint: Any) -> Any:
    """The function that reads a field of this type from text."""
    text = str(hint)
    if "tuple" in text:
        return _numbers
    if "bool" in text:
        return _bool
    for kind in (int, float):
        if kind.__name__ in text:
            return kind
    return _string if "None" in text else str


def _bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text == "true"


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as 0.9,0.99, got {text!r}") from None


def _string(text: str) -> str | None:
    return None if text == "none" else text


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# --- the verbs -------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    given = {name: getattr(arguments, name) for name, _, _ in _flags() if getattr(arguments, name) is not None}
    for name in ("seed", "threads"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    model_fields = {field.name for field in dataclasses.fields(GPTConfig)}
    source = _find_corpus(arguments.data)
    given.setdefault("out_dir", str(next_run_folder("runs", source.name)))
    config = config_from_dict(TrainConfig, {k: v for k, v in given.items() if k not in model_fields})
    shape = {**_SHAPE, **{k: v for k, v in given.items() if k in model_fields}}
    train_data, eval_data = prepare(source, arguments.tokenizer, shape["block_size"])
    assert train_data.tokenizer is not None
    manual_seed(config.seed)
    model = GPT(config_from_dict(GPTConfig, {"vocab_size": train_data.tokenizer.vocab_size, **shape}))
    _say(
        f"{source.name}: {train_data.tokens.size:,} tokens to train, {eval_data.tokens.size:,} to validate, "
        f"vocabulary {train_data.tokenizer.vocab_size}; {model.num_parameters():,} parameters; run {config.out_dir}"
    )
    return _finish(Trainer(model, config, train_data, eval_data), resume=False)


def _resume(arguments: argparse.Namespace) -> int:
    if arguments.seed is not None:
        raise ConfigError("resume", "a run keeps its seed", "Leave out --seed")
    run = RunFolder.open(arguments.path)
    described = run.description
    overrides = {"out_dir": arguments.path, "max_steps": arguments.max_steps, "threads": arguments.threads}
    settings = {**described["train"], **{k: v for k, v in overrides.items() if v is not None}}
    train_data, eval_data = _data_of_run(run)
    model = GPT(config_from_dict(GPTConfig, described["model"]))
    return _finish(Trainer(model, config_from_dict(TrainConfig, settings), train_data, eval_data), resume=True)


def _finish(trainer: Trainer, resume: bool) -> int:
    """Train, say how it ended, print a sample; returns the exit status."""
    result: TrainResult = trainer.train(resume=resume)
    folder = trainer.config.out_dir
    if result.reason == "interrupted":
        _say(f"interrupted after step {result.steps}, saved; go on with: minitransformer resume {folder}")
        return _EXIT_INTERRUPTED
    best = "" if result.best_val_loss is None else f", best val loss {result.best_val_loss:.4f}"
    _say(f"{result.reason} after step {result.steps}{best}; saved in {folder}; a sample:")
    tokenizer = trainer.train_data.tokenizer  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody asked for a text longer than block_size
        _print_continuation(
            trainer.model, tokenizer, "\n", max_new_tokens=_SAMPLE_TOKENS, temperature=0.8, seed=trainer.config.seed
        )
    _say(f"more: minitransformer generate {folder} --prompt TEXT")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    tokenizer = _tokenizer_of(arguments.path)
    model = from_pretrained(arguments.path)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    _set_threads(arguments)
    _print_continuation(model, tokenizer, arguments.prompt, **{name: getattr(arguments, name) for name in names})
    return 0


def _print_continuation(model: Any, tokenizer: Any, prompt: str, temperature: float, **options: Any) -> None:
    """Print `prompt` and what follows, as it is made."""
    if not prompt:
        raise ConfigError("generate", "the prompt is empty", "Give at least one character: --prompt TEXT")
    ids = tokenizer.encode(prompt)
    if temperature == 0:
        sampling: dict[str, Any] = {"do_sample": False}
    else:
        sampling = {"do_sample": True, "temperature": temperature}
    print(prompt, end="", flush=True)
    with single_threaded_blas():  # the products of one token are too small to share
        model.generate(ids[None], streamer=_Printer(tokenizer), **sampling, **options)


class _Printer:
    """Prints tokens as whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._decoder = tokenizer.stream_decoder()

    def put(self, ids: np.ndarray) -> None:
        print(self._decoder.feed(ids), end="", flush=True)

    def end(self) -> None:
        print(self._decoder.finish(), flush=True)


def _eval(arguments: argparse.Namespace) -> int:
    tokenizer = _tokenizer_of(arguments.path)
    model = from_pretrained(arguments.path)
    if arguments.data is None:
        _, dataset = _data_of_run(RunFolder.open(arguments.path))
    else:
        ids = [tokenizer.encode(piece) for piece in _find_corpus(arguments.data).chunks()]
        dataset = TokenDataset(np.concatenate(ids), model.config.block_size)
    _set_threads(arguments)
    from tqdm import tqdm

    with single_threaded_blas(), Workers(get_num_threads()) as workers:
        batches = list(dataset.sequential(12))
        loss = evaluate(model, tqdm(batches, unit="batch", disable=not sys.stderr.isatty()), workers)
    targets = dataset.tokens[1:]  # the first token is given
    size = len(tokenizer.decode_bytes(targets))
    print(f"loss           {loss:.4f} nats per token")
    print(f"perplexity     {metrics.perplexity(loss):.3f}")
    print(f"bits per byte  {metrics.bits_per_byte(loss, targets.size, size):.4f}")
    return 0


def _bench_step(arguments: argparse.Namespace) -> int:
    from minitransformer.bench import step

    _set_threads(arguments)
    step.run(json_path=arguments.json)
    return 0


def _bench_time_to_loss(arguments: argparse.Namespace) -> int:
    from minitransformer.bench import time_to_loss

    _set_threads(arguments)
    time_to_loss.run(steps=arguments.max_steps, json_path=arguments.json)
    return 0


# --- shared by the verbs ---------------------------------------------------------------------------------


def _say(text: str) -> None:
    """Messages go to stderr, so that stdout holds only what was asked for."""
    print(text, file=sys.stderr, flush=True)


def _set_threads(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        set_num_threads(arguments.threads)


def _find_corpus(name_or_path: str) -> Corpus:
    """A known corpus, or a path made absolute, so that a run finds it again from any folder."""
    if name_or_path in corpora() or not Path(name_or_path).exists():
        return corpus(name_or_path)
    return corpus(Path(name_or_path).resolve())


def _tokenizer_of(path: str) -> Any:
    file = pretrained_folder(path) / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(
            "generate", f"{path} holds no tokenizer, looked for {file}", "Pass the folder of a run that was trained"
        )
    return load_tokenizer(file)


def _data_of_run(run: RunFolder) -> tuple[TokenDataset, TokenDataset]:
    """The data a run was started with, encoded by the tokenizer of its last checkpoint."""
    source = run.description["data"]
    if source is None:
        raise CheckpointError(
            "data", f"{run.path} does not say what it was trained on", "Use Trainer.train(resume=True) in Python"
        )
    tokenizer = load_tokenizer(run.load("last").folder / "tokenizer.json")
    return prepare(
        corpus(source["corpus"]),
        tokenizer,
        source["block_size"],
        validation_fraction=source["validation_fraction"],
    )
