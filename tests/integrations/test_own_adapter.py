"""A pipeline that the package does not know needs one adapter, and no change elsewhere."""

import pytest
import torch
from torch import nn

import stgfast
from stgfast import Adapter, Blocks, Guidance, Perturbation
from tests.precision import same

pytestmark = pytest.mark.usefixtures("float64")

DEPTH, WIDTH = 6, 16


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, tokens):
        scores = self.to_q(tokens) @ self.to_k(tokens).mT / WIDTH**0.5
        return self.to_out(scores.softmax(-1) @ self.to_v(tokens))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer, self.ff, self.text = SelfAttention(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens, prompt, time):
        tokens = tokens + self.mixer(tokens) + self.text(prompt)[:, None]
        return tokens + torch.tanh(self.ff(tokens)) * time[:, None, None]


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))

    def forward(self, x, prompt, time):
        for layer in self.layers:
            x = layer(x, prompt, time)
        return (x,)


class HomemadePipeline:
    """A pipeline outside of diffusers, with names of its own."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Denoiser()

    def __call__(self, prompt, strength=3.0, rounds=4):
        self.strength, self.rounds = strength, rounds
        x = torch.randn(len(prompt), 5, WIDTH, generator=torch.Generator().manual_seed(1))
        for i in range(rounds):
            time = torch.full((2 * len(x),), 1 - i / rounds)
            (both,) = self.model(torch.cat([x, x]), torch.cat([torch.zeros_like(prompt), prompt]), time)
            none, text = both.chunk(2)
            x = x - 0.1 * (none + self.strength * (text - none))
        return x


ADAPTER = Adapter(
    pipeline="HomemadePipeline",
    protocol="stacked",
    denoisers=("model",),
    sample="x",
    blocks=Blocks(
        lists=("layers",),
        state=("tokens",),
        rows=frozenset({"x", "prompt", "time", "tokens"}),
        attention="mixer",
        identity=lambda mixer, tokens: mixer.to_out(mixer.to_v(tokens)),
    ),
    requested=lambda call: call["strength"],
    live=lambda pipe, call, denoiser: pipe.strength,
    steps=lambda pipe: pipe.rounds,
    steps_asked=lambda call: call["rounds"],
    defaults=Guidance(Perturbation([4])),
)


def written_out(pipe, prompt, layer, kind, scale, strength=3.0, rounds=4):
    x = torch.randn(len(prompt), 5, WIDTH, generator=torch.Generator().manual_seed(1))
    for i in range(rounds):
        time = torch.full((len(x),), 1 - i / rounds)
        (none,), (text,) = pipe.model(x, torch.zeros_like(prompt), time), pipe.model(x, prompt, time)
        perturbed = x
        for number, block in enumerate(pipe.model.layers):
            if number != layer:
                perturbed = block(perturbed, prompt, time)
            elif kind == "attention":
                value = block.mixer.to_out(block.mixer.to_v(perturbed))
                perturbed = perturbed + value + block.text(prompt)[:, None]
                perturbed = perturbed + torch.tanh(block.ff(perturbed)) * time[:, None, None]
        x = x - 0.1 * (none + strength * (text - none) + scale * (text - perturbed))
    return x


@pytest.mark.parametrize("kind", ["residual", "attention"])
def test_an_adapter_is_all_it_takes(kind):
    prompt = torch.randn(2, WIDTH)
    with torch.no_grad():
        expected = written_out(HomemadePipeline(), prompt, 4, kind, 1.5)
        pipe = stgfast.accelerate(HomemadePipeline(), adapter=ADAPTER)
        made = pipe(prompt, stg_scale=1.5, stg_mode=kind)
        same(made, expected)
        assert torch.equal(stgfast.restore(pipe)(prompt), HomemadePipeline()(prompt))


def test_it_is_explained():
    pipe = stgfast.accelerate(HomemadePipeline(), adapter=ADAPTER)
    assert stgfast.explain(pipe, rounds=10).phases[0].rows == (2, 2, 2, 2, 2, 3)
    assert stgfast.explain(pipe, rounds=10).block_rows == 130
