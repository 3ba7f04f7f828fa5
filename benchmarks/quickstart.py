"""Append what the last quickstart measured to benchmarks/results/quickstart.csv.

make quickstart && python -m benchmarks.quickstart
"""

import csv
import json
from pathlib import Path

from benchmarks.cpu import cpu

RESULTS = Path(__file__).parent / "results" / "quickstart.csv"
METRICS = Path("runs/quickstart/metrics.json")
MODELS = ("full_precision", "before_last_training", "quantized")


def main() -> None:
    metrics = json.loads(METRICS.read_text())
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["cpu", "model", *metrics["held_out"], "seconds", "peak_gb", "model_mb"])
        for model in MODELS:
            held_out = [f"{value:.5f}" for value in metrics[model]["held_out"].values()]
            size = f"{metrics['model_bytes'] / 1e6:.1f}"
            peak = f"{metrics['peak_bytes'] / 1e9:.2f}"
            writer.writerow([cpu(), model, *held_out, f"{metrics['seconds']:.1f}", peak, size])


if __name__ == "__main__":
    main()
