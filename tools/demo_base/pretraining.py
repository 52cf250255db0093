"""The pretraining loop and its measurements."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from demo_base.architecture import CONTEXT, Pretraining
from demo_base.tokenizer import ASSISTANT, SPECIAL, USER


def packed_batches(documents: Sequence[Sequence[int]], batch: int, seed: int) -> Iterator[Tensor]:
    """Yield (batch, CONTEXT) ids without end: concatenated documents, cut where a row is full.

    Every epoch has another order.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        for index in torch.randperm(len(documents), generator=generator).tolist():
            waiting += documents[index]
            while len(waiting) >= batch * CONTEXT:
                yield torch.tensor(waiting[: batch * CONTEXT]).view(batch, CONTEXT)
                waiting = waiting[batch * CONTEXT :]


def cosine(step: int, steps: int, settings: Pretraining) -> float:
    """The learning rate of one step: a linear warm-up, then half a cosine down to the floor."""
    warmup_steps = max(1, round(steps * settings.warmup))
    if step < warmup_steps:
        return settings.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (settings.lr_floor + (1 - settings.lr_floor) * fall)


@torch.no_grad()
def loss_per_token(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """Mean cross-entropy in nats over all tokens except bos, for each document on its own, cut to
    CONTEXT tokens."""
    total, count = 0.0, 0
    for document in documents:
        ids = torch.tensor([document[:CONTEXT]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def optimizer_for(model: LlamaForCausalLM, settings: Pretraining) -> torch.optim.AdamW:
    """AdamW with weight decay only for the matrices inside the layers."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or ".layers." not in n]
    groups = [
        {"params": inside, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


@dataclass(frozen=True)
class Result:
    """Measurements of pretraining; the held-out loss is computed with the bf16 values."""

    settings: Pretraining
    parameters: int
    steps: int
    tokens: int
    seconds: float
    train_loss: float
    held_out_loss: float


def pretrain(
    model: LlamaForCausalLM,
    seen: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    steps: int,
    settings: Pretraining,
) -> Result:
    """Train in fp32, and print the held-out loss ten times on the way.

    The train loss of the result is the mean over the last tenth of the steps.
    """
    optimizer = optimizer_for(model, settings)
    batches = packed_batches(seen, settings.batch, settings.seed)
    losses: deque[float] = deque(maxlen=max(1, steps // 10))
    started = time.perf_counter()
    for step, ids in enumerate(islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, settings)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
            train_loss = sum(losses) / len(losses)
            held_out_loss = loss_per_token(model, held_out)
            seconds = time.perf_counter() - started
            print(
                f"step {step + 1}/{steps}  train {train_loss:.4f}  held-out {held_out_loss:.4f}  "
                f"{(step + 1) * ids.numel() / seconds:,.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
    separate_embeddings(model, [SPECIAL.index(USER), SPECIAL.index(ASSISTANT)], settings.seed)
    round_to_bf16(model)
    return Result(
        settings=settings,
        parameters=model.num_parameters(),
        steps=steps,
        tokens=steps * settings.batch * CONTEXT,
        seconds=seconds,
        train_loss=train_loss,
        held_out_loss=loss_per_token(model, held_out),
    )


def separate_embeddings(model: LlamaForCausalLM, ids: Sequence[int], seed: int) -> None:
    """Add a random vector of median length to the embeddings of tokens not in the training text.

    With a tied head the softmax moves all unseen rows in the same direction, until the embeddings
    of user and assistant are nearly equal (cosine above 0.99).
    """
    rows = model.get_input_embeddings().weight.data
    length = rows.norm(dim=1).median()
    noise = torch.randn(len(ids), rows.shape[1], generator=torch.Generator().manual_seed(seed))
    rows[list(ids)] += noise / noise.norm(dim=1, keepdim=True) * length


def round_to_bf16(model: LlamaForCausalLM) -> None:
    """Round to bf16 values in fp32 tensors, so that the measured model is the saved one."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def steps_in(minutes: float, model: LlamaForCausalLM, settings: Pretraining) -> int:
    """Steps that fit in `minutes`, estimated from six steps on random ids after two of warm-up."""
    ids = torch.randint(len(SPECIAL), settings.vocabulary, (settings.batch, CONTEXT))
    started = time.perf_counter()
    for step in range(8):
        if step == 2:
            started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
    return max(1, round(minutes * 60 * 6 / (time.perf_counter() - started)))
