"""The library by itself: the loop around a layer that is not model.py's, and errors of its users."""

from dataclasses import replace

import pytest
import torch

from chronomoe import ChronoConfig, ChronoLoop, ChronoRouter, RouterState, collect_trace
from docs.own_layer import Layer, train
from tests.helpers.models import chrono


def test_the_loop_closes_on_another_layer():
    layer = Layer(32, 8, chrono(eta=0.02, k_max=1.0, bridge_threshold=2e-4))
    loop = train(layer, steps=149)
    before = layer.router_state.beta_coeff.clone()
    _, trace = layer(torch.randn(64, 32))
    loop.step(trace)
    config, values, states = loop.config, loop.read(), loop.snapshot()
    beta, phi = layer.router_state.beta_coeff, loop.coherence.phi("slow")
    free = beta.abs() < config.k_max
    torch.testing.assert_close((beta - before)[free], config.eta * (phi - config.tau)[free])
    assert free.any() and layer.router_state.disagreement > 2e-4 and values["routing/L0/relevance"] < 1
    assert all(state.total_tokens_seen > 0 and -1 <= state.phi_slow <= 1 for state in states.values())
    low = {f"L0_E{e}" for (_, e), state in states.items() if state.phi_slow < config.prune_phi}
    assert {d.expert_id for d in loop.report()} == low  # over 1000 tokens and 100 updates each
    assert len(layer.experts) == 8  # nothing is pruned


STATE, ROUTER = RouterState(2, 4, chrono()), ChronoRouter(8, 4, 2, chrono())
LOOP, X = ChronoLoop(STATE, [0, 2]), torch.ones(6, 8)
BIASES = STATE.layer_biases()
SUMS = torch.ones(2, 4, 8)


def traced(biases=BIASES, **arguments):
    return collect_trace([ROUTER(X, bias) for bias in biases], STATE.config, **{"outputs": [SUMS] * 2} | arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChronoLoop(STATE, [0]), "2 layers of router_state"),
        (lambda: LOOP.step(traced(BIASES[:1], outputs=[SUMS])), r"shape \[1, 4\]; the loop has 2 layers of 4 experts"),
        (lambda: LOOP.step(replace(traced(), logit_var=None)), "the trace has no logit_var"),
        (lambda: ROUTER(X.view(2, 3, 8), BIASES[0]), r"\[2, 3, 8\] must be \[N, D\]"),
        (lambda: ROUTER(X, RouterState(1, 3, chrono()).layer_biases()[0]), r"bias has shape \[3\], and .* 4 experts"),
        (lambda: traced([BIASES[0], None]), r"layer 1 was routed without its bias: .*layer_biases\(\)\[1\]"),
        (lambda: traced(outputs=[]), "outputs has 0 entries for 2 layers"),
        (lambda: traced(kept_per_expert=[torch.ones(4)]), "kept_per_expert has 1 entries for 2 layers"),
        (lambda: traced(tokens=5), "layer 0 routed 6 tokens, not 5"),
        (lambda: ChronoConfig(signal="laod"), "did you mean 'load'"),
        (lambda: ChronoConfig(eta=-5.0), "eta=-5.0 must be a number at least 0"),
    ],
)
def test_a_mistake_is_an_error_at_the_call(call, message):
    with pytest.raises(ValueError, match=message):
        call()
