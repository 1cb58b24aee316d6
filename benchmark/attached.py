"""Time the training step of a small random OLMoE, plain and with the loop attached. Needs transformers.

python -m benchmark.attached                 two minutes on two cores
python -m benchmark.attached --seconds=5
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmark.timing import Effort, Report, time_in_turns
from chronomoe import ChronoConfig, attach
from chronomoe.config import STEPS

SHAPE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
EXPERTS = dict(num_experts=16, num_experts_per_tok=4, vocab_size=4096, pad_token_id=None, eos_token_id=None)
BATCH, LENGTH = 4, 128


def training_step(steps: tuple[str, ...]) -> Callable[[], None]:
    """One training step on random tokens. steps: of the loop; none: the plain model."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SHAPE, **EXPERTS, output_router_logits=True)).train()
    handle = attach(model, ChronoConfig(**dict.fromkeys(steps, True))) if steps else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(EXPERTS["vocab_size"], (BATCH, LENGTH))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        if handle is not None:
            handle.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="duration")
    options = parser.parse_args()
    competitors = {
        "plain": (),
        "step 1": ("router",),
        "steps 1 and 2": ("router", "coherence"),
        "all five steps": STEPS,
    }
    times = time_in_turns(
        {name: training_step(steps) for name, steps in competitors.items()},
        torch.device("cpu"),
        Effort(options.seconds, least=2, most=1000),
    )
    size = f"{SHAPE['num_hidden_layers']} layers of {EXPERTS['num_experts']} experts, {BATCH * LENGTH} tokens"
    Report().comparison("attached", f"Training step of OLMoE, {size}, {torch.get_num_threads()} threads", times)


if __name__ == "__main__":
    main()
