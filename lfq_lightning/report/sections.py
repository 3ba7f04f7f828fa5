"""The charts of report.html, section by section."""

from typing import Any

from lfq_lightning.report.chart import Line, bar_chart, line_chart
from lfq_lightning.report.run_record import RunRecord

Runs = list[tuple[str, RunRecord]]  # by name, in the order of their colours


def _chart(title: str, svg: str, caption: str) -> dict[str, str]:
    return {"title": title, "svg": svg, "caption": caption}


def _section(title: str, text: str, charts: list[dict[str, str]], *tables: dict[str, Any]) -> dict[str, Any] | None:
    charts = [chart for chart in charts if chart["svg"]]
    return {"title": title, "text": text, "charts": charts, "tables": list(tables)} if charts or tables else None


def _by_block(runs: Runs, key: str, unit: float = 1.0) -> list[Line]:
    """Return a line for each run: what its journal says of each block under `key`, in units of `unit`."""
    return [
        Line(name, [(block["index"], block[key] / unit) for block in run.blocks], i)
        for i, (name, run) in enumerate(runs)
    ]


_CACHE = "Of what fills the KV cache, on held-out tokens: what the best factor for each channel leaves of the error."


def _cache_lines(runs: Runs) -> list[Line]:
    """Return a line of keys and one of values for each run whose blocks have layers that make them."""
    kinds = ("keys", "values")
    found = {
        f"{name}, {kind}": [
            (b["index"], b["cache_error"][kind]) for b in run.blocks if kind in b.get("cache_error", {})
        ]
        for name, run in runs
        for kind in kinds
    }
    return [Line(name, points, i) for i, (name, points) in enumerate(found.items()) if points]


def depth(runs: Runs) -> dict[str, Any] | None:
    kl, losses = _by_block(runs, "kl_after"), _by_block(runs, "loss_after")
    starts = [
        Line(f"{name}, before training", [(block["index"], block["loss_before"]) for block in run.blocks], i, True)
        for i, (name, run) in enumerate(runs)
        if any(block["best_step"] for block in run.blocks)
    ]
    return _section(
        "Where quality went",
        "Blocks in order, each measured on held-out tokens when it had shipped.",
        [
            _chart(
                "KL along depth",
                line_chart(kl, "block", "KL to FP"),
                "What the head reads after each block (the logit lens), on up to 1024 tokens; exact at the last block, "
                "a profile before it.",
            ),
            _chart("Keys and values", line_chart(_cache_lines(runs), "block", "relative squared error"), _CACHE),
            _chart(
                "Loss of each block",
                line_chart([*starts, *losses], "block", "held-out loss", log_y=True),
                "Each block's own objective after training, and before it where it was trained. "
                "Objectives differ: compare a block with itself.",
            ),
        ],
    )


def _rates(profile: dict[str, Any], what: str) -> list[tuple[float, float]]:
    pairs = zip(profile[f"{what}.count"], profile[f"{what}.flips"], strict=True)
    return [(float(i), flips / count) for i, (count, flips) in enumerate(pairs) if count]


def flips(runs: Runs) -> dict[str, Any] | None:
    known = [(i, name, run.metrics["profile"]) for i, (name, run) in enumerate(runs) if "profile" in run.metrics]
    if not known:
        return None
    bins = len(known[0][2]["position.count"])
    sixteenths = [(float(k), f"{k / bins:.0%}") for k in range(0, bins, 4)]
    often = [(float(k), "0" if k == 0 else f"{2 ** (k - 1)}") for k in range(12)]
    position, frequency = (
        [Line(name, _rates(profile, what), i) for i, name, profile in known] for what in ("position", "frequency")
    )
    return _section(
        "Where tokens flip",
        "A flip is a held-out token after which the model's likeliest next token is not full precision's.",
        [
            _chart(
                "By position",
                line_chart(position, "place in the sequence", "share flipped", x_ticks=sixteenths),
                "Along the sequence, in sixteenths of its length.",
            ),
            _chart(
                "By frequency",
                line_chart(frequency, "occurrences of full precision's token", "share flipped", x_ticks=often),
                "How often full precision's likeliest token occurs in the calibration data; bins double.",
            ),
            _margin(known[0][2]) if len(runs) == 1 else _margins(known),
        ],
    )


def _margin(profile: dict[str, Any]) -> dict[str, str]:
    """Of one run: how many tokens there are at each margin, and how many of them flip."""
    counts = zip(profile["margin.count"], profile["margin.flips"], strict=True)
    bars = [(f"{k * profile['margin.width']:g}", [count - flips, flips]) for k, (count, flips) in enumerate(counts)]
    return _chart(
        "By margin",
        bar_chart(bars, ["same token", "flipped"], "margin of full precision, nats", "tokens"),
        "The lead of full precision's likeliest token over the second. Flips at a wide margin are the "
        "costly ones; the last bar holds all that is wider.",
    )


def _margins(known: list[tuple[int, str, dict[str, Any]]]) -> dict[str, str]:
    """Of several runs: the share that flips at each margin."""
    lines = [Line(n, [(x * p["margin.width"], y) for x, y in _rates(p, "margin")], i) for i, n, p in known]
    return _chart(
        "By margin",
        line_chart(lines, "margin of full precision, nats", "share flipped"),
        "The lead of full precision's likeliest token over the second.",
    )


def _curve(profile: dict[str, Any], which: str) -> list[tuple[float, float]]:
    columns = zip(*(profile[f"{which}.{what}"] for what in ("count", "sure", "right")), strict=True)
    return [(sure / count, right / count) for count, sure, right in columns if count]


def _calibration(profile: dict[str, Any], which: str) -> tuple[float, float, float]:
    """Return mean confidence, accuracy, and the expected calibration error (arXiv 1706.04599, equation 3)."""
    counts, sure, right = (profile[f"{which}.{what}"] for what in ("count", "sure", "right"))
    total = sum(counts)
    error = sum(abs(s - r) for s, r in zip(sure, right, strict=True)) / total
    return sum(sure) / total, sum(right) / total, error


def confidence(runs: Runs) -> dict[str, Any] | None:
    known = [(i, name, run.metrics["profile"]) for i, (name, run) in enumerate(runs) if "profile" in run.metrics]
    if not known:
        return None
    lines = [Line("as sure as right", [(0.0, 0.0), (1.0, 1.0)], 7, dashed=True)]
    lines.append(Line("full precision", _curve(known[0][2], "confidence_fp"), len(runs)))
    lines += [Line(name, _curve(profile, "confidence"), i) for i, name, profile in known]
    rows = [("full precision", *_calibration(known[0][2], "confidence_fp"))]
    rows += [(name, *_calibration(profile, "confidence")) for _, name, profile in known]
    table = {
        "head": ["model", "mean confidence", "right", "over-confidence", "calibration error"],
        "rows": [[n, f"{c:.4f}", f"{a:.4f}", f"{c - a:+.4f}", f"{e:.4f}"] for n, c, a, e in rows],
        "note": "Confidence is the probability of the likeliest next token; right is how often the text has it.",
    }
    return _section(
        "How sure the model is of itself",
        "A model that is surer than it is right goes wrong with conviction; long answers do not recover.",
        [
            _chart(
                "Calibration",
                line_chart(lines, "confidence", "share right"),
                "Tokens binned by confidence. Below the dashed line a model is over-confident.",
            )
        ],
        table,
    )


def weights(runs: Runs) -> dict[str, Any] | None:
    clipped, scales = [], []
    for i, (name, run) in enumerate(runs):
        by_kind: dict[str, list[tuple[float, dict[str, float]]]] = {}
        shipped: dict[str, tuple[float, dict[str, float]]] = {}
        for block in run.blocks:
            for layer, found in block.get("weights", {}).items():
                first = shipped.get(layer)  # a training of the whole comes again to what it found
                shipped[layer] = (first[0] if first else float(block["index"]), found)
        for layer, point in shipped.items():
            by_kind.setdefault(layer.rpartition(".")[2], []).append(point)
        if len(runs) == 1:
            for colour, (kind, points) in enumerate(by_kind.items()):
                clipped.append(Line(kind, [(x, found["at_ends"]) for x, found in points], colour))
                scales.append(Line(kind, [(x, found["scale_p50"]) for x, found in points], colour))
        elif by_kind:
            each: dict[float, list[float]] = {}
            for points in by_kind.values():
                for x, found in points:
                    each.setdefault(x, []).append(found["at_ends"])
            clipped.append(Line(name, [(x, sum(v) / len(v)) for x, v in sorted(each.items())], i))
    return _section(
        "Weights as they ship",
        "Codes at the ends of their range are where clipping happens; a scale is the step between two levels.",
        [
            _chart(
                "Weights at the ends of the range",
                line_chart(clipped, "block", "share of weights"),
                "Share of codes that are the least or the largest"
                + ("" if len(runs) == 1 else ", mean over a block's layers")
                + ".",
            ),
            _chart("Scales", line_chart(scales, "block", "median scale", log_y=True), "Median over a layer's groups."),
        ],
    )


def size(runs: Runs) -> dict[str, Any] | None:
    points = [
        Line(name, [(run.metrics["model_bytes"] / 1e6, run.held_out("quantized")["kl"])], i)
        for i, (name, run) in enumerate(runs)
    ]
    by_block = [
        Line(name, [(float(index), count / 1e6) for index, count in enumerate(run.shard_bytes[1:])], i)
        for i, (name, run) in enumerate(runs)
    ]
    outer = ", ".join(f"{name} {run.shard_bytes[0] / 1e6:.1f} MB" for name, run in runs if run.shard_bytes)
    return _section(
        "Where the bytes went",
        f"What is outside the blocks, embeddings and head above all: {outer}.",
        [
            _chart("Bytes of each block", line_chart(by_block, "block", "MB"), "As stored, scales included."),
            _chart("KL against size", line_chart(points, "MB", "KL to FP"), "Of all weights; each run a point.")
            if len(runs) > 1
            else _chart("", "", ""),
        ],
    )


def cost(runs: Runs) -> dict[str, Any] | None:
    seconds, peaks = _by_block(runs, "seconds"), _by_block(runs, "peak_bytes", 2.0**30)
    return _section(
        "Time and memory",
        "Of each block, with reading, solving, training and writing it.",
        [
            _chart("Time", line_chart(seconds, "block", "seconds"), "Wall clock; other work on the machine counts."),
            _chart("Memory", line_chart(peaks, "block", "GiB at most"), "On a GPU what was allocated, else resident."),
        ],
    )
