"""GPTQ, version 1: zero points are stored less one, so 0 cannot be."""

from lfq_lightning.formats import FORMATS
from lfq_lightning.formats.gptq_layout import GPTQLayout


@FORMATS.register
class GPTQ(GPTQLayout):
    """2, 3, 4 and 8 bits, symmetric; what most engines call GPTQ."""

    paper = "AutoGPTQ; GPTQModel, checkpoint_format gptq"
    version = "gptq"
    zero_offset = 1
