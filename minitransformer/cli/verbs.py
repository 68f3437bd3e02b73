"""The verbs: each is one function over functions of the floors below, and returns the exit status."""

from __future__ import annotations

import shlex
import sys
import warnings
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer import diagnose, metrics, training
from minitransformer.checkpoint import RunFolder, next_run_folder
from minitransformer.cli.settings import SETTINGS
from minitransformer.data import Corpus, TokenDataset, corpus, load_tokenizer, prepare
from minitransformer.data.corpora import corpora
from minitransformer.data.tokenizers import Tokenizer
from minitransformer.errors import CheckpointError, ConfigError, DataError
from minitransformer.files import is_there
from minitransformer.kernels.gpu.arrays import resolve_device
from minitransformer.models import GPT, GPTConfig, from_pretrained, pretrained_folder
from minitransformer.random import manual_seed
from minitransformer.threads import Workers, get_num_threads, set_num_threads, single_threaded_blas
from minitransformer.training import TrainConfig, Trainer

_SAMPLE: dict[str, Any] = {"max_new_tokens": 300, "temperature": 0.8}
_EVAL_ROWS = 12
_OF_EVERY_VERB = {"verb", "what", "run", "module", "seed", "threads", "debug"}


def say(text: str) -> None:
    """Messages go to stderr, so that stdout holds only what was asked for."""
    print(text, file=sys.stderr, flush=True)


def train(arguments: Namespace) -> int:
    source = _find_corpus(arguments.data)
    settings: dict[type, dict[str, Any]] = {GPTConfig: {}, TrainConfig: {}}
    for name, setting in SETTINGS.items():
        settings[setting.config][name] = getattr(arguments, name, setting.default)
    given = {name: value for name in ("seed", "threads") if (value := getattr(arguments, name)) is not None}
    config = TrainConfig(**{**settings[TrainConfig], **given})
    if config.out_dir is None:
        config = replace(config, out_dir=str(next_run_folder("runs", source.name)))
    train_data, eval_data = prepare(source, arguments.tokenizer, settings[GPTConfig]["block_size"])
    assert train_data.tokenizer is not None
    manual_seed(config.seed)
    vocab_size = train_data.tokenizer.vocab_size
    model = GPT(GPTConfig(**{**settings[GPTConfig], "vocab_size": vocab_size}))
    say(
        f"{source.name}: {train_data.tokens.size:,} tokens to train, {eval_data.tokens.size:,} to validate, "
        f"vocabulary {vocab_size}; {model.num_parameters():,} parameters; run {config.out_dir}"
    )
    return _finish(Trainer(model, config, train_data, eval_data), train_data, resume=False)


def resume(arguments: Namespace) -> int:
    if arguments.seed is not None:
        raise ConfigError("resume", "a run keeps its seed", "Leave out --seed")
    run = RunFolder.open(arguments.path)
    checkpoint = run.load("last") if run.has_checkpoint() else None
    step = checkpoint.step if checkpoint else 0
    names = "max_steps", "threads", "device"
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    config = TrainConfig(**{**_described(run, "train"), "out_dir": arguments.path, **given})
    if arguments.max_steps is not None and arguments.max_steps <= step:
        problem = f"--max-steps is {arguments.max_steps}, and {arguments.path} is after step {step} already"
        raise ConfigError("resume", problem, "Name a later step, or leave it out")
    if checkpoint and step >= config.max_steps:
        command = f"minitransformer resume {shlex.quote(arguments.path)} --max-steps {2 * step or 1000}"
        say(f"{arguments.path} is finished after step {step}; to train longer: {command}")
        return 0
    train_data, eval_data = _data_of_run(run, checkpoint and checkpoint.folder)
    say(f"{arguments.path}: from step {step} to {config.max_steps}, on {run.description['data']['corpus']}")
    manual_seed(config.seed)  # as `train` does: a run without a checkpoint starts over
    model = GPT(GPTConfig(**_described(run, "model")))
    return _finish(Trainer(model, config, train_data, eval_data), train_data, resume=True)


def _finish(trainer: Trainer, data: TokenDataset, *, resume: bool) -> int:
    """Train, say how it ended, print a sample."""
    folder = shlex.quote(str(trainer.config.out_dir))
    try:
        result = trainer.train(resume=resume)
    except KeyboardInterrupt:  # the second one: the first ends the training in good order
        say(f"\nstopped at once; from the last checkpoint, go on with: minitransformer resume {folder}")
        return 130
    if result.reason == "interrupted":
        say(f"interrupted after step {result.steps}, saved; go on with: minitransformer resume {folder}")
        return 130
    best = "" if result.best_val_loss is None else f", best val loss {result.best_val_loss:.4f}"
    say(f"{result.reason} after step {result.steps}{best}; saved in {folder}; a sample:")
    assert data.tokenizer is not None
    _print_continuation(trainer.model, data.tokenizer, None, seed=trainer.config.seed, **_SAMPLE)
    say(f"more: minitransformer generate {folder} --prompt TEXT")
    return 0


def generate(arguments: Namespace) -> int:
    model, tokenizer, _ = _load(arguments.path, arguments.device)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: getattr(arguments, name) for name in names}
    for name in ("top_k", "top_p", "min_p"):
        if options["temperature"] == 0 and options[name] is not None:
            problem = f"--{name.replace('_', '-')} restricts a draw, and at temperature 0 nothing is drawn"
            raise ConfigError("generate", problem, "Leave out one of the two")
    _set_threads(arguments)
    _print_continuation(model, tokenizer, arguments.prompt, seed=arguments.seed or 0, **options)
    return 0


def _print_continuation(
    model: Any, tokenizer: Tokenizer, prompt: str | None, temperature: float, **options: Any
) -> None:
    """Print `prompt` (None: a new line, or the first character there is) and what follows, as it is made."""
    if prompt == "":
        raise ConfigError("generate", "the prompt is empty", "Give at least one character: --prompt TEXT")
    try:
        ids = tokenizer.encode("\n" if prompt is None else prompt)
    except DataError:
        if prompt is not None:
            raise
        ids = np.zeros(1, np.int64)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature != 0:
        sampling = {"do_sample": True, "temperature": temperature}
    # The products of one token are too small to share. A warning would land in the middle of the text.
    with single_threaded_blas(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(ids[None], streamer=_Printer(tokenizer, ids), **sampling, **options)


class _Printer:
    """Prints tokens as whole characters; the prompt comes with the first, when the settings are known to be fine."""

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._text = self._decoder.feed(prompt)

    def put(self, ids: np.ndarray) -> None:
        print(self._text + self._decoder.feed(ids), end="", flush=True)
        self._text = ""

    def end(self) -> None:
        print(self._text + self._decoder.finish(), flush=True)


def evaluate(arguments: Namespace) -> int:
    model, tokenizer, folder = _load(arguments.path, arguments.device)
    T = model.config.block_size
    if arguments.data is None:
        _, dataset = _data_of_run(RunFolder.open(arguments.path), folder)
        text = "its validation text"
    else:
        text = arguments.data
        ids = np.concatenate([tokenizer.encode(piece) for piece in _find_corpus(text).chunks()])
        dataset = TokenDataset(ids, max(1, min(T, ids.size - 1)))
    targets = dataset.tokens[1:]  # the first token is given
    say(f"{folder} on {text}: {targets.size:,} tokens")
    _set_threads(arguments)
    from tqdm import tqdm

    total = -(-targets.size // (_EVAL_ROWS * dataset.block_size))
    with single_threaded_blas(), Workers(get_num_threads()) as workers:
        batches = tqdm(dataset.sequential(_EVAL_ROWS), total=total, unit="batch", disable=not sys.stderr.isatty())
        loss = training.evaluate(model, batches, workers)
    size = len(tokenizer.decode_bytes(targets))
    print(f"loss           {loss:.4f} nats per token")
    print(f"perplexity     {metrics.perplexity(loss):.3f}")
    print(f"bits per byte  {metrics.bits_per_byte(loss, targets.size, size):.4f}")
    return 0


def inspect(arguments: Namespace) -> int:
    print(diagnose.report(*diagnose.load(arguments.path)))
    return 0


def gradcheck(arguments: Namespace) -> int:
    from minitransformer.verify import gradchecks

    _set_threads(arguments)
    passed = gradchecks(arguments.ops, calls=arguments.calls, seed=arguments.seed or 0, json_path=arguments.json)
    return 0 if passed else 1


def verify(arguments: Namespace) -> int:
    from minitransformer.verify import verify

    _set_threads(arguments)
    passed = verify(examples=arguments.examples, seed=arguments.seed or 0, json_path=arguments.json)
    return 0 if passed else 1


def bench(arguments: Namespace) -> int:
    """`run` of the module that the parser names, its options the flags that were given.

    A benchmark of the training recipe takes that first, with the seed and the flags that shape it put in.
    """
    from minitransformer.bench.recipe import RECIPE

    _set_threads(arguments)
    options = {name: value for name, value in vars(arguments).items() if name not in _OF_EVERY_VERB}
    given = {name: options.pop(name) for name in [*options] if name.startswith("recipe.")}
    shape: dict[str, Any] = {}
    train: dict[str, Any] = {}
    for name, value in given.items():
        field = name.removeprefix("recipe.")
        (shape if field == "model" or SETTINGS[field].config is GPTConfig else train)[field] = value
    recipe = []
    if "seed" in arguments:
        if arguments.seed is not None:
            train["seed"] = arguments.seed
        recipe = [replace(RECIPE, **shape, train=replace(RECIPE.train, **train))]
    import_module(f"minitransformer.bench.{arguments.module}").run(*recipe, **options)
    return 0


def doctor(arguments: Namespace) -> int:
    from minitransformer import doctor

    _set_threads(arguments)
    return 0 if doctor.run(as_json=arguments.json, compile_all=arguments.compile) else 1


# --- shared by the verbs ---------------------------------------------------------------------------------


def _set_threads(arguments: Namespace) -> None:
    if arguments.threads is not None:
        set_num_threads(arguments.threads)


def _find_corpus(name_or_path: str) -> Corpus:
    """A known corpus, or a path made absolute, so that a run finds it again from any folder."""
    found = corpus(name_or_path)
    return found if name_or_path in corpora() else corpus(Path(name_or_path).resolve())


def _load(path: str, device: str) -> tuple[GPT, Tokenizer, Path]:
    """The GPT at `path`, moved to `device`, its tokenizer, and the folder that they lie in."""
    device = resolve_device("device", device)
    folder = pretrained_folder(path)
    model = from_pretrained(folder)
    if not isinstance(model, GPT):
        problem = f"{folder} holds a {type(model).__name__}, expected a GPT"
        raise CheckpointError("model", problem, "Use it in Python: mt.from_pretrained(folder)")
    if not is_there(folder / "tokenizer.json"):
        fix = "Put it there with tokenizer.save(folder)"
        raise CheckpointError("tokenizer", f"{folder} holds a model and no tokenizer.json", fix)
    model.to(device)
    return model, load_tokenizer(folder), folder


def _described(run: RunFolder, part: str) -> dict[str, Any]:
    """What run.json says of "train" or "model"."""
    fields = run.description.get(part)
    if not isinstance(fields, dict):
        problem = f"{run.path / 'run.json'} does not say how to {'train' if part == 'train' else 'make the model'}"
        raise CheckpointError("resume", problem, "Resume it with the program that started it")
    return fields


def _data_of_run(run: RunFolder, checkpoint: Path | None) -> tuple[TokenDataset, TokenDataset]:
    """The data a run was started with, encoded by the tokenizer of a checkpoint, or by a new one of its kind."""
    source = run.description.get("data")
    needed = {"corpus", "tokenizer", "block_size", "validation_fraction"}
    if not isinstance(source, dict) or not needed <= source.keys():
        fix = "Use Trainer.train(resume=True) in Python, or eval --data PATH"
        raise CheckpointError("data", f"{run.path} does not say which text it was trained on", fix)
    fix = f"Restore the text that {run.path} was trained on; eval takes another one with --data PATH"
    try:
        train_data, eval_data = prepare(
            corpus(source["corpus"]),
            load_tokenizer(checkpoint) if checkpoint else source["tokenizer"],
            source["block_size"],
            validation_fraction=source["validation_fraction"],
        )
    except DataError as error:
        raise DataError(error.op, error.problem, fix) from error
    if train_data.source != source:
        raise DataError(f"corpus {source['corpus']!r}", "has changed since the run was started", fix)
    return train_data, eval_data
