"""Computing again in the backward pass changes no bit of a training, and really keeps less."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.equality import MODELS, make, starts_of_step
from cpt_harness.ranks import on_ranks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cpt.config import Fault, build, read_settings
from cpt.models.layers.blocks import prepare_blocks
from cpt.models.layers.compiled import Settings as Compile
from cpt.models.layers.recompute import Settings
from cpt_kernels import attention_kernels, choose, language, switch

NUM_STEPS = 10
SETTINGS = {"selective": Settings("selective"), "full, two of three": Settings("full", blocks=2)}
# (model, ranks, axes of the mesh, ZeRO stage, precision)
CASES = [
    ("llama", 2, (), 3, "bf16"),
    ("pythia", 2, (("tensor", 2),), 1, "fp32"),
    ("llama", 2, (("pipeline", 2),), 1, "fp32"),
    ("llama", 2, (("sequence", 2),), 3, "fp32"),
]
# Without this, everything is small enough to stay gathered under ZeRO-3.
ALL_CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def train(mesh, name: str, zero: int, precision: str, settings: Settings | None, documents: bool = False) -> dict:
    engine = tiny.start_engine(
        mesh, zero=zero, precision=precision, micro_batch=2, model=make(name), recomputing=settings,
        deepspeed=ALL_CUT if zero == 3 else None,
    )  # fmt: skip
    results = tiny.take_steps(engine, mesh, 0, NUM_STEPS, starts_of=starts_of_step if documents else None)
    assert not [p for p in engine._model.parameters() if getattr(p, "ds_status", None) == "AVAILABLE"]
    told = [value for r in results for value in (r.loss, r.grad_norm)]
    return {"told": told, "masters": [values for *_, values in tiny.fragments(engine)]}


def assert_equal_to_the_bit(found: dict, expected: dict) -> None:
    assert found["told"] == expected["told"]
    assert all(torch.equal(mine, other) for mine, other in zip(found["masters"], expected["masters"], strict=True))


@pytest.fixture(scope="module")
def trained() -> dict:
    """Of each case, every rank's results without and with each of the settings."""
    told = {}
    for ranks, axes in dict.fromkeys(case[1:3] for case in CASES):
        here = [case for case in CASES if case[1:3] == (ranks, axes)]

        def work(mesh, here=here):
            return [
                {
                    way: train(mesh, name, zero, precision, settings)
                    for way, settings in [("none", None), *SETTINGS.items()]
                }
                for name, _, _, zero, precision in here
            ]

        of_ranks = on_ranks(ranks, work, seconds=120, **dict(axes))
        told.update({case: [results[i] for results in of_ranks] for i, case in enumerate(here)})
    return told


@pytest.mark.parametrize("way", SETTINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_norms_and_weights_after_ten_steps_are_the_same_bits(trained, case, way):
    for of_rank in trained[case]:
        assert_equal_to_the_bit(of_rank[way], of_rank["none"])


def test_within_documents_they_are_the_same_bits_too():
    def work(mesh):
        return [train(mesh, "llama", 1, "fp32", settings, documents=True) for settings in (None, *SETTINGS.values())]

    (told,) = on_ranks(1, work)
    for other in told[1:]:
        assert_equal_to_the_bit(other, told[0])


class _Alive(TorchDispatchMode):
    """Bytes that tensors made under it still hold."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **(named or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def num_bytes(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.made.values() if not reference.expired())


def bytes_kept(settings: Settings, name: str = "llama") -> int:
    """What is there between the forward and the backward pass of a model with wider blocks than embedding and head."""
    model = build(
        dataclasses.replace(MODELS[name], vocabulary=7, layers=4, longest_sequence=64, width=64, mlp_width=256),
        "Model",
        choose(switch.Settings(), torch.device("cpu")),
    )
    model.initialise(1)
    prepare_blocks(model, settings, Compile())
    tokens = torch.randint(0, 7, (4, 64), generator=torch.Generator().manual_seed(3))
    with _Alive() as alive:
        losses = model(tokens, tokens)
        kept = alive.num_bytes
    losses.mean().backward()
    return kept


@pytest.mark.parametrize("name", ["llama", "pythia"])
def test_full_keeps_less_than_selective_and_selective_less_than_none(name):
    kept = {mode: bytes_kept(Settings(mode), name) for mode in ("none", "selective", "full")}
    assert kept["full"] < 0.5 * kept["selective"], kept
    assert kept["selective"] < 0.8 * kept["none"], kept


class _Counted:
    """A Triton kernel, and how often it was launched."""

    def __init__(self, kernel) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.skipif(bool(language.why_not(torch.device("cpu"))), reason="Triton's kernels do not run on this CPU")
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_attention_by_triton_is_kept_by_selective_and_computed_again_by_full(is_compiled, monkeypatch):
    counted = _Counted(attention_kernels.forward)
    monkeypatch.setattr(attention_kernels, "forward", counted)
    gradients, launches = [], []
    for mode in ("none", "selective", "full"):
        kernels = choose(switch.Settings(attention="triton"), torch.device("cpu"))
        model = build(dataclasses.replace(MODELS["llama"], layers=1, longest_sequence=7), "Model", kernels)
        model.initialise(1)
        prepare_blocks(model, Settings(mode), Compile(blocks=is_compiled, backend="aot_eager"))
        counted.launches = 0
        model(torch.arange(7)[None], torch.arange(7)[None]).mean().backward()
        launches.append(counted.launches)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert launches == [1, 1, 2]
    for other in gradients[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients[0], other, strict=True))


def test_the_fewer_blocks_the_more_is_kept():
    kept = [bytes_kept(Settings("full", blocks)) for blocks in (None, 4, 2, 1)]
    assert kept[0] == kept[1] < kept[2] < kept[3] < bytes_kept(Settings())


@pytest.mark.parametrize(("blocks", "runs"), [(None, [2, 2, 2]), (2, [2, 2, 1])])
def test_blocks_that_are_computed_again_really_run_twice(blocks, runs):
    model = make("llama")()
    model.initialise(1)
    times = [0, 0, 0]
    for index, block in enumerate(model.blocks.values()):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: times.__setitem__(index, times[index] + 1))
    prepare_blocks(model, Settings("full", blocks), Compile())
    names = [name for name, _ in model.named_parameters()]
    model(torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)).mean().backward()
    assert times == runs
    assert names == list(MODELS["llama"].shapes)
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64))
    assert times == [number + 1 for number in runs], "nothing is computed again where there is no backward pass"


def test_a_result_that_is_added_to_in_place_is_kept_as_it_was():
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)

    class Added(torch.autograd.Function):
        """What DeepSpeed's linear layer does under ZeRO-3."""

        @staticmethod
        def forward(ctx, given, weight):
            ctx.save_for_backward(weight)
            product = given.matmul(weight)
            product += 1
            return product

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ ctx.saved_tensors[0].T, None

    block = torch.nn.Module()
    block.forward = lambda given: Added.apply(given, weight).square().sin()
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleDict({"0": block})
    given = torch.ones(1, 2, 3, requires_grad=True)
    block(given).sum().backward()
    expected, given.grad = given.grad, None
    prepare_blocks(model, Settings("selective"), Compile())
    block(given).sum().backward()
    assert torch.equal(given.grad, expected)


@pytest.mark.parametrize(
    ("plain", "told"),
    [
        ({"mode": "full", "blocks": 0}, "blocks = 0: at least 1; leave it out for all blocks"),
        ({"blocks": 2}, "blocks = 2: mode is none, so nothing is computed again; set mode to selective or full"),
        ({"mode": "ful"}, "mode = 'ful' is not known; did you mean full?"),
    ],
)
def test_settings_that_cannot_be_meant_are_faults(plain, told):
    with pytest.raises(Fault) as caught:
        read_settings(Settings, plain)
    assert list(caught.value.lines) == [told]


def test_more_blocks_than_the_model_has_are_a_fault():
    assert Settings("full", 3).faults_of(3) == []
    assert Settings("full", 4).faults_of(3) == [
        "recompute.blocks = 4: the model has 3; lower it, or leave it out for all"
    ]
