"""GPTQ's inner loop in plain PyTorch (any device): column after column."""

from torch import Tensor

from lfq_lightning.ops.fake_quant.reference import nearest

SPAN = 16  # columns rounded one after the other before a matrix product carries their errors further


def round_span(
    work: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor,
    max_code: int,
    codes: Tensor,
    latent: Tensor,
    errors: Tensor,
    book: Tensor | None = None,
) -> None:
    """Round a span of columns; each column's error goes into those after it. Writes codes, latent and errors.

    All fp32 (C, O), the weight's columns as rows, but for `factor`, upper triangular (C, C).

    Args:
        work: the weight, compensated for what was rounded before; changed.
        factor: the span's part of the Cholesky factor of the inverse Hessian.
        scale: of each weight.
        zero: of each weight.
        max_code: the largest code.
        codes: as whole numbers.
        latent: what each weight was just before it was rounded.
        errors: each weight's rounding error, over the factor's diagonal.
        book: the levels that codes count, rising; None: they are the codes, and `zero` is one of them.
    """
    for j in range(len(work)):
        latent[j] = work[j]
        if book is None:
            codes[j] = (work[j] / scale[j]).round_().add_(zero[j]).clamp_(0, max_code)
            steps = codes[j] - zero[j]
        else:
            nearest_codes = nearest(book, work[j] / scale[j])
            codes[j], steps = nearest_codes, book[nearest_codes]
        errors[j] = (work[j] - steps * scale[j]) / factor[j, j]
        work[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
