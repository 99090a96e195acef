"""A batch that grows from step to step is the same training on any mesh at any ZeRO stage as in plain torch."""

from __future__ import annotations

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.equality import make
from cpt_harness.ranks import on_ranks

from cpt.progress import Progress

WINDOWS = [4, 4, 8, 12, 20, 20, 8]  # numbers of micro-batches that do not divide all before
TOLERANCE = 2e-6


def reference() -> dict:
    model = make("llama")()
    model.initialise(tiny.SEED)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4)
    losses, norms = [], []
    for step, number in enumerate(WINDOWS):
        tokens = tiny.windows_of_step(step, number)
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = tiny.rate_of_step(step)
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": losses, "norm": norms, "masters": {n: p.detach() for n, p in model.named_parameters()}}


@pytest.mark.parametrize(
    ("ranks", "axes", "deepspeed"),
    [
        (1, {}, {}),
        (2, {}, {}),
        (2, {"pipeline": 2}, {}),
        (2, {"tensor": 2}, {}),
        (2, {"sequence": 2}, {}),
        (2, {}, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    ],
    ids=str,
)
def test_losses_norms_and_masters_are_those_of_plain_torch(ranks, axes, deepspeed):
    def work(mesh):
        told = []
        for zero in (0, 1) if "pipeline" in axes else (1, 2, 3) if deepspeed else (0, 1, 2, 3) if not axes else (1, 3):
            engine = tiny.start_engine(
                mesh, zero=zero, model=make("llama"), micro_batch=2, epsilon=1e-4, deepspeed=deepspeed
            )
            results = []
            for step, number in enumerate(WINDOWS):
                here = number // mesh.data_size
                windows = tiny.windows_of_step(step, number)[mesh.data_rank * here : (mesh.data_rank + 1) * here]
                sources = torch.zeros(here, dtype=torch.int64)
                results.append(engine.step(windows, sources, 1, tiny.rate_of_step(step), Progress(step=step)))
            told.append([[r.loss for r in results], [r.grad_norm for r in results], tiny.fragments(engine)])
        return told

    expected = reference()
    for of_ranks in zip(*on_ranks(ranks, work, **axes), strict=True):
        for losses, norms, _ in of_ranks:
            assert losses == pytest.approx(expected["loss"], abs=TOLERANCE)
            assert norms == pytest.approx(expected["norm"], abs=TOLERANCE)
        masters = tiny.join([fragments for *_, fragments in of_ranks])
        for name, values in expected["masters"].items():
            assert (masters[name] - values).abs().max() < TOLERANCE, name
