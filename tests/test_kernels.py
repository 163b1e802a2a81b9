"""The Triton kernels: by Triton's interpreter anywhere, and on a GPU where there is one."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from evenkeel.moments import measure, normalize, passes
from evenkeel.norm import BatchChannelNorm2d

SHAPES = [(3, 5, 7, 9), (2, 70, 9, 9), (1, 2, 2500), (4, 6), (2, 3, 1, 1)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def compare(kernels, device: str) -> None:
    """Every kernel against the passes in torch's own operations, on the CPU."""
    for shape in SHAPES:
        for layout in LAYOUTS.values():
            if layout is torch.channels_last and len(shape) != 4:
                continue
            for dtype in DTYPES:
                for relu in (False, True) if dtype == torch.float32 else (True,):
                    one_case(kernels, device, shape, layout, dtype, relu)


def one_case(kernels, device, shape, layout, dtype, relu) -> None:
    x = (2 * torch.randn(shape) + 50).to(dtype)
    dy = torch.randn(shape).to(dtype)
    if len(shape) == 4:
        x, dy = (t.contiguous(memory_format=layout) for t in (x, dy))
    real = passes.statistics_dtype(x)
    k, b, s, h = torch.randn(4, *shape[:2], dtype=real)
    b = b - 50 * k
    mean, var = passes.sample_moments(x)
    rows = passes._rows(x).to(device)
    m_, k_, b_, s_, h_ = (passes._per_row(t, rows).to(device) for t in (mean, k, b, s, h))
    gradient = passes._rows_as(dy, rows).to(device)

    def close(got, expected, scale):
        eps = torch.finfo(expected.dtype).eps
        expected = expected.to(device).reshape(got.shape)
        torch.testing.assert_close(got, expected, rtol=4 * eps, atol=64 * eps * scale)

    many = max(1, x.numel() // (shape[0] * shape[1])) ** 0.5
    close(kernels.sample_moments(rows, real)[0], mean, 50)
    close(kernels.sample_moments(rows, real)[1], var, 50)
    sums = kernels.paired_sums(gradient, rows, m_, k_, b_, relu=relu)
    for got, expected in zip(sums, passes.paired_sums(dy, x, mean, k, b, relu=relu), strict=True):
        close(got, expected, 10 * many)
    y, dx = torch.empty_like(rows), torch.empty_like(rows)
    kernels.affine(rows, k_, b_, y, relu=relu)
    close(y, passes._rows(passes.affine(x, k, b, relu=relu)), 50)
    kernels.combine(gradient, rows, k_, b_, s_, h_, dx, relu=relu)
    close(dx, passes._rows(passes.combine(dy, x, k, b, s, h, relu=relu)), 50)


def test_kernels_by_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which is there for Linux")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.manual_seed(0)\n"
        "import test_kernels as t; from evenkeel.moments import kernels, passes\n"
        "t.compare(kernels, 'cpu')\n"
        "passes._kernels = lambda x: kernels\n"
        "t.whole_layer('cpu')\n"
    )
    here = os.path.dirname(__file__)  # noqa: PTH120
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "error", "-c", code, here]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def whole_layer(device: str) -> None:
    """A normalizer on the kernels against torch's own in float64."""
    layer = BatchChannelNorm2d(8, 4).to(device)
    x = (3 + torch.randn(4, 8, 9, 9)).to(device).requires_grad_()
    dy = torch.randn(4, 8, 9, 9).to(device)
    y = layer(x)
    y.backward(dy)
    wide = x.detach().double().requires_grad_()
    z = torch.nn.functional.batch_norm(wide, None, None, training=True)
    z = torch.nn.functional.group_norm(z, 4)
    z.backward(dy.double())
    torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_kernels_on_a_gpu():
    from evenkeel.moments import kernels

    compare(kernels, "cuda")
    whole_layer("cuda")


@needs_gpu
def test_nothing_waits_for_the_gpu():
    x = torch.randn(4, 8, 9, 9, device="cuda", requires_grad=True)
    layer = BatchChannelNorm2d(8, 4, device="cuda")
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        normalize(x, measure(x), lambda m: (m.var, m.mean)).sum().backward()
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
