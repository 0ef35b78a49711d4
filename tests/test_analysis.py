"""Statistics as numbers: planted truths are found, nothing is where nothing is, SciPy agrees."""

import dataclasses
import math
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsrt import kernels
from compsrt.analysis import errors, measures, paired, tensors
from compsrt.calibration import search_bounds
from compsrt.models.quant_swinir import swap_blocks
from compsrt.models.swinir import SwinIR, SwinIRConfig
from compsrt.quantization import QuantSpec
from compsrt.quantizers import named_quantizers
from compsrt.transforms import TRANSFORMS, transform_matrix


def random_numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def pair_of(before: np.ndarray, after: np.ndarray, **fields) -> tensors.TensorPair:
    before, after = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (before, after))
    known = {
        "site": "blocks.0.fc1.weight",
        "kind": "weight",
        "role": "fc1.weight",
        "transform": "test",
        "before_ends": (before.min(), before.max()),
        "after_ends": (after.min(), after.max()),
        "count": before.size,
        "count_after": after.size,
    }
    return tensors.TensorPair(before=before, after=after, **(known | fields))


def operand_of(rows: torch.Tensor) -> tensors.Operand:
    return tensors.Operand("a", "weight", "a", tuple(rows.shape), rows)


@pytest.fixture(scope="module")
def network() -> SwinIR:
    torch.manual_seed(0)
    config = SwinIRConfig(scale=2, depths=(2,), embed_dim=12, num_heads=(2,), mlp_hidden=(24,))
    return SwinIR(config).eval()


# --- paired tests ---------------------------------------------------------------------------------


def test_a_shift_is_found_and_none_is_not():
    found = paired.paired_test(random_numbers(60) + 0.8)
    assert found.p < 1e-4
    assert found.p_sign < 1e-3
    assert found.effect_low < 0.8 < found.effect_high
    assert found.mean_low < 0.8 < found.mean_high
    null = [paired.paired_test(random_numbers(40, seed=seed), resamples=100) for seed in range(200)]
    assert 0.01 <= np.mean([test.p < 0.05 for test in null]) <= 0.1
    assert np.mean([test.effect_low < 0 < test.effect_high for test in null]) == pytest.approx(
        0.95, abs=0.04
    )
    assert paired.paired_test(random_numbers(60) - 0.8).p > 0.999


@pytest.mark.parametrize("n", [3, 5, 20, 50, 51, 200])
def test_paired_numbers_are_scipys(n):
    d = random_numbers(n, seed=n) + 0.1
    d[: n // 10] = 0
    test = paired.paired_test(d)
    reference = scipy.stats.wilcoxon(d[d != 0], alternative="greater")
    assert test.statistic == reference.statistic
    assert test.p == reference.pvalue
    signs = scipy.stats.binomtest(test.wins, test.wins + test.losses, alternative="greater")
    assert test.p_sign == signs.pvalue
    assert (test.n, test.ties) == (n, n // 10)
    assert test.effect == pytest.approx(d.mean() / d.std(ddof=1), rel=1e-12)
    t = math.sqrt(n) * test.effect
    for bound, chance in ((test.effect_low, 0.975), (test.effect_high, 0.025)):
        assert scipy.stats.nct.cdf(t, n - 1, math.sqrt(n) * bound) == pytest.approx(
            chance, abs=1e-4
        )


@given(st.lists(st.integers(-4, 4), min_size=3, max_size=9).filter(any))
def test_p_of_tied_differences_is_that_of_all_arrangements_of_signs(values):
    d = np.array(values, dtype=float)
    kept = d[d != 0]
    ranks = scipy.stats.rankdata(np.abs(kept))
    observed = ranks[kept > 0].sum()
    arrangements = [np.dot(ranks, signs) for signs in product((0, 1), repeat=len(kept))]
    statistic, p = paired.signed_ranks(d)
    assert statistic == observed
    assert p == pytest.approx(np.mean([value >= observed for value in arrangements]), abs=1e-12)
    assert p >= 0.5 ** len(kept)


@pytest.mark.parametrize(
    ("differences", "note", "wins"),
    [
        ([], "fewer than 3 pairs", 0),
        ([1.0, 2.0], "fewer than 3 pairs", 2),
        ([0.0, 0.0, 0.0, 0.0], "all ties", 0),
    ],
)
def test_what_cannot_be_tested_has_no_p(differences, note, wins):
    test = paired.paired_test(differences)
    assert (test.note, test.wins, test.n) == (note, wins, len(differences))
    assert test.p is test.p_sign is test.effect is test.least_p is None


def test_equal_differences_have_a_p_but_no_effect_size():
    test = paired.paired_test([0.5] * 5)
    assert test.p == test.least_p == 1 / 32
    assert (test.effect, test.note) == (None, "all differences equal")


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_differences_that_are_not_finite_are_refused(wrong):
    with pytest.raises(ValueError, match="finite"):
        paired.paired_test([1.0, 2.0, wrong])


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06 (not below its predecessor),
    # 0.06; what is not testable does not count.
    assert paired.holm([0.03, None, 0.01, 0.04, 0.02]) == pytest.approx(
        [0.06, None, 0.04, 0.06, 0.06]
    )
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_a_bootstrap_interval_covers_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        sample = random_numbers(50, seed=seed) + 3
        low, high = paired.bootstrap_interval(sample, lambda x: x.mean(-1), resamples=400)
        covered += low < 3 < high
    assert 0.89 <= covered / 200 <= 0.98


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlations_are_scipys(ties):
    x, noise = random_numbers(2, 40)
    y = x + noise
    if ties:
        x, y = np.round(x), np.round(y)
    found = paired.rank_correlation(x, y)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found.kendall == pytest.approx(scipy.stats.kendalltau(x, y).statistic, abs=1e-12)
    assert 0 < found.spearman_low < found.spearman < found.spearman_high < 1
    assert 0 < found.kendall_low < found.kendall < found.kendall_high < 1


def test_resampled_kendall_is_kendall_of_the_resample():
    x, y = random_numbers(2, 12)
    picks = np.random.default_rng(1).integers(12, size=(5, 12))
    reference = [scipy.stats.kendalltau(x[row], y[row]).statistic for row in picks]
    np.testing.assert_allclose(paired._kendall(x, y, picks), reference, atol=1e-12)


def test_independent_numbers_are_not_correlated_and_constants_not_at_all():
    x, y = random_numbers(2, 100)
    found = paired.rank_correlation(x, y)
    assert found.spearman_low < 0 < found.spearman_high
    assert paired.rank_correlation(x, np.ones(100)).note == "constant"
    assert paired.rank_correlation([1, 2], [3, 4]).note == "fewer than 3 pairs"


# --- measures -------------------------------------------------------------------------------------


def test_normality_numbers_are_scipys():
    before, after = random_numbers(30, 40) ** 3, random_numbers(30, 40, seed=1)
    row = measures.normality(pair_of(before, after))
    assert row["tested"] == before.size
    for side, x in (("before", before.ravel()), ("after", after.ravel())):
        shapiro = scipy.stats.shapiro(x)
        assert row[f"shapiro_{side}"] == pytest.approx(1 - shapiro.statistic, rel=1e-9)
        assert row[f"shapiro_p_{side}"] == pytest.approx(shapiro.pvalue, rel=1e-6)
        k2 = scipy.stats.normaltest(x)
        assert row[f"dagostino_{side}"] == pytest.approx(k2.statistic, rel=1e-9)
        jarque_bera = scipy.stats.jarque_bera(x)
        assert row[f"jarque_bera_{side}"] == pytest.approx(jarque_bera.statistic, rel=1e-9)
        # A2 = -n - sum (2i - 1)/n (log F(x_i) + log(1 - F(x_{n+1-i}))), by its definition.
        z = np.sort((x - x.mean()) / x.std(ddof=1))
        i = np.arange(1, len(z) + 1)
        logs = scipy.stats.norm.logcdf(z) + scipy.stats.norm.logsf(z[::-1])
        assert row[f"anderson_{side}"] == pytest.approx(
            -len(z) - ((2 * i - 1) / len(z) * logs).sum(), rel=1e-6
        )
    for key in measures.NORMALITY:
        assert row[f"{key}_delta"] > 1  # at most a tenth of the distance


def test_normality_takes_equally_many_values_and_at_most_5000():
    row = measures.normality(pair_of(random_numbers(100, 60), random_numbers(100, 64)))
    assert row["tested"] == 5000
    assert (
        measures.normality(pair_of(random_numbers(10, 60), random_numbers(10, 64)))["tested"] == 600
    )


def test_normality_finds_no_difference_where_there_is_none():
    rows = [
        measures.normality(pair_of(random_numbers(500, seed=s), random_numbers(500, seed=s + 100)))
        for s in range(40)
    ]
    tests = measures.summarize(measures.NORMALITY, {"all": rows})
    assert all(test["p_holm"] > 0.05 for test in tests)


def test_a_planted_transform_is_found_by_every_measure():
    """Outliers in one channel: a rotation spreads them, and moves mass away from zero."""
    normality, ranges, bands = [], [], []
    for seed in range(12):
        rows = torch.from_numpy(random_numbers(400, 64, seed=seed)).float()
        rows[:, 5] *= 20
        pair = operand_of(rows).pair("hadamard")
        normality.append(measures.normality(pair))
        ranges.append(measures.ranges(pair))
        bands.append(measures.band(pair, 0.1))
    for test in measures.summarize(measures.NORMALITY, {"all": normality}):
        assert test["p_holm"] < 0.01
    found = {test["measure"]: test for test in measures.summarize(measures.RANGE, {"all": ranges})}
    assert found["range"]["p_holm"] < 0.01
    assert found["range"]["wins"] == 12
    assert found["iqr"]["losses"] == 12
    assert found["iqr"]["p"] > 0.99
    for test in measures.summarize(measures.BAND, {"all": bands}):
        assert test["losses"] == 12


def test_range_numbers():
    before, after = np.linspace(0, 8, 1001), np.linspace(0, 2, 1001)
    row = measures.ranges(pair_of(before, after))
    assert row["range_before"] == 8
    assert row["range_reduction"] == 0.75
    assert row["span99_before"] == pytest.approx(8 * 0.99)
    assert row["iqr_after"] == pytest.approx(scipy.stats.iqr(after))
    assert [row[f"{key}_delta"] for key in ("range", "iqr")] == pytest.approx([2, 2])
    assert row["crest_delta"] == pytest.approx(0)
    whole = measures.ranges(pair_of(before, after, before_ends=(-8.0, 8.0)))
    assert whole["range_delta"] == 3


def test_band_numbers():
    before, after = np.array([0, 0.04, 0.05, 0.06, 1, -0.05]), np.array([1, 0.2, 0.01, 1, 1, 1])
    row = measures.band(pair_of(before, after), 0.05)
    assert row["absolute_before"] == pytest.approx(4 / 6)
    assert row["absolute_after"] == pytest.approx(1 / 6)
    assert row["relative_before"] == np.mean(np.abs(before) <= 0.05 * before.std())


def test_padding_counts_only_where_it_is_asked_for():
    rows = torch.from_numpy(random_numbers(60, 60)).float() + 3
    operand = operand_of(rows)
    pair = operand.pair("hadamard-padded")
    assert (pair.count, pair.count_after, pair.padding) == (3600, 3840, 4 * 64)
    assert operand.pair("hadamard").padding == 0
    real = measures.band(pair, 0.05)
    published = measures.band(pair, 0.05, counting="published")
    padded = torch.zeros(64, 64, dtype=torch.float64)
    padded[:60, :60] = rows
    after = padded @ transform_matrix("hadamard", 64)
    assert published["absolute_after"] == pytest.approx(
        (after.abs() <= 0.05).double().mean().item()
    )
    assert real["absolute_after"] == pytest.approx(
        (after[:60].abs() <= 0.05).double().mean().item()
    )
    assert published["padding"] == 1 / 16


@pytest.mark.parametrize(
    ("values", "note"), [(np.full(50, 3.0), "constant"), (np.arange(4.0), "fewer than 8 values")]
)
def test_a_tensor_that_cannot_be_measured_has_a_note_and_no_delta(values, note):
    pair = pair_of(values, values + 1)
    row = measures.normality(pair)
    assert row["note"] == note
    assert all(row[f"{key}_delta"] is None for key in measures.NORMALITY)
    test = measures.summarize({"shapiro": "W"}, {"all": [row] * 5})[0]
    assert (test["n"], test["untestable"], test["p"]) == (0, 5, None)
    if note == "constant":
        assert measures.ranges(pair)["note"] == note
        assert measures.ranges(pair)["range_delta"] is None
        assert measures.band(pair, 0.1)["relative_delta"] is None


def test_zeros_are_constant_too():
    pair = pair_of(np.zeros((4, 4)), np.zeros((4, 4)))
    assert measures.ranges(pair)["note"] == measures.band(pair, 0.1)["note"] == "constant"
    assert errors.relative_error(torch.zeros(4, 4), 4) is None


def test_the_family_of_a_summary_is_all_of_its_tests():
    rows = [{"a_delta": d, "a_before": 1.0, "a_after": 1.0, "kind": k}
            for d, k in zip(random_numbers(20) + 1, "wa" * 10, strict=True)]  # fmt: skip
    tests = measures.summarize({"a": "A"}, {"all": rows, **measures.scopes_of(rows, "kind")})
    assert [test["scope"] for test in tests] == ["all", "w", "a"]
    assert [test["p_holm"] for test in tests] == paired.holm([test["p"] for test in tests])


# --- operands of a model --------------------------------------------------------------------------


def test_operands_are_what_the_quantizers_see(network):
    """Before and after by one matrix, against a model that is swapped with that transform."""
    pictures = torch.rand(2, 3, 16, 16)
    for transform in TRANSFORMS:
        spec = QuantSpec(method="minmax", transform=transform, storage="float32")
        swapped = swap_blocks(network, spec)
        seen: dict[str, torch.Tensor] = {}
        for name, quantizer in named_quantizers(swapped):
            quantizer.observer = lambda _, x, name=name, seen=seen: seen.update({name: x})
        with torch.no_grad():
            swapped(pictures)
        operands = tensors.observe(network, pictures, (transform,), values=0)
        assert len(operands) == len(seen) - 2 * 2  # q, k and v share their input in two blocks
        for operand in operands:
            pair = operand.pair(transform)
            expected = seen[operand.site].reshape(pair.after.shape).double().numpy()
            np.testing.assert_allclose(pair.after, expected, atol=2e-5)
            assert pair.after_ends == pytest.approx((expected.min(), expected.max()), abs=2e-5)
            assert pair.count_after == expected.size


def test_shared_inputs_are_one_tensor_and_named_so(network):
    operands = tensors.observe(network, torch.rand(1, 3, 16, 16))
    roles = [operand.role for operand in operands]
    assert roles.count("qkv.input") == 2
    assert not {"q.input", "k.input", "v.input"} & set(roles)
    assert {operand.kind for operand in operands} == {"weight", "activation"}
    assert {o.role for o in operands if o.kind == "weight"} == {
        f"{name}.weight" for name in ("q", "k", "v", "proj", "fc1", "fc2")
    }


def test_sampling_is_bounded_seeded_and_leaves_the_extremes(network):
    pictures = torch.rand(2, 3, 32, 32)
    whole = tensors.observe(network, pictures, ("hadamard",), values=0)
    first, again, other = (
        tensors.observe(network, pictures, ("hadamard",), values=500, seed=seed)
        for seed in (0, 0, 1)
    )
    for a, b, c, w in zip(first, again, other, whole, strict=True):
        assert a.rows.numel() <= max(500, a.shape[-1])
        assert torch.equal(a.rows, b.rows)
        assert a.ends == w.ends == c.ends
        # Whole rows of the tensor.
        assert (w.rows[:, None] == a.rows[:5]).all(-1).any(0).all()
    assert any(not torch.equal(a.rows, c.rows) for a, c in zip(first, other, strict=True))


def test_the_model_is_left_as_it_was(network):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    tensors.observe(network, torch.rand(1, 3, 16, 16))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_the_name_of_their_tensor(network, wrong):
    broken = SwinIR(network.config)
    broken.load_state_dict(network.state_dict())
    with torch.no_grad():
        broken.layers[0].blocks[1].mlp.fc1.weight[0, 0] = wrong
    with pytest.raises(ValueError, match=r"blocks\.1\.fc1\.weight: 1 of 288 values are NaN or inf"):
        tensors.observe(broken, torch.rand(1, 3, 16, 16))


# --- quantization error ---------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_error_is_that_of_quantizing_and_rotating_back(transform):
    rows = torch.from_numpy(random_numbers(300, 20)).float()
    matrix = transform_matrix(transform, 20, 3)
    found = errors.relative_error(rows, 3, matrix)
    rotated = rows if matrix is None else rows @ matrix.float()
    lower, upper = search_bounds(rotated, 3, method="dobi", one_sided=None)
    quantized = kernels.fake_quantize(rotated, lower, upper, bits=3)
    back = quantized if matrix is None else quantized @ matrix.float().mT
    assert back.shape == rows.shape
    expected = (back - rows).double().square().sum() / rows.double().square().sum()
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_rotation_of_normal_rows_gains_nothing_and_of_outliers_much():
    normal = torch.from_numpy(random_numbers(1000, 64)).float()
    outliers = normal.clone()
    outliers[:, 7] *= 30
    transforms = [("none", 0), ("hadamard", 0), ("random", 0), ("random", 1)]
    for rows, low, high in ((normal, -0.5, 0.5), (outliers, 3, 40)):
        found = errors.average_seeds(errors.measure_operand(operand_of(rows), transforms, [4]))
        assert [row["transform"] for row in found] == ["none", "hadamard", "random"]
        assert found[0]["gain"] is None
        assert all(low < row["gain"] < high for row in found[1:])
        assert found[2]["seeds"] == 2
        assert found[2]["seed_spread"] > 0
        # Every dB of gain is a dB of signal to error.
        assert found[1]["snr"] - found[0]["snr"] == pytest.approx(found[1]["gain"], abs=1e-9)


def test_gains_are_tested_and_what_predicts_them_is_found():
    rows = []
    for site in range(14):
        values = torch.from_numpy(random_numbers(300, 16, seed=site)).float()
        values[:, 3] *= 1 + site / 3  # the larger the outlier, the larger the gain
        kind = "weight" if site % 2 else "activation"
        operand = dataclasses.replace(operand_of(values), site=str(site), kind=kind, role="a")
        rows += errors.measure_operand(operand, [("none", 0), ("hadamard", 0)], [4, 8])
    rows = errors.average_seeds(rows)
    tests = errors.gains(rows, "kind")
    assert [(t["scope"], t["bits"]) for t in tests[:3]] == [
        ("all", 4),
        ("activation", 4),
        ("weight", 4),
    ]
    assert tests[0]["p_holm"] < 0.05
    gains = [r["gain"] for r in rows if r["bits"] == 4 and r["transform"] == "hadamard"]
    assert tests[0]["p"] == scipy.stats.wilcoxon(gains, alternative="greater").pvalue
    found = {
        row["proxy"]: row
        for row in errors.correlations(rows)
        if (row["scope"], row["bits"]) == ("all", 4)
    }
    assert found["range"]["spearman"] > 0.8
    assert found["range"]["spearman_low"] > 0.5
    assert set(found) == set(errors.PROXIES)


def test_a_constant_operand_has_no_error_and_no_gain():
    rows = errors.measure_operand(
        operand_of(torch.full((20, 16), 2.0)), [("none", 0), ("dct", 0)], [4]
    )
    assert rows[0]["error"] == 0
    assert rows[0]["gain"] is rows[1]["gain"] is None
    averaged = errors.average_seeds(rows)
    assert errors.gains(averaged, "kind")[0]["note"] == "fewer than 3 pairs"
