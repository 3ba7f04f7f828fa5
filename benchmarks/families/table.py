"""The table in docs/models.md, from the rows."""

from collections import Counter
from pathlib import Path

DOCUMENT = Path("docs/models.md")
_BEGIN, _END = "<!-- families: begin -->\n", "<!-- families: end -->\n"


def write_table(rows: list[dict[str, str]], version: str) -> None:
    """Put the table between its two marks in the document."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    DOCUMENT.write_text(before + _BEGIN + _table(rows, version) + _END + after, encoding="utf-8")


def _table(rows: list[dict[str, str]], version: str) -> str:
    built = [row for row in rows if row["verdict"] != "not built"]
    runs = [row for row in built if row["verdict"] == "runs"]
    counted = Counter(row["verdict"] for row in built)
    folded = sum(int(row["folds"]) > 0 for row in runs)
    lines = [
        f"Of {len(built)} types of transformers {version}, as tiny random models, {len(runs)} run and "
        f"{counted['refused']} are refused in a sentence, most of them encoders; {len(built) - len(runs)} stand in the "
        f"second table. In {folded} of those that run AWQ finds folds.",
        "",
        "| type | can be packed | folds | KL of AWQ at 8 bits | kept in full precision (1 % or more) |",
        "|---|---|---|---|---|",
        *(
            f"| {row['type']} | {row['packable']} | {row['folds']} | {row['awq_8_bits_kl']} | {row['kept']} |"
            for row in runs
        ),
        "",
        "| type | verdict | why |",
        "|---|---|---|",
        *(
            f"| {row['type']} | {row['verdict']} | {row['reason'].replace('|', '/')} |"
            for row in built
            if row["verdict"] != "runs"
        ),
    ]
    return "\n".join(lines) + "\n"
