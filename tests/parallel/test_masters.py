"""The fp32 masters by name: every element once, whatever DeepSpeed made of them, and what is written there lasts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial

import deepspeed
import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.config import Fault, build
from cpt.progress import Progress
from cpt_kernels import Settings, choose

MODELS = {"llama": tiny.build_llama, "crumbs": tiny.Crumbs}
# 12 windows can be cut over 1, 2, 3 and 4 ranks.
WINDOWS = 12
LAYOUTS = [(zero, precision) for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16") if zero or precision == "fp32"]
# Nothing that is small stays gathered at stage 3, and its flat tensor is cut into several.
SCATTERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 500}}


def start(mesh, layout, model="llama", **settings):
    zero, precision = layout
    return tiny.start_engine(mesh, zero=zero, precision=precision, model=MODELS[model], windows=WINDOWS, **settings)


def rest(engine, mesh, step: int = 0) -> None:
    """A step with a learning rate of 0: whatever the masters hold before it, they hold after it."""
    here = WINDOWS // mesh.size
    tokens = tiny.windows_of_step(step, WINDOWS)[mesh.rank * here : (mesh.rank + 1) * here]
    engine.step(tokens, torch.zeros(here, dtype=torch.int64), 1, 0.0, Progress(step=step))


def initial(model: str) -> dict[str, torch.Tensor]:
    made = MODELS[model]()
    return {name: made.initial_value(name, tiny.SEED) for name, _ in made.named_parameters()}


def marked(name: str, start: int, stop: int) -> torch.Tensor:
    """Values that differ in every element of every parameter, and that bf16 cannot hold."""
    return torch.arange(start, stop) / 1000.0 + len(name) / 7.0


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("ranks", [1, 3, *(pytest.param(ranks, marks=pytest.mark.long) for ranks in (2, 4))])
def test_every_element_of_every_parameter_is_owned_once_and_starts_at_its_initial_value_bit_for_bit(ranks):
    def work(mesh):
        return [tiny.fragments(start(mesh, layout, model)) for layout in LAYOUTS for model in MODELS]

    cases = [(layout, model) for layout in LAYOUTS for model in MODELS]
    for ((zero, precision), model), of_ranks in zip(cases, zip(*on_ranks(ranks, work), strict=True), strict=True):
        owners = Counter(
            (name, element)
            for one in of_ranks
            for name, _, first, values in one
            for element in range(first, first + len(values))
        )
        assert set(owners.values()) == {ranks if zero == 0 else 1}, (zero, precision, model)
        assert_same(tiny.join(of_ranks), initial(model))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 3])
def test_the_model_computes_with_the_rounded_masters_after_fill_and_after_a_step_and_after_refresh(ranks):
    def work(mesh):
        told = []
        for layout in LAYOUTS:
            for deepspeed_block in ({}, SCATTERED) if layout[0] == 3 else ({},):
                engine = start(mesh, layout, deepspeed=deepspeed_block)
                told.append((tiny.fragments(engine), tiny.computed_with(engine)))
                tiny.take_steps(engine, mesh, 0, 2, number=WINDOWS)
                told.append((tiny.fragments(engine), tiny.computed_with(engine)))
                engine.masters.fill(marked)
                engine.masters.refresh()
                told.append((tiny.fragments(engine), tiny.computed_with(engine)))
        return told

    for of_ranks in zip(*on_ranks(ranks, work), strict=True):
        masters = tiny.join([fragments for fragments, _ in of_ranks])
        for _, computed in of_ranks:
            assert_same(computed, {name: masters[name].to(computed[name].dtype) for name in masters})


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 3])
def test_what_is_written_into_the_masters_survives_the_next_step(ranks):
    def work(mesh):
        told = []
        for layout in LAYOUTS:
            engine = start(mesh, layout, weight_decay=0.0)
            tiny.take_steps(engine, mesh, 0, 2, number=WINDOWS)
            engine.masters.fill(marked)
            engine.masters.refresh()
            rest(engine, mesh, 2)
            told.append((tiny.fragments(engine), tiny.computed_with(engine)))
        return told

    shapes = {name: tuple(value.shape) for name, value in initial("llama").items()}
    for of_ranks in zip(*on_ranks(ranks, work), strict=True):
        expected = {name: marked(name, 0, torch.Size(shape).numel()).reshape(shape) for name, shape in shapes.items()}
        assert_same(tiny.join([fragments for fragments, _ in of_ranks]), expected)
        computed = of_ranks[0][1]
        assert_same(computed, {name: expected[name].to(computed[name].dtype) for name in expected})


def test_what_is_written_into_the_weights_of_the_model_alone_is_lost_at_the_next_step():
    """The published failure of Reptile under DeepSpeed, kept here so that nobody brings it in."""

    def work(mesh):
        told = []
        for layout in [layout for layout in LAYOUTS if layout[0]]:  # at stage 0 the model's weights are the masters
            engine = start(mesh, layout, weight_decay=0.0)
            tiny.take_steps(engine, mesh, 0, 2, number=WINDOWS)
            before = tiny.fragments(engine)
            with torch.no_grad():
                for parameter in engine._model.parameters():
                    gathered = hasattr(parameter, "ds_id")
                    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=gathered):
                        parameter.data.mul_(0.5)
            halved = tiny.computed_with(engine)
            rest(engine, mesh, 2)
            told.append((before, halved, tiny.computed_with(engine)))
        return told

    for of_ranks in zip(*on_ranks(2, work), strict=True):
        before = tiny.join([fragments for fragments, _, _ in of_ranks])
        _, halved, after = of_ranks[0]
        for name in before:
            lasting = before[name].to(after[name].dtype)
            assert torch.equal(after[name], lasting), f"{name}: the masters decide"
            assert not torch.equal(halved[name], lasting), f"{name}: the write did reach the model"


@pytest.mark.parametrize("ranks", [1, 2])
def test_moments_can_be_written_before_the_first_step_and_that_step_uses_them(ranks):
    def moment_of(kind: str):
        return lambda name, first, stop: marked(name, first, stop) * {"exp_avg": -0.01, "exp_avg_sq": 0.02}[kind]

    def work(mesh):
        told = []
        for layout in [layout for layout in LAYOUTS if layout[1] == "fp32"]:
            engine = start(mesh, layout)
            for kind in ("exp_avg", "exp_avg_sq"):
                engine.masters.fill(moment_of(kind), kind)
            engine.masters.num_updates = 7
            tiny.take_steps(engine, mesh, 0, 1, number=WINDOWS)
            told.append([tiny.fragments(engine, kind) for kind in (None, "exp_avg", "exp_avg_sq")])
            assert engine.masters.num_updates == 8
        return told

    model = tiny.build_llama()
    model.initialise(tiny.SEED)
    matrices, norms = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=tiny.rate_of_step(0), betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(7.0),
            **{k: moment_of(k)(name, 0, parameter.numel()).reshape(parameter.shape) for k in ("exp_avg", "exp_avg_sq")},
        }
    tokens = tiny.windows_of_step(0, WINDOWS)
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for of_ranks in zip(*on_ranks(ranks, work), strict=True):
        for number, kind in enumerate((None, "exp_avg", "exp_avg_sq")):
            found = tiny.join([one[number] for one in of_ranks])
            for name, parameter in model.named_parameters():
                expected = parameter if kind is None else optimizer.state[parameter][kind]
                assert (found[name] - expected).abs().max() < 2e-6, (name, kind)


def test_the_sum_over_pieces_is_that_over_all_elements_on_every_rank_and_stage():
    def work(mesh):
        totals = []
        for layout in LAYOUTS:
            engine = start(mesh, layout)
            squares = [float(p.values.square().sum(dtype=torch.float64)) for p in engine.masters.pieces]
            totals.append(engine.masters.total(squares))
        return totals

    expected = sum(float(value.square().sum(dtype=torch.float64)) for value in initial("llama").values())
    for totals in on_ranks(3, work):
        assert totals == pytest.approx([expected] * len(LAYOUTS), rel=1e-12)


@pytest.mark.parametrize(
    ("zero", "block", "told"),
    [
        (1, {"zero_optimization": {"round_robin_gradients": True}}, "computes with other weights than its masters"),
        (2, {"zero_optimization": {"round_robin_gradients": True}}, "computes with other weights than its masters"),
    ],
    ids=str,
)
def test_settings_of_deepspeed_that_would_train_something_else_in_silence_are_refused(zero, block, told):
    def work(mesh):
        try:
            start(mesh, (zero, "fp32"), deepspeed=block, clip=0.0)
        except Fault as fault:
            return str(fault)
        return "not refused"

    for line in on_ranks(2, work):
        assert told in line


@pytest.mark.parametrize(
    ("zero", "block"),
    [
        (1, {"offload_optimizer": {"device": "cpu"}}),
        (2, {"contiguous_gradients": False, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}),
        (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
        (3, {"zero_hpz_partition_size": 2}),
        (3, SCATTERED["zero_optimization"]),
    ],
    ids=str,
)
def test_settings_of_deepspeed_that_only_change_where_things_lie_change_no_result(zero, block):
    def work(mesh):
        results, told = [], []
        for extra in ({}, {"zero_optimization": block}):
            engine = start(mesh, (zero, "fp32"), deepspeed=extra, micro_batch=3)
            results.append([r.loss for r in tiny.take_steps(engine, mesh, 0, 3, number=WINDOWS)])
            told.append(tiny.fragments(engine))
        return results, told

    of_ranks = on_ranks(2, work)
    plain, other = (tiny.join([one[1][number] for one in of_ranks]) for number in (0, 1))
    assert of_ranks[0][0][0] == pytest.approx(of_ranks[0][0][1], abs=2e-6)
    for name in plain:
        assert (plain[name] - other[name]).abs().max() < 2e-6, name


@pytest.mark.parametrize(("ranks", "tensor", "zero"), [(2, 1, 0), (2, 2, 1), (2, 2, 3), (4, 2, 0), (4, 4, 2)])
def test_a_copy_that_differs_in_one_bit_is_found_on_the_ranks_that_hold_it(ranks, tensor, zero):
    settings = dataclasses.replace(tiny.LLAMA, heads=4, kv_heads=2, head_width=6)
    model = partial(build, settings, "Model", choose(Settings(), torch.device("cpu")))
    names = ["norm.weight"] if tensor == 2 else ["norm.weight", "blocks.1.attention.key.weight"]

    def work(mesh):
        engine = tiny.start_engine(mesh, zero=zero, model=model)
        tiny.take_steps(engine, mesh, 0, 2)
        told = [engine.differing_copies()]
        for name in names:
            for piece in engine.masters.pieces:
                if piece.name == name and mesh.rank == mesh.size - 1:
                    piece.values[-1:].view(torch.int32).bitwise_xor_(1)
            told.append(engine.masters.differing_copies())
        return told

    told = on_ranks(ranks, work, tensor=tensor)
    assert [one[0] for one in told] == [[]] * ranks
    assert names[0] in told[-1][1] and names[-1] in told[-1][-1]
    if tensor == 4:  # the first two ranks have another key head
        assert [names[-1] in one[-1] for one in told] == [False, False, True, True]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout[0] < 3], ids=str)
def test_weights_of_replicas_that_differ_in_one_bit_are_found(layout):
    def work(mesh):
        engine = start(mesh, layout)
        tiny.take_steps(engine, mesh, 0, 2, number=WINDOWS)
        told = [engine.differing_copies()]
        if mesh.rank == mesh.size - 1:
            weights = dict(engine._model.named_parameters())["norm.weight"].data
            weights[-1:].view(torch.int16 if layout[1] == "bf16" else torch.int32).bitwise_xor_(1)
        return [*told, engine.differing_copies()]

    assert on_ranks(3, work) == [[[], ["norm.weight"]]] * 3


@pytest.mark.parametrize(("tensor", "zero"), [(1, 0), (2, 1), (2, 3)])
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_moments_that_differ_in_one_bit_are_found(tensor, zero, moment):
    settings = dataclasses.replace(tiny.LLAMA, heads=4, kv_heads=2, head_width=6)
    model = partial(build, settings, "Model", choose(Settings(), torch.device("cpu")))

    def work(mesh):
        engine = tiny.start_engine(mesh, zero=zero, model=model)
        tiny.take_steps(engine, mesh, 0, 2)
        told = [engine.differing_copies()]
        for piece in engine.masters.pieces:
            if piece.name == "norm.weight" and mesh.rank == 1:
                piece.moments[moment][-1:].view(torch.int32).bitwise_xor_(1)
        return [*told, engine.differing_copies()]

    assert on_ranks(2, work, tensor=tensor) == [[[], ["norm.weight"]]] * 2
