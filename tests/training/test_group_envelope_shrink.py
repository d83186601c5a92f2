"""Tests that units really go: the smaller module has the same outputs, or the reason why not is said."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from workingpapers.training.group_envelope import (
    Family,
    GroupEnvelope,
    GroupSpec,
    Slices,
    SparsityRamp,
    harden,
    shrink,
)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def randomized(model):
    """Parameters and statistics with nothing special about them, in evaluation mode."""
    for name, parameter in model.named_parameters():
        scale = 0.5 if parameter.ndim < 2 else 1.5 / parameter[0].numel() ** 0.5
        nn.init.normal_(parameter, 0.3 if "norm" in name else 0.0, scale)
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return model.eval()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def check(model, kind, inputs, k=0.5, **selection):
    """Harden a copy, shrink it, compare outputs and sizes; return both."""
    pruned = copy.deepcopy(model)
    spec = GroupSpec.from_module(pruned, kind, **selection)
    harden(pruned, spec, k)
    before = copy.deepcopy(pruned.state_dict())
    smaller = shrink(pruned, spec)
    with torch.no_grad():
        full, expected, got = (outputs(m, inputs) for m in (model, pruned, smaller))
    assert (expected - full).abs().max() > 1e-3, "nothing was cut that matters"
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert count(smaller) < count(pruned)
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())
    again = GroupSpec.from_module(smaller, kind, **selection)
    for family in spec.families:
        left = next(f for f in again.families if f.name == family.name)
        assert left.size == max(1, int(family.size * k + 0.5))
    return spec, smaller


def outputs(model, inputs):
    result = model(inputs)
    return getattr(result, "logits", getattr(result, "last_hidden_state", result))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return functional.relu(self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x))))) + x)


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.blocks(functional.relu(self.bn(self.stem(x)))).mean((2, 3)))


def convolutional():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 10, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.BatchNorm1d(90)),
        *(nn.Linear(90, 12), nn.Tanh(), nn.Dropout(), nn.Linear(12, 4)),
    )


IMAGES = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["filter", "channel", "neuron"])
def test_plain_convolutional_networks(kind):
    _, smaller = check(randomized(convolutional()), kind, IMAGES)
    if kind == "filter":
        assert smaller[0].out_channels == smaller[1].num_features == smaller[4].in_channels == 3
        assert len(smaller[1].running_mean) == 3
        assert (smaller[8].num_features, smaller[9].in_features) == (5 * 9, 5 * 9)


@pytest.mark.parametrize("kind", ["filter", "channel"])
def test_layers_that_are_added_lose_the_same_filters(kind):
    spec, smaller = check(randomized(Residual()), kind, IMAGES)
    assert [family.name for family in spec.families] == ["stem", "blocks.0.conv1", "blocks.1.conv1"]
    assert smaller.stem.out_channels == smaller.blocks[1].conv2.out_channels == smaller.head.in_features == 4


def test_depthwise_convolutions_lose_filters_with_their_inputs():
    def separable(inner, outer):
        depthwise = [nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.BatchNorm2d(inner), nn.ReLU6()]
        return [*depthwise, nn.Conv2d(inner, outer, 1), nn.BatchNorm2d(outer), nn.ReLU6()]

    layers = [nn.Conv2d(1, 6, 3), nn.ReLU(), *separable(6, 8), *separable(8, 10)]
    model = randomized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3)))
    _, smaller = check(model, "filter", IMAGES)
    assert (smaller[2].groups, smaller[2].in_channels, smaller[2].out_channels) == (3, 3, 3)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.last(self.grouped(self.first(x).relu()).relu()).mean((2, 3)))


def test_grouped_convolutions_are_left_out_and_refused():
    model = randomized(Grouped())
    spec, _ = check(model, "filter", IMAGES)
    assert [family.name for family in spec.families] == ["last"]
    assert "grouped" in spec.left_out["first"]
    assert "grouped" in spec.left_out["grouped"]
    mine = GroupSpec(model, [Family("first", 8, (Slices("first.weight", 0), Slices("first.bias", 0)), "filter")])
    harden(model, mine, 4)
    with pytest.raises(ValueError, match="units of first cannot be taken out: grouped is a grouped convolution"):
        shrink(model, mine)


class Branches(nn.Module):
    """Concatenation, multiplication, x + x, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.up = nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.gate = nn.Conv2d(6, 6, 1)
        self.out = nn.Linear(6 * 4, 3)

    def forward(self, x):
        x = self.up(torch.relu(self.bn(torch.cat([self.a(x), self.b(x)], dim=1))))
        x = x * torch.sigmoid(self.gate(x)) + x + x
        x = functional.adaptive_max_pool2d(x, 2)
        return self.out(x.view(x.size(0), -1))


def test_concatenated_and_multiplied_tensors():
    spec, smaller = check(randomized(Branches()), "filter", IMAGES)
    assert {family.name: family.size for family in spec.families} == {"a": 4, "b": 6, "up": 6}
    assert (smaller.bn.num_features, smaller.up.in_channels, smaller.up.out_channels) == (5, 5, 3)


def test_what_dead_units_contribute_moves_into_biases():
    model = randomized(
        nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 6, bias=False), nn.Softplus(), nn.Linear(6, 2))
    )
    _, smaller = check(model, "neuron", torch.randn(7, 5))
    assert smaller[2].bias is not None
    padded = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(400, 2)
    )
    assert "pads with 0" in GroupSpec.from_module(padded, "filter").left_out["0"]


class Odd(nn.Module):
    """Reshapes that torch.fx traces but that nothing is known of, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = self.one(x).relu().view(-1, 3, 2).transpose(1, 2).reshape(-1, 6)
        x = self.two(self.two(x).relu()).relu()
        return self.four(self.three(x).relu())


def test_what_is_not_understood_is_left_in_place():
    spec, _ = check(randomized(Odd()), "neuron", torch.randn(4, 6))
    assert [family.name for family in spec.families] == ["three"]
    assert "view" in spec.left_out["one"]
    assert "more than once" in spec.left_out["two"]
    assert "output" in spec.left_out["four"]


def test_layer_norms_and_shared_parameters_hold_their_units():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    model[4].weight = nn.Parameter(torch.randn(6, 5))
    spec = GroupSpec.from_module(model, "neuron")
    assert "LayerNorm" in spec.left_out["0"]
    assert [family.name for family in spec.families] == ["2", "4"]
    model[6] = nn.Linear(6, 6)
    model[6].weight = model[4].weight = nn.Parameter(torch.randn(6, 6))
    with pytest.raises(ValueError, match=r"4: 4\.weight and 6\.weight are one parameter"):
        GroupSpec.from_module(model, "neuron")


def test_a_layer_keeps_one_unit_when_all_are_dead():
    model = randomized(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    spec = GroupSpec.from_module(model, "neuron")
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    smaller = shrink(model, spec)
    assert smaller[0].out_features == 1
    x = torch.randn(5, 3)
    torch.testing.assert_close(smaller(x), model(x))


def test_single_weights_blocks_and_unknown_families_are_refused():
    model = randomized(convolutional())
    spec = GroupSpec.from_module(model, "weight", include="9")
    assert count(shrink(model, spec)) == count(model)  # nothing is 0 yet
    harden(model, spec, 0.5)
    with pytest.raises(ValueError, match="groups of kind 'weight' cannot be taken out"):
        shrink(model, spec)
    narrow, wide = (nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2)) for width in (4, 9))
    foreign = GroupSpec.from_module(narrow, "neuron")
    nn.init.zeros_(wide[0].weight)
    nn.init.zeros_(wide[0].bias)
    with pytest.raises(ValueError, match="units of 0 that model does not have"):
        shrink(wide, foreign)


def test_torchs_transformer_layers():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, activation="gelu")
    model = randomized(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    tokens = torch.randn(2, 5, 16)
    _, smaller = check(model, "neuron", tokens)
    assert smaller.layers[1].linear1.out_features == smaller.layers[1].linear2.in_features == 12
    spec = GroupSpec.from_module(model, "head")
    assert [family.size for family in spec.families] == [4, 4]
    harden(model, spec, 2)
    with pytest.raises(ValueError, match="MultiheadAttention cannot hold fewer heads"):
        shrink(model, spec)


TOKENS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(2))
SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("kind", ["head", "neuron", "channel"])
@pytest.mark.parametrize("key_value_heads", [2, 4])
def test_llama(kind, key_value_heads):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=key_value_heads, attention_bias=True)
    model = randomized(transformers.LlamaForCausalLM(config))
    spec, smaller = check(model, kind, TOKENS)
    if kind == "head":
        attention = smaller.model.layers[0].self_attn
        assert attention.q_proj.out_features == attention.o_proj.in_features == 16
        assert attention.k_proj.out_features == attention.v_proj.out_features == key_value_heads // 2 * 8
        assert [family.size for family in spec.families] == [key_value_heads] * 2
        # the cache has the smaller heads too: step by step as all at once
        steps = smaller(TOKENS[:, :4], use_cache=True)
        last = smaller(TOKENS[:, 4:], past_key_values=steps.past_key_values).logits
        torch.testing.assert_close(last, smaller(TOKENS).logits[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_bert(kind):
    transformers = pytest.importorskip("transformers")
    model = randomized(transformers.BertModel(transformers.BertConfig(**SMALL)))
    _, smaller = check(model, kind, TOKENS)
    if kind == "head":
        attention = smaller.encoder.layer[0].attention.self
        assert (attention.num_attention_heads, attention.all_head_size) == (2, 16)


def test_trained_with_the_ramp_a_network_shrinks_to_k_units():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model = nn.Sequential(
        nn.Linear(6, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)
    )
    spec = GroupSpec.from_module(model, "neuron")
    reg = GroupEnvelope(spec, k=0.25, lam=0.0)
    ramp = SparsityRamp(reg, 20, start=0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(20):
        ramp.step(epoch)
        for batch in range(4):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[batch::4]), y[batch::4]).backward()
            optimizer.step()
            reg.prox_(0.01)
    model.eval()
    smaller = shrink(model, spec)
    assert (smaller[0].out_features, smaller[3].out_features) == (8, 5)
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-5, atol=1e-5)
    assert functional.cross_entropy(smaller(x), y) < 0.6
