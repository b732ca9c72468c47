"""The text: Python's language reference as Python's own help() shows it, and what other compressors make of its end."""

import gzip
import lzma
import math
from collections import Counter
from hashlib import sha256
from pydoc_data.topics import topics

HELD_OUT = 0.1


def text() -> bytes:
    """The paragraphs of all topics of the language reference, in the order of the topics' names, in UTF-8.

    Topics share sections. Each paragraph is there once, so that the held-out end is new. The text differs between
    releases of Python, so that results name its hash.
    """
    parts = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(parts)).encode()


def split(whole: bytes) -> tuple[bytes, bytes]:
    """The text to train on, and its held-out end, HELD_OUT of it."""
    cut = len(whole) - int(len(whole) * HELD_OUT)
    return whole[:cut], whole[cut:]


def digest(whole: bytes) -> str:
    return sha256(whole).hexdigest()[:12]


def levels(train: bytes, tail: bytes) -> dict[str, float]:
    """Bits for each byte of `tail`, by models that know `train`.

    uniform: 8. unigram: the code of the bytes' frequencies in `train`, each counted once more. gzip, xz: how much
    longer train + tail is than train alone, each compressed at the highest level, so that the compressor has seen
    `train` when it comes to `tail`. Of that gzip remembers the last 32 KB, xz all.
    """
    counts = Counter(train)
    total = len(train) + 256
    unigram = -sum(math.log2((counts[byte] + 1) / total) for byte in tail) / len(tail)
    found = {"uniform": 8.0, "unigram": unigram}
    ways = {
        "gzip": lambda data: gzip.compress(data, 9, mtime=0),
        "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    for name, compress in ways.items():
        more = len(compress(train + tail)) - len(compress(train))
        found[name] = 8 * more / len(tail)
    return found
