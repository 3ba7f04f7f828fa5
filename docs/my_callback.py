"""Write each block's KL to a file: a callback of one's own."""

from pathlib import Path

from lfq_lightning.callbacks import CALLBACKS, BlockCallback


@CALLBACKS.register
class KLToFile(BlockCallback):
    """A line per block: its name, and the KL to full precision behind it, in nats per token."""

    paper = "an example"

    def __init__(self, *, file: str = "kl.txt") -> None:
        self.file = Path(file)

    def on_block_end(self, trainer, report):
        if trainer.is_global_zero:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(f"{report.name} {report.kl_after:.4f}\n")
