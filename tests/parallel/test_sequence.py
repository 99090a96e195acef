"""Attention of windows that ranks share is that of one device, and that of DeepSpeed's own layer in fewer calls."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cpt_harness.ranks import on_ranks

from cpt.parallel.sequence import AttentionOverRanks, PositionsHere, exchanged
from cpt_kernels import Documents, attention, rotary

B, S, K = 2, 8, 6
# (query heads, key and value heads, ranks): as many, fewer, one for all; fewer than ranks; that no rank has alone.
HEADS = [(4, 4, 2), (4, 2, 2), (4, 1, 2), (4, 2, 4), (8, 1, 4), (6, 3, 2), (12, 6, 4)]


def attend(queries, keys, values, angles, documents=None):
    queries, keys = rotary.plain(queries, keys, angles)
    return attention.plain(queries, keys, values, documents)


def case(heads: int, kv_heads: int, has_documents: bool) -> tuple:
    """Queries, keys, values and gradients of whole windows, angles, and documents that cross from rank to rank."""
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    shapes = [(B, S, n, K) for n in (heads, kv_heads, kv_heads, heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    angles = rotary.table(S, rotary.frequencies(K, 100.0, torch.device("cpu"))).double()
    starts = torch.zeros(B, S, dtype=torch.bool)
    starts[0, [1, 3]] = starts[1, [2, 6, 7]] = True
    documents = Documents.from_starts(starts) if has_documents else None
    return tensors, angles if documents is None else angles[:, documents.positions], documents


def with_gradients(step, tensors: list, gradients: torch.Tensor) -> list[torch.Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    output = step(*inputs)
    output.backward(gradients)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def of_all_ranks(told: list) -> list[torch.Tensor]:
    return [torch.cat(parts, dim=1) for parts in zip(*told, strict=True)]


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), HEADS)
def test_outputs_and_gradients_are_those_of_one_device(heads, kv_heads, ranks, has_documents):
    tensors, angles, documents = case(heads, kv_heads, has_documents)
    expected = with_gradients(lambda *heads: attend(*heads, angles, documents), tensors[:3], tensors[3])

    def work(mesh):
        *here, gradients = map(PositionsHere(mesh.sequence), tensors)
        layer = AttentionOverRanks(attend, mesh.sequence)
        return with_gradients(lambda *heads: layer(*heads, angles, documents), here, gradients)

    for found, of_one in zip(of_all_ranks(on_ranks(ranks, work, sequence=ranks)), expected, strict=True):
        assert (found - of_one).abs().max() < 1e-12


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_outputs_and_gradients_are_those_of_deepspeeds_layer_with_half_the_collectives(heads, kv_heads):
    tensors, angles, _ = case(heads, kv_heads, False)

    def work(mesh):
        import deepspeed
        from deepspeed.sequence.layer import DistributedAttention

        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False, dist_init_required=False)
        *here, gradients = map(PositionsHere(mesh.sequence), tensors)
        ours = AttentionOverRanks(attend, mesh.sequence)
        peer = DistributedAttention(lambda q, k, v: attend(q, k, v, angles), mesh.sequence.handle, 2, 1)
        collective, calls = dist.all_to_all_single, []

        def counted(*arguments, **named):
            calls.append(1)
            return collective(*arguments, **named)

        dist.all_to_all_single = counted
        told = []
        for step in (lambda *heads: ours(*heads, angles), lambda *heads: peer(*heads, batch_dim_idx=0)):
            calls.clear()
            told.append([with_gradients(step, here, gradients), len(calls)])
        return told

    for (found, num_ours), (expected, num_theirs) in on_ranks(2, work, sequence=2):
        assert (num_ours, num_theirs) == (4, 8)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine - theirs).abs().max() < 1e-12


def test_a_rank_takes_neighbouring_positions():
    def work(mesh):
        return PositionsHere(mesh.sequence)(torch.arange(16).view(2, 8))

    assert torch.cat(on_ranks(4, work, sequence=4), dim=1).equal(torch.arange(16).view(2, 8))


def test_compiled_steps_keep_the_gradients_of_what_was_exchanged():
    # A collective into empty memory that a tracer looks through can lose its gradient, and nothing would say so.
    def work(mesh):
        def step(tensor):
            return (exchanged(tensor * 2, mesh.sequence) * torch.arange(1.0, 5.0)).sum()

        tensor = torch.ones(2, 4) * (mesh.rank + 1)
        told = []
        for function in (step, torch.compile(step, backend="aot_eager")):
            here = tensor.clone().requires_grad_()
            output = function(here)
            output.backward()
            told.append([output.detach(), here.grad])
        return told

    for plain, compiled in on_ranks(2, work, sequence=2):
        assert plain[1].abs().min() > 0
        assert all(map(torch.equal, compiled, plain))
