"""Batch moments against plain float64 arithmetic, pooled exactly, on hostile inputs too."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from evenkeel.moments import BatchMoments

FIELDS = ("mean", "var", "mean_spread", "var_spread")
SHAPES = [(6, 3), (6, 3, 5), (6, 3, 4, 5), (4, 3, 2, 3, 4)]


def reference(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The definitions in the docstring, one channel after the other, in float64."""
    x = x.detach().double().reshape(*x.shape[:2], -1)
    result: dict[str, list[float]] = {name: [] for name in FIELDS}
    for c in range(x.shape[1]):
        mean = x[:, c].mean()
        var = (x[:, c] - mean).square().mean()
        means = [sample[c].mean() for sample in x]
        deviations = [(sample[c] - mean).square().mean() for sample in x]
        result["mean"].append(float(mean))
        result["var"].append(float(var))
        result["mean_spread"].append(float(sum((a - mean) ** 2 for a in means)))
        result["var_spread"].append(float(sum((s - var) ** 2 for s in deviations)))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in result.items()}


def assert_moments(moments: BatchMoments, x: torch.Tensor, rtol: float, fields=FIELDS) -> None:
    expected = reference(x)
    for name in fields:
        got = getattr(moments, name)
        assert got.dtype == torch.float64
        torch.testing.assert_close(
            got, expected[name], rtol=rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-5), (torch.bfloat16, 1e-5)],
)
def test_moments_of_a_batch(shape, dtype, rtol):
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    moments = BatchMoments.of(x)
    assert_moments(moments, x, rtol)
    assert moments.samples == shape[0]
    assert moments.count == x.numel() // shape[1]


def test_the_input_is_only_read():
    x = torch.randn(5, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    before = x.detach().clone()
    moments = BatchMoments.of(x)
    assert_moments(moments, x, 1e-5)
    assert torch.equal(x, before)
    assert not moments.mean.requires_grad
    assert not moments.var.requires_grad


def test_unbiased_variance_is_torchs():
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = x.transpose(0, 1).reshape(2, -1).var(1)
    torch.testing.assert_close(BatchMoments.of(x).unbiased_var, expected, rtol=1e-12, atol=0)


# ---- pooling


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5)], ids=["2-D", "4-D"])
def test_uneven_batches_pool_to_the_whole_set(shape):
    batches = [k + (k + 1) * torch.randn(n, *shape).double() for k, n in enumerate((1, 7, 32, 2))]
    whole = torch.cat(batches)
    pooled = BatchMoments.pool([BatchMoments.of(b) for b in batches])
    assert_moments(pooled, whole, 1e-10, ("mean", "var", "mean_spread"))
    assert (pooled.samples, pooled.count) == (42, whole.numel() // 3)


def test_parts_with_different_numbers_of_positions_count_by_element():
    small, large = torch.randn(4, 2, 9).double(), 5 + torch.randn(3, 2, 100).double()
    pooled = BatchMoments.pool([BatchMoments.of(small), BatchMoments.of(large)])
    elements = torch.cat([x.transpose(0, 1).reshape(2, -1) for x in (small, large)], dim=1)
    torch.testing.assert_close(pooled.mean, elements.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(pooled.var, elements.var(1, correction=0), rtol=1e-12, atol=0)
    assert (pooled.samples, pooled.count) == (7, 336)


def test_variance_spread_pools_exactly_where_the_parts_agree_in_mean():
    # What the summaries cannot give is the part that mixes third moments with shifts of the mean.
    batches = [(k + 1) * torch.randn(n, 2, 6).double() for k, n in enumerate((5, 9))]
    batches = [b - b.mean((0, 2), keepdim=True) for b in batches]
    pooled = BatchMoments.pool([BatchMoments.of(b) for b in batches])
    expected = reference(torch.cat(batches))["var_spread"]
    torch.testing.assert_close(pooled.var_spread, expected, rtol=1e-10, atol=0)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(1, 11), max_size=5),
    positions=st.integers(1, 4),
    center=st.floats(-1e3, 1e3),
    scale=st.floats(1e-3, 1e3),
    tree=st.booleans(),
)
def test_pooling_does_not_depend_on_the_cut(seed, cuts, positions, center, scale, tree):
    generator = torch.Generator().manual_seed(seed)
    x = center + scale * torch.randn(12, 2, positions, generator=generator, dtype=torch.float64)
    parts = [BatchMoments.of(p) for p in torch.tensor_split(x, sorted(set(cuts)))]
    if tree:  # pools of pools too
        parts = [BatchMoments.pool(parts[:2]), *parts[2:]]
    pooled, whole = BatchMoments.pool(parts), BatchMoments.of(x)
    assert (pooled.samples, pooled.count) == (whole.samples, whole.count)
    rounding = 1e-13 * (center**2 + scale**2)
    torch.testing.assert_close(pooled.mean, whole.mean, rtol=1e-10, atol=rounding**0.5 * 1e-6)
    torch.testing.assert_close(pooled.var, whole.var, rtol=1e-10, atol=rounding)
    torch.testing.assert_close(pooled.mean_spread, whole.mean_spread, rtol=1e-9, atol=rounding)


# ---- reads


def test_reads_add_elements_and_no_samples():
    x = torch.randn(6, 2, 5).double()
    reads = [BatchMoments.of(x + k) for k in (-1.0, 0.0, 4.0)]
    whole = BatchMoments.repeat(reads)
    elements = torch.cat([x - 1, x, x + 4], dim=2)
    assert (whole.samples, whole.count) == (6, 90)
    assert_moments(whole, elements, 1e-10, ("mean", "var"))
    # what differs between reads is no difference between samples
    alone = BatchMoments.of(x)
    torch.testing.assert_close(whole.mean_spread, alone.mean_spread, rtol=1e-10, atol=0)


def test_spreads_over_reads_are_the_reads_average():
    reads = [BatchMoments.of(k * torch.randn(4, 3, 6).double()) for k in (1, 2, 5)]
    whole = BatchMoments.repeat(reads)
    for name in ("mean_spread", "var_spread"):
        expected = sum(getattr(r, name) for r in reads) / 3
        torch.testing.assert_close(getattr(whole, name), expected, rtol=1e-12, atol=0)
    assert whole.samples == 4


def test_one_read_is_itself():
    moments = BatchMoments.of(torch.randn(4, 3))
    assert BatchMoments.repeat([moments]) is moments


# ---- hostile input


@pytest.mark.parametrize("positions", [1, 49, 1024])
def test_a_mean_far_larger_than_the_deviation_costs_few_digits(positions):
    # Raw moments in float32 would give the variance as 0 plus or minus 8.
    x = 1e4 + torch.randn(32, 3, positions)
    moments = BatchMoments.of(x)
    assert_moments(moments, x, 1e-7, ("mean",))
    assert_moments(moments, x, 1e-4, ("var",))
    assert_moments(moments, x, 2e-2, ("mean_spread", "var_spread"))


@pytest.mark.parametrize("center", [1e4, 10016.0])
def test_a_large_mean_in_bfloat16(center):
    # At 1e4 all values round to one number; 10016 lies between two, and values fall on either.
    x = (center + torch.randn(16, 3, 64)).bfloat16()
    moments = BatchMoments.of(x)
    assert_moments(moments, x, 1e-7, ("mean",))
    assert_moments(moments, x, 1e-6, ("var",))
    assert (moments.var == 0).all() == (center == 1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_element(dtype):
    x = torch.tensor([[2.5, -1e4]], dtype=dtype)
    moments = BatchMoments.of(x)
    assert (moments.samples, moments.count) == (1, 1)
    assert torch.equal(moments.mean, x[0].double())
    for name in ("var", "unbiased_var", "mean_spread", "var_spread"):
        assert getattr(moments, name).tolist() == [0.0, 0.0], name


@pytest.mark.parametrize("scale", [1e-3, 1e-15])
def test_a_tiny_variance_keeps_its_digits(scale):
    x = scale * torch.randn(8, 3, 20)
    assert_moments(BatchMoments.of(x), x, 1e-5)
    x = x.half() if scale == 1e-3 else x.bfloat16()  # squares of 1e-3 would leave float16's range
    assert_moments(BatchMoments.of(x), x, 1e-5)
