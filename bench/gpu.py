"""What is measured on a GPU, and what the CUDA kernels are meant to reach there."""

from dataclasses import asdict
from statistics import median

from bench import report
from bench.contenders import BASELINE, Case
from seqconv import _cuda, _ops

CHANNELS = 768
LENGTHS = (256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 1 << 20)
ODD = (1000, 5000, 14113, 65537)
PEERS = ("flashfftconv", "subquadratic_ops", "nvsubquadratic")
# Times over that of a copy of the bytes that must move, 16-bit tensors, 64 samples (one pass to 32768).
FORWARD = {256: 1.75, 1024: 1.25, 2048: 1.25, 4096: 1.25, 8192: 1.25, 16384: 1.4, 32768: 1.55}
GATED = {256: 1.6, 1024: 1.2, 2048: 1.2, 4096: 1.2, 8192: 1.2, 16384: 1.25, 32768: 1.3}
BACKWARD = 1.4  # forward and backward together, to 8192
FLOAT32 = 1.6
FASTER = 4.0  # than torch.fft, 16-bit tensors


def sized(length: int, batch: int, **more) -> Case:
    """768 channels where three tensors of them fit beside torch.fft's temporaries, else fewer."""
    most = (1 << 30) // (batch * length)
    return Case(batch=batch, channels=max(1, min(CHANNELS, most)), length=length, **more)


def cases() -> list[tuple[Case, tuple[str, ...], list]]:
    """(case, contenders, cases in the same rounds), the most telling first: time on a GPU is short."""
    pair, peers = ("seqconv", BASELINE), ("seqconv", BASELINE, "torch.compile", *PEERS)
    found = []
    for op in ("forward", "forward+backward"):
        for length in LENGTHS:
            at = {"op": op, "dtype": "bfloat16"}
            causal = sized(length, 64, **at)
            found.append((causal, peers if op == "forward" else pair, []))
            two_sided = sized(length, 64, mode="two_sided", **at)
            found.append((two_sided, pair, [(causal, 1, 1.0)]))
            found.append((sized(length, 64, mode="gated", **at), pair, []))
            found.append((sized(length, 64, op=op), pair, []))
    for op in ("forward", "forward+backward"):
        for batch in (8, 1):
            for length in LENGTHS:
                found.append((sized(length, batch, op=op, dtype="bfloat16"), pair, []))
        for length in ODD:
            found.append((sized(length, 8, op=op, dtype="bfloat16"), pair, []))
            found.append((sized(length, 8, op=op, dtype="float16"), pair, []))
    return found


def predicted(case: Case, tensors) -> float | None:
    """Seconds by the planner's model, where the fused kernels take the case."""
    u, k, _, k_rev, *_ = tensors
    if _ops.fallback_reason(u.device, u.dtype, case.length) or u.device.type == "cpu":
        return None
    if case.layout == "blh":
        u = u.transpose(1, 2)
    seconds = _cuda.explain(u, k, k_rev)[0].seconds
    return (
        seconds if case.op == "forward" else seconds + _cuda.explain(u, k, k_rev, True)[0].seconds
    )


def requirements(rows: list[dict]) -> list[tuple[str, str, str, bool]]:
    """(what, wanted, measured, met) of every target that the rows can decide."""
    mine = [r for r in rows if r["contender"] == "seqconv"]
    red = [r for r in mine if not r["gate"]]
    lines = [("every result of seqconv is right", "0 red", f"{len(red)} red", not red)]

    def compare(what, value, limit, at_least):
        met = value >= limit if at_least else value <= limit
        sign = ">=" if at_least else "<="
        lines.append((what, f"{sign} {limit:.3g}x", f"{value:.3g}x", met))

    def limit_of(row) -> float | None:
        if row["dtype"] == "float32":
            return FLOAT32 if row["op"] == "forward" and row["length"] <= 16384 else None
        if row["op"] != "forward":
            return BACKWARD if row["mode"] == "causal" and row["length"] <= 8192 else None
        return {"causal": FORWARD, "gated": GATED}.get(row["mode"], {}).get(row["length"])

    for row in mine:
        if not row["gate"] or row["median"] is None:
            continue
        case = Case(**{f: row[f] for f in asdict(Case())})
        limit = limit_of(row) if row["batch"] == 64 else None
        if limit:
            value = row["median"] / row["floor_copy"]
            compare(f"over a copy of its bytes, {case}", value, limit, False)
        if row["dtype"] != "float32" and "ratio" in row:
            compare(f"over torch.fft, {case}", row["ratio"], FASTER, True)
        if row.get("beside") and row["length"] == 16384:
            compare(f"two-sided beside causal, {case}", row["beside"][1], 1.15, False)
        same = [
            r["median"]
            for r in rows
            if r["contender"] in PEERS
            and r["median"]
            and all(r[f] == row[f] for f in asdict(Case()))
        ]
        if same:
            compare(f"over the fastest peer, {case}", min(same) / row["median"], 1.0, True)
    return lines


def readme_table(rows: list[dict]) -> str:
    """Times of the causal convolution in bfloat16 beside the copy and torch.fft."""
    first = rows[0]
    header = ["bfloat16, 64 samples", *[report.length_name(n) for n in LENGTHS]]
    lines = []
    for op in ("forward", "forward+backward"):
        for value, name in (
            ("median", "ms"),
            ("floor", "times a copy"),
            ("ratio", "times torch.fft's speed"),
        ):
            cells = []
            for length in LENGTHS:
                at = {
                    "length": length,
                    "op": op,
                    "dtype": "bfloat16",
                    "mode": "causal",
                    "batch": 64,
                }
                found = [
                    r
                    for r in rows
                    if r["contender"] == "seqconv"
                    and r["median"]
                    and all(r[k] == v for k, v in at.items())
                ]
                get = {
                    "median": lambda r: r["median"] * 1e3,
                    "floor": lambda r: r["median"] / r["floor_copy"],
                    "ratio": lambda r: r.get("ratio", float("nan")),
                }[value]
                cells.append(f"{median(map(get, found)):.3g}" if found else "-")
            lines.append([f"{op}, {name}", *cells])
    met = requirements(rows)
    text = f"{first['device']}, torch {first['versions']['torch']}, commit {first['commit']}; "
    text += f"{sum(x[3] for x in met)} of {len(met)} targets are met."
    return "\n\n".join([report.markdown(header, lines), text])
