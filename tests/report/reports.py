"""Reports and metrics for the tests."""

import math

from qlora_lite.report.contents import MergeRow, Report, Sample


def training(step: int, loss: float) -> dict[str, float]:
    return {
        "step": step,
        "tokens": 2048 * step,
        "loss": loss,
        "lr": 2e-4 / step,
        "grad_norm": 1.0 + 1 / step,
        "trained_tokens": 900,
        "tokens_per_second": 2000.123456789 + step % 7,
        "seconds": 1.0123456789 * step,
        "peak_bytes": 1_900_000_000,
    }


def scoring(step: int, loss: float) -> dict[str, float]:
    return {
        "step": step,
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(loss),
        "heldout_accuracy": 0.4375,
        "seconds": 1.0123456789 * step,
    }


def long_run(num_steps: int, scored_every: int) -> list[dict[str, float]]:
    events = []
    for step in range(1, num_steps + 1):
        events.append(training(step, 1.5 + 2 / step**0.5 + 0.1 * math.sin(step)))
        if step % scored_every == 0:
            events.append(scoring(step, 1.6 + 2 / step**0.5))
    return events


REPORT = Report(
    title="Qwen3 on GSM8K",
    recipe={
        "base": {"model": "Qwen/Qwen3-0.6B", "revision": None, "quant": {"kind": "nf4"}},
        "adapter": {"kind": "lora", "rank": 16, "ranks": {}},
        "optim": {"lr": 0.0002, "betas": [0.9, 0.999]},
        "seed": 7,
    },
    metrics=(
        scoring(0, 3.4125),
        training(1, 3.25),
        training(2, 2.75),
        scoring(2, 2.0625),
    ),
    facts={"device": "CPU: fp32 compute", "torch": "2.13.0"},
    memory=(
        ("peak", 2 * 2**30, 1945 * 2**20),
        ("frozen base", 512 * 2**20, 512 * 2**20),
        ("optimizer states", 80 * 2**20, None),
    ),
    samples=(
        Sample("What is 2 + 2?", "two two two", "4", "four"),
        Sample("Say nothing.", "well", "", None),
    ),
    merges=(
        MergeRow("adapter on quantised base", 2.0625, None, False),
        MergeRow("merged on trained base", 2.0626, 0.9984, True),
    ),
)
EMPTY = Report(title="Empty", recipe={}, metrics=(), facts={}, memory=(), samples=())
