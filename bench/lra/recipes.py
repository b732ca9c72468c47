"""Hyper-parameters and published accuracy for every (task, layer). Importing this needs no torch.

A row comes from a paper or from its released configuration. `ours` marks rows for which neither gives
hyper-parameters, so that we chose them. A row of ours may have a `published` result, since a paper may report one
without its settings.
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType

from bench.lra.options import KERNELS, S4D, Butterfly, Hyena, LongConv, Model, Optim, SGConv

S4D_PAPER = "S4D-Lin, arXiv 2206.11893"
SGCONV_PAPER = "SGConv, arXiv 2210.09298"
LONG_CONV_PAPER = "LongConv (random, squash), arXiv 2302.06646"
BUTTERFLY_PAPER = "LongConv with learned butterfly, arXiv 2302.06646"

# Generated tasks have the recipe of the published task of the same kind.
ALIASES = {
    "listops-gen": "listops",
    "pathfinder32-hard": "pathfinder",
    "pathfinder64-gen": "pathfinder64",
    "pathx-gen": "pathx",
    "path256-gen": "path256",
}


# Sequences in the training split of the published sets.
SAMPLES = {
    "listops": 96_000,
    "text": 25_000,
    "retrieval": 147_086,
    "image": 45_000,
    "pathfinder": 160_000,
    "pathfinder64": 160_000,
    "pathx": 160_000,
    "path256": 160_000,
    "scifar": 45_000,
    "speech": 84_843,
}


@dataclass(frozen=True)
class Recipe:
    model: Model
    kernel: object
    optim: Optim
    published: float | None = None  # test accuracy in percent
    source: str = ""
    ours: bool = False
    note: str = ""


def row(depth, d_model, norm, pre, dropout, lr, batch, epochs, decay, total, warmup, pool):
    """Returns (Model, Optim) of a line of a table. total: steps until the cosine is zero; None for all."""
    model = Model(depth, d_model, norm, pre, dropout, pool)
    return model, Optim(lr, decay, batch, epochs, warmup, total)


def accumulated(settings: tuple[Model, Optim], parts: int) -> tuple[Model, Optim]:
    return settings[0], replace(settings[1], accumulate=parts)


BN, LN = "batch", "layer"
#             layers H  norm  pre  drop  lr  batch epochs wd  cosine warm-up pool
LISTOPS = row(8, 128, BN, False, 0.0, 0.01, 50, 40, 0.05, 80_000, 1000, "mean")
TEXT = row(6, 256, BN, True, 0.0, 0.01, 16, 32, 0.05, 50_000, 1000, "mean")
RETRIEVAL = row(6, 256, BN, True, 0.0, 0.01, 64, 20, 0.05, 50_000, 2500, "mean")
IMAGE = row(6, 512, LN, False, 0.1, 0.01, 50, 200, 0.05, 180_000, 900, "mean")
PATHFINDER = row(6, 256, BN, True, 0.0, 0.004, 64, 200, 0.03, 500_000, 2500, "last")
PATHX = row(6, 256, BN, True, 0.0, 0.0005, 32, 50, 0.05, 500_000, 10_000, "mean")
SPEECH = row(6, 128, BN, True, 0.0, 0.01, 16, 40, 0.05, 200_000, 1000, "mean")
PATH256 = row(6, 256, BN, True, 0.0, 0.0001, 16, 20, 0.05, None, 10_000, "mean")
NO_SETTINGS = "the paper gives a result but no settings"

S4D_ROWS = {
    "listops": (LISTOPS, S4D(dt_lr=0.01), 60.52),
    "text": (TEXT, S4D(dt_lr=0.01), 86.97),
    "retrieval": (RETRIEVAL, S4D(n_ssm=256, dt_lr=0.01), 90.96),
    "image": (IMAGE, S4D(n_ssm=2, dt_lr=0.01), 87.93),
    "pathfinder": (PATHFINDER, S4D(n_ssm=256), 93.96),
    "pathx": (PATHX, S4D(dt_min=1e-4, dt_max=0.1, kernel_lr=5e-4), 96.02),
    "scifar": (IMAGE, S4D(n_ssm=2), 90.42),
    "speech": (SPEECH, S4D(n_ssm=2), 96.25),
}

SGCONV_ROWS = {
    "listops": (LISTOPS, SGConv(kernel_dim=1), 61.45),
    "text": (TEXT, SGConv(kernel_dim=2), 89.20),
    "retrieval": (RETRIEVAL, SGConv(kernel_dim=1), 91.11),
    "image": (
        row(6, 512, LN, False, 0.2, 0.01, 50, 200, 0.05, 200_000, 1000, "mean"),
        SGConv(kernel_dim=32, decay="power_fixed", decay_min=1.0, decay_max=1.0),
        87.97,
    ),
    "pathfinder": (
        row(6, 256, BN, True, 0.2, 0.004, 64, 200, 0.03, 500_000, 2500, "last"),
        SGConv(kernel_dim=32),
        95.46,
    ),
    "pathx": (
        row(6, 256, BN, True, 0.0, 0.004, 64, 50, 0.03, 125_000, 10_000, "mean"),
        SGConv(kernel_dim=64, init_scale=1, init="cos", decay_min=1.0, decay_max=3.0),
        97.83,
    ),
}

LONG_CONV_ROWS = {
    "listops": (
        row(8, 128, BN, False, 0.0, 0.01, 50, 40, 0.05, 80_000, 10_000, "mean"),
        LongConv(lam=0.002, kernel_dropout=0.2, kernel_lr=5e-4),
        60.3,
    ),
    "text": (
        row(6, 256, BN, True, 0.0, 0.01, 16, 32, 0.05, 50_000, 5000, "mean"),
        LongConv(lam=0.003, kernel_dropout=0.2, kernel_lr=1e-3),
        87.1,
    ),
    "retrieval": (
        accumulated(RETRIEVAL, 2),
        LongConv(lam=0.004, kernel_dropout=0.1, kernel_lr=1e-4),
        90.0,
    ),
    "image": (
        row(6, 512, LN, False, 0.1, 0.01, 50, 200, 0.05, 200_000, 1000, "mean"),
        LongConv(lam=0.003, kernel_dropout=0.2, kernel_lr=1e-3),
        88.3,
    ),
    "pathfinder": (
        PATHFINDER,
        LongConv(lam=0.001, kernel_dropout=0.3, kernel_lr=1e-3, bidirectional=True),
        94.0,
    ),
    "pathx": (
        row(6, 256, BN, True, 0.0, 0.0005, 16, 50, 0.05, 500_000, 10_000, "mean"),
        LongConv(lam=0.001, kernel_dropout=0.3, kernel_lr=5e-4, bidirectional=True),
        96.9,
    ),
    "scifar": (
        row(6, 512, LN, False, 0.1, 0.01, 50, 300, 0.05, 300_000, 1000, "mean"),
        LongConv(lam=0.001, kernel_dropout=0.2, kernel_lr=1e-3),
        91.0,
    ),
}


def _published() -> dict:
    papers = {
        "s4d": (S4D_ROWS, S4D_PAPER),
        "sgconv": (SGCONV_ROWS, SGCONV_PAPER),
        "long_conv": (LONG_CONV_ROWS, LONG_CONV_PAPER),
    }
    table = {
        (task, layer): Recipe(settings[0], kernel, settings[1], accuracy, source)
        for layer, (rows, source) in papers.items()
        for task, (settings, kernel, accuracy) in rows.items()
    }
    note = (
        "initial steps up to 0.1: with the paper's 0.01 S4D-Lin stays at chance; arXiv 2508.20441"
    )
    table["pathx", "s4d"] = replace(
        table["pathx", "s4d"], source="S4D-Lin, arXiv 2508.20441", note=note
    )
    return table


def _our_large(table: dict) -> None:
    """Adds rows for which no settings are published. They have the nearest published ones."""

    def ours(task, layer, settings, kernel, *published, note=""):
        table[task, layer] = Recipe(
            settings[0], kernel, settings[1], *published, ours=True, note=note
        )

    sgconv_image = SGCONV_ROWS["image"]
    ours("scifar", "sgconv", sgconv_image[0], sgconv_image[1], note="as image")
    ours("speech", "sgconv", SPEECH, SGConv(kernel_dim=32), note="S4D's backbone")
    taps = LongConv(lam=0.001, kernel_dropout=0.3, kernel_lr=5e-4, bidirectional=True)
    ours("speech", "long_conv", SPEECH, replace(taps, heads=1), note="S4D's backbone")
    note = "backbone of S4D-DFouT's Path256 run, 87.89%"
    ours("path256", "s4d", PATH256, S4D(d_state=128, dt_min=1e-4, kernel_lr=1e-4), note=note)
    cos = SGConv(kernel_dim=64, init_scale=2, init="cos", decay_min=1.0, decay_max=3.0)
    ours("path256", "sgconv", PATH256, cos, note="Path-X's kernel, one scale longer")
    settings = replace(PATH256[0], depth=4, d_model=128), replace(PATH256[1], lr=5e-4)
    kernel = replace(taps, heads=1)
    ours("path256", "long_conv", settings, kernel, 92.2, LONG_CONV_PAPER, note=NO_SETTINGS)
    # A learned butterfly has no bidirectional form, and LongConv's settings otherwise.
    for task in (*LONG_CONV_ROWS, "speech", "path256"):
        base = table[task, "long_conv"]
        same = ("init", "lam", "kernel_dropout", "heads", "kernel_lr")
        kernel = Butterfly(**{name: getattr(base.kernel, name) for name in same})
        published = (92.5, BUTTERFLY_PAPER) if task == "scifar" else ()
        note = "LongConv's settings"
        ours(task, "butterfly", (base.model, base.optim), kernel, *published, note=note)
    for task in (*S4D_ROWS, "path256"):
        base = table[task, "s4d"]
        settings = base.model, replace(base.optim, lr=min(base.optim.lr, 2e-3))
        ours(task, "hyena", settings, Hyena(), note="S4D's backbone")

    for layer in KERNELS:
        base = table["pathfinder", layer]
        note = "Pathfinder's settings"
        table["pathfinder64", layer] = Recipe(
            base.model, base.kernel, base.optim, ours=True, note=note
        )


def _our_small(table: dict) -> None:
    """Adds rows that take minutes on two cores."""
    rows = {
        "mnist5k": row(2, 32, LN, False, 0.0, 0.01, 16, 20, 0.01, None, 200, "mean"),
        "digits": row(2, 64, BN, False, 0.0, 0.01, 50, 40, 0.01, None, 50, "mean"),
        "r8": row(2, 64, BN, False, 0.1, 0.01, 16, 6, 0.05, None, 200, "mean"),
        "ucr": row(2, 32, BN, False, 0.0, 0.01, 10, 100, 0.01, None, 20, "mean"),
        "listops-short": row(4, 64, BN, False, 0.0, 0.01, 50, 1, 0.05, None, 200, "mean"),
        "pathfinder32-easy": row(4, 32, BN, True, 0.0, 0.008, 16, 3, 0.03, None, 300, "mean"),
    }
    kernels = {
        "s4d": S4D(),
        "sgconv": SGConv(kernel_dim=16, kernel_lr=0.01),
        "long_conv": LongConv(init="double_exp", lam=0.001, heads=1, bidirectional=True),
        "butterfly": Butterfly(init="double_exp", lam=0.001, heads=1),
        "hyena": Hyena(),
    }
    # Free taps need more passes than structured ones.
    free, none = kernels["long_conv"], {"lam": 0.0, "kernel_dropout": 0.0}
    pathfinder = replace(free, lam=0.0, kernel_dropout=0.1, kernel_lr=0.002)
    own = {
        ("mnist5k", "s4d"): (S4D(bidirectional=False), 20),
        ("r8", "long_conv"): (replace(free, kernel_lr=0.002), 20),
        ("ucr", "long_conv"): (replace(free, **none), 100),
        ("pathfinder32-easy", "sgconv"): (SGConv(kernel_dim=32, kernel_lr=0.01), 3),
        ("pathfinder32-easy", "long_conv"): (pathfinder, 6),
    }
    for task, (model, optim) in rows.items():
        for layer, kernel in kernels.items():
            kernel, epochs = own.get((task, layer), (kernel, optim.epochs))
            table[task, layer] = Recipe(model, kernel, replace(optim, epochs=epochs), ours=True)


def _table() -> MappingProxyType:
    table = _published()
    _our_large(table)
    _our_small(table)
    return MappingProxyType(table)


RECIPES = _table()
TASKS = tuple(dict.fromkeys(task for task, _ in RECIPES))


# The accuracy in percent that recipes of ours must reach on a processor, as a mean over seeds. It was set beforehand.
_LEAST = {"digits": 98, "ucr:GunPoint": 98, "r8": 85, "listops-short": 40, "pathfinder32-easy": 92}
BARS = MappingProxyType(
    {(task, layer): bar for task, bar in _LEAST.items() for layer in ("s4d", "sgconv", "long_conv")}
    | {("mnist5k", "s4d"): 96}
)


def recipe(task: str, layer: str) -> Recipe:
    """Returns the row of a task, of an alias, or of any "ucr:NAME". Raises ValueError with a suggestion if there is
    none."""
    if layer not in KERNELS:
        raise ValueError(f"unknown layer {layer!r}{suggest(layer, KERNELS)}")
    name = "ucr" if task.startswith("ucr:") else ALIASES.get(task, task)
    if name == task == "ucr" or (name, layer) not in RECIPES:
        known = [*(t for t in TASKS if t != "ucr"), *ALIASES, "ucr:GunPoint"]
        raise ValueError(f"unknown task {task!r}{suggest(task, known)}")
    return RECIPES[name, layer]


def whole(task: str, layer: str, samples: int) -> int:
    """Returns how many sequences the recipe's training sees. samples: size of the training split, if it is ours."""
    published = SAMPLES.get(ALIASES.get(task, task), samples)
    return recipe(task, layer).optim.epochs * published


def suggest(word: str, known) -> str:
    """Returns what stands behind "unknown ...": the nearest of the known words, or else all of them."""
    near = get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(known)}"


# Names that other programs have for our options.
_CALLED = {"learning_rate": "optim.lr", "wd": "optim.weight_decay", "batch_size": "optim.batch"}
_CALLED |= {"n_layers": "model.depth", "max_epochs": "optim.epochs", "gpu": "device"}


def suggest_option(word: str, known) -> str:
    """Does the same for options. The last part of a name comes first: `lr` means optim.lr."""
    last = word.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last]
    near = near or [name for name in (_CALLED.get(last),) if name in known]
    if not near:
        parts = {name.rpartition(".")[2]: name for name in known} | {name: name for name in known}
        close = get_close_matches(word, parts, n=4, cutoff=0.6)
        near = list(dict.fromkeys(parts[name] for name in close))[:3]
    if near:
        return f"; did you mean {' or '.join(f'--{name}' for name in near)}?"
    return suggest(word, known)
