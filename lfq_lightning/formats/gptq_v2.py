"""GPTQ, version 2: zero points as they are."""

from lfq_lightning.formats import FORMATS
from lfq_lightning.formats.gptq_layout import GPTQLayout


@FORMATS.register
class GPTQv2(GPTQLayout):
    """2, 3, 4 and 8 bits, any zero point."""

    paper = "GPTQModel, checkpoint_format gptq_v2"
    version = "gptq_v2"
    zero_offset = 0
