"""Groups found from graphs, the choice among them, and the cut."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import tiny_swinir
from torch import nn

import compsrt
from compsrt import checkpoint
from compsrt.models.edsr import EDSR, EDSRConfig
from compsrt.models.sesr import SESR, SESRConfig
from compsrt.pruning import (
    StructureSpec,
    choose,
    cut,
    cut_state,
    doomed_weights,
    groups_of,
)
from compsrt.transforms import has_hadamard


def without(network, choices):
    """The network with all that makes its doomed units set to zero."""
    state = network.state_dict()
    for name, mask in doomed_weights(state, choices).items():
        state[name].masked_fill_(mask, 0)
    return network


def everything(ratio, **fields):
    return StructureSpec((("*", ratio),), **fields)


# --- Groups ----------------------------------------------------------------------------------------


def tied_layers(network):
    return [group.layers for group in groups_of(network) if group.tied]


def test_the_sums_of_edsr_tie_head_second_convolutions_and_the_last():
    network = EDSR(EDSRConfig.uniform(2, blocks=3, channels=4))
    assert tied_layers(network) == [
        ("head.0", "body.0.body.2", "body.1.body.2", "body.2.body.2", "body.3")
    ]
    free = [group.name for group in groups_of(network) if not group.tied and not group.fixed]
    assert free == [f"body.{i}.body.0" for i in range(3)]
    assert [group.name for group in groups_of(network) if group.fixed] == ["tail.0"]


def test_residual_groups_are_one_stream_too():
    network = EDSR(EDSRConfig.uniform(4, blocks=2, channels=4, groups=2, tail="upsampler"))
    assert tied_layers(network) == [
        ("head.0", "body.0.body.0.body.2", "body.0.body.1.body.2", "body.0.body.2",
         "body.1.body.0.body.2", "body.1.body.1.body.2", "body.1.body.2", "body.2")
    ]  # fmt: skip
    fixed = [group.name for group in groups_of(network) if group.fixed]
    assert fixed == ["tail.0.0", "tail.0.2", "tail.1"]


def test_the_skip_of_sesr_ties_its_first_and_last_wide_layers():
    network = SESR(SESRConfig(blocks=3, features=4))
    assert tied_layers(network) == [("body.first", "body.blocks.2")]
    activations = [p.tensor for g in groups_of(network) for p in g.parts if "activ" in p.tensor]
    assert sorted(activations) == [f"body.activations.{i}.weight" for i in range(4)]


def test_names_play_no_part():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.zebra = nn.Conv2d(3, 6, 3, padding=1)
            self.apple = nn.Conv2d(6, 6, 1)
            self.inner = nn.Conv2d(6, 5, 1)
            self.outer = nn.Conv2d(5, 6, 1)
            self.last = nn.Conv2d(6, 3, 1)

        def forward(self, x):
            y = F.relu(self.zebra(x))
            y = torch.add(y, self.apple(y).relu() * 0.5)
            y = y + self.outer(F.leaky_relu(self.inner(y), 0.1))
            return self.last(y)

    assert tied_layers(Odd()) == [("zebra", "apple", "outer")]


# --- The choice ------------------------------------------------------------------------------------


def test_free_layers_lose_the_filters_of_least_l1_norm():
    network = EDSR(EDSRConfig.uniform(2, blocks=1, channels=6))
    with torch.no_grad():
        for i, scale in enumerate((5, 1, 4, 2, 6, 3)):
            network.body[0].body[0].weight[i] = scale * (-1) ** i
    (choice,) = choose(network, StructureSpec((("body.0.body.0", 0.5),)))
    assert choice.kept == (0, 2, 4) and choice.doomed == (1, 3, 5)


def test_tied_layers_share_indices_random_by_seed_or_of_least_summed_norm():
    network = EDSR(EDSRConfig.uniform(2, blocks=2, channels=16))
    tied = {}
    for seed in (0, 1):
        tied[seed] = choose(network, everything(0.5, seed=seed))[0].kept
        assert tied[seed] == choose(network, everything(0.5, seed=seed))[0].kept
    assert tied[0] != tied[1]
    layers = ["head.0", "body.0.body.2", "body.1.body.2", "body.2"]
    norm = sum(network.get_submodule(name).weight.abs().sum((1, 2, 3)) for name in layers)
    chosen = choose(network, everything(0.5, tied="l1"))[0]
    assert chosen.group.layers == tuple(layers)
    assert chosen.kept == tuple(sorted(norm.topk(8).indices.tolist()))


def test_overrides_the_last_ratio_counts_skipped_layers_stay_and_groups_are_joined():
    network = EDSR(EDSRConfig.uniform(2, blocks=3, channels=8))
    spec = StructureSpec(
        (("*", 0.5), ("body.1.body.0", 0.25), ("body.2.body.0", 0)),
        skip_layers=("head.0", "*tail*"),
    )
    assert {c.group.name: len(c.kept) for c in choose(network, spec)} == {
        "body.0.body.0": 4, "body.1.body.0": 6
    }  # fmt: skip
    joined = choose(network, everything(0.5, same_groups=(("body.*.body.0",),)))
    (inner,) = (c for c in joined if c.group.name == "body.0.body.0")
    assert inner.group.layers == tuple(f"body.{i}.body.0" for i in range(3))
    small = cut(network, joined)
    for i in range(3):
        rows = network.body[i].body[0].weight[list(inner.kept)]
        stream = next(c for c in joined if c.group.name == "head.0").kept
        assert torch.equal(small.body[i].body[0].weight, rows[:, list(stream)])


def test_hidden_widths_and_heads_are_rounded_to_what_can_be_rotated():
    network = tiny_swinir(embed_dim=60, num_heads=(6,), mlp_hidden=(120,))
    choices = choose(network, StructureSpec((("heads", 0.5), ("hidden", 0.55))))
    kept = {choice.group.kind: len(choice.kept) for choice in choices}
    # 3 heads are 30 channels, 54 hidden ones were asked: neither has a Hadamard matrix.
    assert kept == {"heads": 4, "hidden": 56}
    assert has_hadamard(40) and has_hadamard(56)
    assert "120 hidden -> 56 (54 asked; 56 has a Hadamard matrix)" in str(choices[1])
    exact = choose(network, StructureSpec((("heads", 0.5), ("hidden", 0.55)), widths="exact"))
    assert {c.group.kind: len(c.kept) for c in exact} == {"heads": 3, "hidden": 54}


# --- The cut ---------------------------------------------------------------------------------------

WIDTHS = st.integers(1, 7)


@st.composite
def edsr_networks(draw):
    groups = draw(st.lists(st.lists(WIDTHS, min_size=1, max_size=3), min_size=1, max_size=3))
    form = "edsr" if len(groups) == 1 and draw(st.booleans()) else "rir"
    width = draw(st.sampled_from([0, 4]))
    return EDSR(
        EDSRConfig(
            scale=draw(st.sampled_from([2, 3, 4])),
            form=form,
            channels=draw(WIDTHS),
            hidden=tuple(map(tuple, groups)),
            tail="upsampler" if width else "light",
            upsample_channels=width,
            residual_scale=draw(st.sampled_from([1.0, 0.1])),
        )
    )


@st.composite
def sesr_networks(draw):
    widths = tuple(draw(st.lists(WIDTHS, min_size=1, max_size=4)))
    widths = widths + widths[:1]
    return SESR(
        SESRConfig(
            scale=draw(st.sampled_from([2, 4])),
            blocks=len(widths) - 1,
            features=widths[0],
            widths=widths if len(set(widths)) > 1 else (),
            activation=draw(st.sampled_from(["relu", "prelu"])),
        )
    )


@st.composite
def swinir_networks(draw):
    depths = draw(st.sampled_from([(1,), (2, 1)]))
    heads = draw(st.sampled_from([1, 2, 4]))
    return tiny_swinir(
        embed_dim=12,
        depths=depths,
        num_heads=(heads,) * len(depths),
        mlp_hidden=tuple(draw(st.integers(2, 14)) for _ in depths),
        head_dim=draw(st.sampled_from([(), (5,) * len(depths)])),
        qkv_bias=draw(st.booleans()),
        window_size=4,
    )


class RandomGraph(nn.Module):
    """Convolutions and sums in a random order: the picture, then steps that read earlier tensors."""

    def __init__(self, steps, activations):
        super().__init__()
        self.steps, self.widths = steps, [3]
        for i, (kind, one, two) in enumerate(steps):
            if kind == "convolution":
                self.add_module(f"conv{i}", nn.Conv2d(self.widths[one], two, 3, padding=1))
                self.widths.append(two)
            elif kind == "sum":
                self.widths.append(self.widths[one])
            else:
                width = self.widths[one] if activations[i % len(activations)] else 1
                self.add_module(f"act{i}", nn.PReLU(width, 0.3))
                self.widths.append(self.widths[one])
        self.last = nn.Conv2d(self.widths[-1], 3, 1)

    def forward(self, x):
        tensors = [x]
        for i, (kind, one, two) in enumerate(self.steps):
            if kind == "convolution":
                tensors.append(getattr(self, f"conv{i}")(tensors[one]))
            elif kind == "sum":
                tensors.append(tensors[one] + 0.7 * tensors[two])
            else:
                tensors.append(getattr(self, f"act{i}")(tensors[one]))
        return self.last(tensors[-1])


@st.composite
def random_graphs(draw):
    widths, steps = [3], []
    for _ in range(draw(st.integers(2, 10))):
        one = draw(st.integers(max(len(widths) - 4, 0), len(widths) - 1))
        same = [i for i, width in enumerate(widths) if width == widths[one] and i > 0]
        kind = draw(st.sampled_from(["convolution", "convolution", "activation", "sum"]))
        if kind == "sum" and one > 0 and same:
            steps.append(("sum", one, draw(st.sampled_from(same))))
            widths.append(widths[one])
        elif kind == "activation" and one > 0:
            steps.append(("activation", one, 0))
            widths.append(widths[one])
        else:
            steps.append(("convolution", one, draw(st.sampled_from([2, 4, 4, 6]))))
            widths.append(steps[-1][2])
    return RandomGraph(steps, draw(st.lists(st.booleans(), min_size=1, max_size=3)))


def ratios():
    return st.lists(st.floats(0, 0.9), min_size=1, max_size=3)


def specs_for(network, shares, tied, seed):
    """Ratios on groups in turn, each small enough to leave something."""
    found = []
    alike = {}
    for i, group in enumerate(groups_of(network)):
        share = alike.setdefault(group.alike or group.name, shares[i % len(shares)])
        if not group.fixed and not group.obstacle:
            share = min(share, (group.units - 1) / group.units)
            found.append((group.name, share))
    return StructureSpec(tuple(found), tied=tied, seed=seed)


@given(
    network=st.one_of(edsr_networks(), sesr_networks(), swinir_networks()),
    shares=ratios(),
    tied=st.sampled_from(["random", "l1"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60)
def test_the_cut_network_computes_the_same_once_the_doomed_units_are_zero(
    network, shares, tied, seed
):
    network.eval().requires_grad_(False)
    choices = choose(network, specs_for(network, shares, tied, seed))
    small = cut(without(network, choices), choices)
    x = torch.rand(1, 3, 7, 9)
    torch.testing.assert_close(small(x), network(x), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) <= sum(
        p.numel() for p in network.parameters()
    )
    again = cut(small, choose(small, StructureSpec((("*", 0.0),))))
    assert again.config == small.config == type(small)(small.config).config
    for choice in choices:
        for layer in choice.group.layers:
            units = small.get_submodule(layer).weight.shape[0]
            assert choice.group.kind == "heads" or units == len(choice.kept)


@given(
    network=random_graphs(),
    shares=ratios(),
    tied=st.sampled_from(["random", "l1"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60)
def test_any_graph_of_convolutions_and_sums_is_cut_right(network, shares, tied, seed):
    network.requires_grad_(False)
    choices = choose(network, specs_for(network, shares, tied, seed))
    x = torch.rand(2, 3, 6, 5)
    whole = without(network, choices)(x)
    smaller = cut_state(network.state_dict(), choices)
    torch.testing.assert_close(
        torch.func.functional_call(network, smaller, x), whole, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("part", ["qkv", "proj"])
def test_a_head_is_nothing_without_its_values_and_nothing_without_its_projection(part):
    network = tiny_swinir(num_heads=(4,))
    choices = choose(network, StructureSpec((("heads", 0.5),)))
    state = network.state_dict()
    for name, mask in doomed_weights(state, choices).items():
        if part in name:
            state[name].masked_fill_(mask, 0)
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(cut(network, choices)(x), network(x), rtol=0, atol=1e-5)


def test_what_is_not_zero_is_missed():
    network = EDSR(EDSRConfig.uniform(2, blocks=2, channels=8)).requires_grad_(False)
    x = torch.rand(1, 3, 8, 8)
    small = cut(network, choose(network, everything(0.5)))
    assert float((small(x) - network(x)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("scale", "parameters", "giga"), [(2, 609_042, 140.0), (3, 615_132, 62.7), (4, 623_658, 35.8)]
)
def test_256_channels_cut_to_45_give_the_published_network(scale, parameters, giga):
    dense = EDSR(EDSRConfig(scale=scale))
    small = cut(dense, choose(dense, everything(0.82421875, skip_layers=("*tail*",))))
    assert small.config == EDSRConfig.uniform(scale, blocks=16, channels=45)
    counted = compsrt.count(small, 720, 1280)
    assert counted.parameters == parameters and round(counted.macs / 1e9, 1) == giga


def test_a_pruned_swinir_is_stored_loaded_quantized_and_packed(tmp_path):
    network = tiny_swinir(num_heads=(4,))
    small = cut(network, choose(network, StructureSpec((("heads", 0.5), ("hidden", 0.5)))))
    x = torch.rand(1, 3, 16, 24)
    checkpoint.save_float(small, tmp_path / "float.safetensors")
    loaded = checkpoint.load(tmp_path / "float.safetensors")
    assert loaded.config.head_dim == (6,) and loaded.config.num_heads == (2,)
    assert torch.equal(loaded(x), small(x))
    for transform in (None, "none", "dct", "hadamard-padded"):
        spec = compsrt.QuantSpec(bits=8, transform=transform, storage="float32")
        quantized = compsrt.quantize(loaded, spec, x)
        assert float((quantized(x) - loaded(x)).detach().abs().mean()) < 0.02
    spec = compsrt.QuantSpec(bits=4, pruning=0.4)
    quantized = compsrt.quantize(loaded, spec, x)
    checkpoint.save_packed(quantized, tmp_path / "packed.safetensors")
    loaded = checkpoint.load(tmp_path / "packed.safetensors", arithmetic="reference")
    assert torch.equal(loaded(x), quantized(x))


# --- What cannot be done ---------------------------------------------------------------------------


class Graph(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between, width=4):
        super().__init__()
        self.between = between
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, width, 1)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.last(self.between(self.first(x), self.second(x)))


@pytest.mark.parametrize(
    ("between", "width", "words"),
    [
        (lambda a, b: a + b, 5, "adds 4 channels of first and 5 of second"),
        (lambda a, b: torch.sigmoid(a), 4, "because sigmoid"),
        (lambda a, b: a + 1.0, 4, "adds a constant"),
        (lambda a, b: torch.cat([a, b], 1)[:, :4], 4, "because cat"),
        (lambda a, b: a + b * b.mean(1, keepdim=True), 4, "because mean"),
        (lambda a, b: a if a.sum() > 0 else b, 4, "cannot be traced"),
    ],
)
def test_ties_that_are_not_understood_are_one_line(between, width, words):
    with pytest.raises(ValueError, match=words) as caught:
        choose(Graph(between, width), everything(0.5))
    assert "\n" not in str(caught.value)


def test_what_is_not_understood_can_be_left_out():
    network = Graph(lambda a, b: torch.sigmoid(a) + F.relu(b))
    with pytest.raises(ValueError, match="skip_layers"):
        choose(network, everything(0.5))
    assert choose(network, everything(0.5, skip_layers=("first", "second"))) == []


def test_a_quantized_network_keeps_its_structure():
    quantized = compsrt.quantize(tiny_swinir(), compsrt.QuantSpec())
    with pytest.raises(ValueError, match="quantized already"):
        groups_of(quantized)


@pytest.mark.parametrize(
    ("network", "fields", "words"),
    [
        ("edsr", {"ratios": (("*", 1.0),)}, "1.0"),
        ("edsr", {"ratios": (("*", -0.1),)}, "-0.1"),
        (
            "edsr",
            {"ratios": (("*", 0.95),)},
            "leaves none of the 8 filters of head.0; at most 0.875",
        ),
        ("edsr", {"ratios": (("body.0.body.1", 0.5),)}, "did you mean body.0.body"),
        ("edsr", {"ratios": (("attention", 0.5),)}, "matches no layer; a layer is 'head.0'"),
        ("edsr", {"ratios": (("tail*", 0.5),)}, "PixelShuffle"),
        ("edsr", {"ratios": (("*", 0.5),), "skip_layers": ("heads.0",)}, "did you mean head.0"),
        ("edsr", {"ratios": (("head.0", 0.5), ("body.2", 0.25))}, "head.0 and body.2 are tied"),
        (
            "edsr",
            {"ratios": (("*", 0.5),), "same_groups": (("head.0", "tail.0"),)},
            "head.0 has 8 filters, tail.0 12",
        ),
        ("edsr", {"ratios": (("*", 0.5),), "same_groups": (("nose",),)}, "same_groups: 'nose'"),
        ("edsr", {"tied": "l2"}, "tied: 'l2'"),
        ("edsr", {"widths": "even"}, "widths: 'even'"),
        ("swinir", {"ratios": (("*blocks.0.mlp*", 0.5),)}, "all blocks of a layer"),
        ("swinir", {"ratios": (("heads", 0.9),), "widths": "exact"}, "none of the 2 heads"),
    ],
)
def test_wrong_requests_are_one_line(network, fields, words):
    made = EDSR(EDSRConfig.uniform(2, blocks=2, channels=8)) if network == "edsr" else tiny_swinir()
    with pytest.raises(ValueError, match=words) as caught:
        choose(made, StructureSpec(**fields))
    assert "\n" not in str(caught.value)
