"""GPTQ's kernel against a hand-written loop in fp64."""

import pytest
import torch

from lfq_lightning.ops.gptq_solve import reference, round_columns

kernel = pytest.importorskip("lfq_lightning.ops.gptq_solve.triton")


def problem(columns: int, rows: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    seed = torch.Generator().manual_seed(columns + rows)
    work = torch.randn(columns, rows, generator=seed)
    x = torch.randn(columns, 2 * columns + 8, generator=seed)
    inverse = torch.linalg.inv(x @ x.T / x.shape[1] + 0.01 * torch.eye(columns))
    factor = torch.linalg.cholesky(inverse, upper=True)
    scale = torch.rand(columns, rows, generator=seed) * 0.5 + 0.2
    zero = torch.randint(0, 8, (columns, rows), generator=seed).float()
    return tuple(t.to(device) for t in (work, factor, scale, zero))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("max_code", [3, 15])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (63, 100), (100, 63), (128, 33), (16, 1000)])
def test_span(columns: int, rows: int, max_code: int, kernel_device: torch.device) -> None:
    work, factor, scale, zero = problem(columns, rows, kernel_device)
    found = [torch.empty_like(work) for _ in range(3)]
    kernel.round_span(work, factor, scale, zero, max_code, *found)
    codes, latent, errors = (t.double() for t in found)
    w = work.double()
    for j in range(columns):  # on the kernel's own codes: a half that rounds the other way would change all after it
        torch.testing.assert_close(latent[j], w[j], rtol=1e-4, atol=1e-4)
        level = w[j] / scale[j].double()
        nearest = (level + zero[j]).round().clamp(0, max_code)
        tie = (level - level.floor() - 0.5).abs() < 1e-3
        assert torch.equal(codes[j][~tie], nearest[~tie])
        error = (w[j] - (codes[j] - zero[j].double()) * scale[j].double()) / factor[j, j].double()
        torch.testing.assert_close(errors[j], error, rtol=1e-4, atol=1e-3)
        w[j + 1 :] -= factor[j, j + 1 :].double()[:, None] * error


def test_slices_of_larger_tensors(kernel_device: torch.device) -> None:
    work, factor, scale, zero = problem(40, 50, kernel_device)
    span = slice(8, 24)
    results = [torch.zeros_like(work) for _ in range(3)]
    kernel.round_span(work[span], factor[span, span], scale[span], zero[span], 7, *(t[span] for t in results))
    whole = [torch.zeros_like(work[span]) for _ in range(3)]
    copies = (t[span].contiguous() for t in (work, scale, zero))
    w, s, z = copies
    reference.round_span(w, factor[span, span].contiguous(), s, z, 7, *whole)
    for sliced, alone in zip(results, whole, strict=True):
        torch.testing.assert_close(sliced[span], alone, rtol=1e-4, atol=1e-4)
        assert not sliced[:8].any() and not sliced[24:].any()


def test_operator_is_well_formed(kernel_device: torch.device) -> None:
    work, factor, scale, zero = problem(5, 7, kernel_device)
    results = [torch.zeros_like(work) for _ in range(3)]
    torch.library.opcheck(kernel.round_span, (work, factor, scale, zero, 7, *results))


def test_halving_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    work, factor, scale, zero = problem(90, 20, torch.device("cpu"))
    halved, straight = ([torch.empty_like(work) for _ in range(3)] for _ in range(2))
    round_columns(work.clone(), factor, scale, zero, 7, *halved)
    monkeypatch.setattr(reference, "SPAN", 90)
    round_columns(work.clone(), factor, scale, zero, 7, *straight)
    assert torch.equal(halved[0], straight[0])
    for one, other in zip(halved, straight, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
