"""Valid calls of what training takes beside the model: `optim`, `metrics`, `data`."""

from __future__ import annotations

from material import Lines, at, call, filled, ids, optimizer, real, replaced, some, text, tokens, writes

from minitransformer import data, metrics, optim
from minitransformer.optim import schedules

TRAINING: Lines = {
    # ---- optim ------------------------------------------------------------------------------------
    "optim.Adam": lambda: call(optim.Adam, [filled(real(2, 3))], 0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1),
    "optim.AdamW": lambda: call(optim.AdamW, [filled(real(2, 3))], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1),
    "optim.FlatParameters": lambda: call(optim.FlatParameters, (filled(real(2, 3)), filled(real(3)))),
    "optim.FlatParameters.views": lambda: call(optimizer().flat.views, real(9)),
    "optim.FlatParameters.gather": lambda: writes(optimizer().flat.gather, real(9)),
    "optim.Optimizer": lambda: call(optim.Optimizer),
    "optim.Optimizer.load_state": lambda: writes(
        optimizer(optim.Adam).load_state,
        {"first": real(9), "second": real(9) ** 2},
        {"steps": 3, "lr": 0.1, "layout": optimizer().flat.layout},
    ),
    "optim.Optimizer.lr": lambda: call(lambda lr: replaced(optimizer(), "lr", lr), 0.1),
    "optim.Optimizer.step": lambda: call(optimizer(optim.SGD).step, real(9)),
    "optim.SGD": lambda: call(optim.SGD, [filled(real(2, 3))], 0.1, momentum=0.9, weight_decay=0.1),
    "optim.schedules.constant": lambda: call(at(schedules.constant), 0.1, 3),
    "optim.schedules.cosine": lambda: call(at(schedules.cosine), 0.1, 0.01, 2, 8),
    "optim.schedules.linear": lambda: call(at(schedules.linear), 0.1, 0.01, 2, total_steps=8),
    "optim.schedules.noam": lambda: call(at(schedules.noam), 64, 4, factor=2.0),
    "optim.schedules.warmup_stable_decay": lambda: call(at(schedules.warmup_stable_decay), 0.1, 0.01, 2, 8, 3),
    "optim.schedules step": lambda: call(schedules.cosine(0.1, 0.01, 2, 8), 3),
    # ---- metrics ----------------------------------------------------------------------------------
    "metrics.bits_per_byte": lambda: call(metrics.bits_per_byte, 1.5, 10, 30),
    "metrics.perplexity": lambda: call(metrics.perplexity, 1.5),
    # ---- data -------------------------------------------------------------------------------------
    "data.ByteTokenizer": lambda: call(data.ByteTokenizer),
    "data.ByteTokenizer.decode": lambda: call(data.ByteTokenizer().decode, ids(4) + 97),
    "data.ByteTokenizer.encode": lambda: call(data.ByteTokenizer().encode, "text"),
    "data.CharTokenizer": lambda: call(data.CharTokenizer, "text"),
    "data.CharTokenizer.decode": lambda: call(data.CharTokenizer("abcde").decode, ids(4)),
    "data.CharTokenizer.encode": lambda: call(data.CharTokenizer("abcde").encode, "deb"),
    "data.CharTokenizer.from_json": lambda: call(data.CharTokenizer.from_json, data.CharTokenizer("ab").to_json()),
    "data.CharTokenizer.train": lambda: call(data.CharTokenizer.train, ["some", "text"]),
    "data.Corpus": lambda: call(lambda *args, **kw: data.Corpus(*args, **kw).text(), "mine", lambda: ["a", "b"]),
    "data.StreamDecoder.feed": lambda: call(data.ByteTokenizer().stream_decoder().feed, ids(4) + 97),
    "data.TokenDataset": lambda: call(data.TokenDataset, ids(20), 4, tokenizer=None, source={"corpus": "mine"}),
    "data.TokenDataset.batch": lambda: call(tokens().batch, 1, 2, batch_size=3),
    "data.TokenDataset.sequential": lambda: call(lambda size: some(tokens().sequential(size)), 2),
    "data.corpus": lambda: call(data.corpus, "python-docs"),
    "data.load_tokenizer": lambda: call(data.load_tokenizer, "absent"),
    "data.prepare": lambda: call(data.prepare, text(), "char", 2, validation_fraction=0.2, cache_folder=None),
}
