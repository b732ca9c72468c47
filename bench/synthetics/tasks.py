"""The tasks: tokens, the token that a model should name at each step, and where it is asked.

A batch of samples is a pair of integer arrays (samples, length): tokens, and targets, which are UNASKED where the
model is not asked. In training the recall tasks ask everywhere, as their source does, and in the test for the last
token only. Source of those: safari's configurations, arXiv 2212.14052. The tasks of many queries ask at each of them,
also in training. Source of those: zoology's configurations, arXiv 2312.04927.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

UNASKED = -100  # torch's number for a target that does not count


@dataclass(frozen=True)
class Setting:
    """The model and the training of a source. Blocks have a network behind the layer, or the layer alone."""

    width: int = 32
    depth: int = 2
    network: bool = True
    batch: int = 32
    rates: tuple[float, ...] = (5e-4,)  # learning rates, of which the best is taken
    weight_decay: float = 0.1
    rise: float = 0.1  # the share of the steps in which the learning rate rises
    end: float = 0.1  # where a cosine of the learning rate ends


SAFARI = Setting()
ZOOLOGY = Setting(
    width=64,
    depth=4,
    network=False,
    batch=512,
    rates=(1e-4, 4.6e-4, 2.2e-3, 1e-2),
    weight_decay=0.1,
    rise=0.0,
    end=0.0,
)


@dataclass(frozen=True)
class Task:
    """A task with the setting of its source: how many samples there are, and how long they are trained on."""

    title: str
    make: Callable  # (samples, rng, test) -> (tokens, targets)
    vocab: int
    length: int  # of the tokens
    chance: float  # accuracy in percent of a model that sees nothing
    train: int = 5000
    test: int = 500
    epochs: int = 200
    cosine: bool = False  # the learning rate falls as a cosine, otherwise in a line to zero
    setting: Setting = SAFARI


def _next_tokens(sequences: np.ndarray, test: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their successors, of which the test asks for the last."""
    tokens, targets = sequences[:, :-1], sequences[:, 1:].copy()
    if test:
        targets[:, :-1] = UNASKED
    return tokens, targets


def associative_recall(
    samples: int, rng: np.random.Generator, test: bool, *, vocab: int, pairs: int
):
    """Keys and their values in turn, a mark, and one of the keys again: the last token is its value.

    Half of the ordinary tokens are keys, the others values, and every sample draws a value for each key anew. Keys
    are drawn with repetition, and the key that is asked for has occurred.
    """
    ordinary = vocab - 2
    mark, keys = ordinary, ordinary // 2
    value_of = rng.integers(keys, ordinary, (samples, keys))
    shown = rng.integers(keys, size=(samples, pairs))
    asked = np.take_along_axis(shown, rng.integers(pairs, size=(samples, 1)), 1)
    both = np.stack([shown, np.take_along_axis(value_of, shown, 1)], 2).reshape(samples, 2 * pairs)
    marks = np.full((samples, 1), mark)
    found = np.take_along_axis(value_of, asked, 1)
    return _next_tokens(np.concatenate([both, marks, asked, found], 1), test)


def induction_head(samples: int, rng: np.random.Generator, test: bool, *, vocab: int, length: int):
    """Any tokens, among them a mark; at the end the mark again: the last token is the one that followed it."""
    ordinary = vocab - 2
    mark, rows = ordinary, np.arange(samples)
    tokens = rng.integers(ordinary, size=(samples, length))
    place = rng.integers(length - 2, size=samples)
    tokens[rows, place] = mark
    ends = np.stack([np.full(samples, mark), tokens[rows, place + 1]], 1)
    return _next_tokens(np.concatenate([tokens, ends], 1), test)


def future(samples: int, rng: np.random.Generator, test: bool, *, vocab: int, length: int):
    """Any tokens; the model is asked at every step for the token after it, which nothing but the future tells."""
    tokens = rng.integers(vocab, size=(samples, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


def _distinct(rng: np.random.Generator, samples: int, low: int, high: int, count: int):
    """(samples, count) from low to high - 1, no number twice in a row, all such rows alike probable."""
    if count > high - low:
        raise ValueError(f"there are no {count} different numbers from {low} to {high - 1}")
    found = rng.integers(low, high, (samples, count))
    while True:
        ordered = np.sort(found, 1)
        again = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if not again.any():
            return found
        found[again] = rng.integers(low, high, (again.sum(), count))


def many_queries(
    samples: int,
    rng: np.random.Generator,
    test: bool,
    *,
    vocab: int,
    length: int,
    pairs: int,
    exponent: float = 0.01,
):
    """Keys and their values in turn, then each key again, at which the model is asked for its value.

    The keys of a sample are different ones of the first half of the tokens, the values of the second. A key comes
    again 2 g steps behind the pairs, for different g that are drawn one after the other with probabilities in
    proportion to (g + 1)^(exponent - 1). Everywhere else is token 0.
    """
    middle, first = vocab // 2, 2 * pairs
    keys = _distinct(rng, samples, 1, middle, pairs)
    values = _distinct(rng, samples, middle, vocab, pairs)
    tokens = np.zeros((samples, length), np.int64)
    tokens[:, 0:first:2], tokens[:, 1:first:2] = keys, values
    # The smallest of exponential times, whose rates are the probabilities, are such draws in their order.
    rates = np.arange(1, (length - first) // 2 + 1) ** (exponent - 1)
    times = rng.exponential(size=(samples, len(rates))) / rates
    places = first + 2 * np.argsort(times, 1)[:, :pairs]
    targets = np.full((samples, length), UNASKED)
    np.put_along_axis(tokens, places, keys, 1)
    np.put_along_axis(targets, places, values, 1)
    return tokens, targets


def _many_queries(length: int, pairs: int, batch: int) -> Task:
    vocab = 8192
    return Task(
        f"Many queries, {vocab} tokens, {length} steps, {pairs} pairs",
        _made(many_queries, vocab=vocab, length=length, pairs=pairs),
        vocab=vocab,
        length=length,
        chance=100 / (vocab // 2),
        train=100_000,
        test=3000,
        epochs=64,
        cosine=True,
        setting=replace(ZOOLOGY, batch=batch),
    )


def _made(function: Callable, **settings) -> Callable:
    return lambda samples, rng, test: function(samples, rng, test, **settings)


TASKS = {
    "associative-recall": Task(
        "Associative recall, 10 tokens, 10 pairs",
        _made(associative_recall, vocab=10, pairs=10),
        vocab=10,
        length=22,
        chance=25.0,
    ),
    "induction-head": Task(
        "Induction head, 20 tokens, 30 steps",
        _made(induction_head, vocab=20, length=30),
        vocab=20,
        length=31,
        chance=100 / 18,
        epochs=400,
        cosine=True,
    ),
    "future": Task(
        "The next of random tokens, which only the future tells",
        _made(future, vocab=8, length=64),
        vocab=8,
        length=64,
        chance=12.5,
        train=20_000,
        test=2000,
        epochs=2,
    ),
    "mqar-64": _many_queries(64, 4, 512),
    "mqar-128": _many_queries(128, 8, 512),
    "mqar-256": _many_queries(256, 16, 256),
}
RECALL = ("associative-recall", "induction-head", "future")  # those that take minutes


def samples(task: Task, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The splits "train" and "test"; no sequence occurs twice, where there are enough different ones."""
    rng = np.random.default_rng(seed)
    found, seen = {}, set()
    for split, count in (("train", task.train), ("test", task.test)):
        tokens, targets = [], []
        left, tries = count, 0
        while left and tries < 100:
            tries += 1
            for x, y in zip(*task.make(left, rng, split == "test"), strict=True):
                whole = x.tobytes() + y[-1:].tobytes()  # the last token is a target alone
                if whole not in seen:
                    seen.add(whole)
                    tokens.append(x)
                    targets.append(y)
                    left -= 1
        if left:
            raise ValueError(f"{task.title}: there are not {count} different sequences")
        found[split] = np.stack(tokens), np.stack(targets)
    return found
