"""The README.md of a packed model: what it is, what it lost, what loads it."""

from collections import Counter
from typing import Any

from lfq_lightning.grids import Grid

_ROWS = {"full_precision": "full precision", "quantized": "this model"}
_COLUMNS = {
    "kl": "KL to full precision",
    "top1_agreement": "top-1 agreement",
    "flip_rate": "flip rate",
    "perplexity": "perplexity",
}


def model_card(
    config: dict[str, Any],
    schemes: dict[str, Grid],
    engines: list[str],
    metrics: dict[str, Any] | None,
) -> str:
    """Return the card as Markdown; `metrics` is what a run leaves in metrics.json."""
    kinds = Counter(schemes.values()).most_common()
    listed = "\n".join(f"- {count} linear layers with {scheme}" for scheme, count in kinds)
    table = ""
    if metrics is not None:
        lines = [f"| held-out text | {' | '.join(_COLUMNS.values())} |", "|---" * (1 + len(_COLUMNS)) + "|"]
        for key, row in _ROWS.items():
            values = metrics[key]["held_out"]
            lines.append(f"| {row} | {' | '.join(f'{values[column]:.4g}' for column in _COLUMNS)} |")
        said = f"\nFull precision here: {metrics['reference']}.\n" if "reference" in metrics else ""
        table = "\n## Measured\n\n" + "\n".join(lines) + "\n" + said
    method = config["quantization_config"]["quant_method"]
    architecture = config["architectures"][0]
    return (
        f"# {architecture}, quantised\n\nBy lfq_lightning; stored as {method}.\n\n{listed}\n"
        f"{table}\n## Loading\n\n{', '.join(engines)}; or `lfq generate`, `lfq chat` and `lfq_lightning.load`.\n"
    )
