"""Reptile under any ZeRO stage is Reptile on one device: same numbers, kept through checkpoints, on updates only.

`pytest -m "long or not long" tests/methods/test_reptile.py` tells the rows of the table of docs/LEARNING.md in the end.
"""

from __future__ import annotations

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.equality import name_of_mesh, short
from cpt_harness.ranks import on_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpt.checkpoint import Checkpoint
from cpt.config import Fault, build, read_settings
from cpt.methods import Seams, reptile
from cpt.progress import Progress
from cpt_kernels import Settings, choose

NUM_STEPS, EVERY, STEP_SIZE = 10, 3, 0.4
KEPT = ("anchor", "velocity")
TOLERANCE = 1e-6  # docs/LEARNING.md has what was measured
STAGES = (0, 1, 2, 3)


def method(every: int = EVERY, step_size: float = STEP_SIZE, **more) -> reptile.Method:
    return reptile.Method(reptile.Settings(every, step_size, **more))


def reference(
    every: int = EVERY, without: int | None = None, outer: dict | None = None, warmup_windows: int = 0
) -> dict:
    """Reptile as the paper has it, around plain torch on one device. `without`: a step whose update is left out.

    `outer`: settings of torch's SGD, which takes the outer step with the anchor's way back as its gradient (DiLoCo).
    """
    model = tiny.build_llama()
    model.initialise(tiny.SEED)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    anchor = [p.detach().clone() for p in model.parameters()]
    outside = [a.clone().requires_grad_() for a in anchor]
    sgd = torch.optim.SGD(outside, lr=STEP_SIZE, **outer) if outer else None
    losses, displacements, updates = [], [], 0
    for step in range(NUM_STEPS):
        tokens = tiny.windows_of_step(step)
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = tiny.rate_of_step(step)
        if step != without:
            optimizer.step()
            updates += 1
        optimizer.zero_grad()
        if step != without and updates % every == 0:
            with torch.no_grad():
                squares = sum(float((p - a).square().sum()) for p, a in zip(model.parameters(), anchor, strict=True))
                displacements.append(squares**0.5)
                windows = len(displacements) - 1
                share = STEP_SIZE if windows >= warmup_windows else 1 + (STEP_SIZE - 1) * windows / warmup_windows
                for parameter, old, out in zip(model.parameters(), anchor, outside, strict=True):
                    out.grad = old - parameter
                    parameter.copy_(old + share * (parameter - old))
                if sgd:
                    sgd.step()
                for parameter, old, out in zip(model.parameters(), anchor, outside, strict=True):
                    parameter.copy_(out if sgd else parameter)
                    old.copy_(parameter)
    return {
        "loss": losses,
        "displacement": displacements,
        "masters": {n: p.detach() for n, p in model.named_parameters()},
    }


def steps_told(engine, mesh, first: int, last: int) -> tuple[list[float], list[dict]]:
    losses, reports = [], []
    for step in range(first, last):
        losses.append(tiny.take_steps(engine, mesh, step, step + 1)[0].loss)
        reports.append(engine.report())
    return losses, reports


def assert_near(masters: dict, expected: dict) -> float:
    """The largest difference of any element."""
    assert masters.keys() == expected.keys()
    differences = {name: (masters[name] - expected[name]).abs().max().item() for name in expected}
    assert max(differences.values()) < TOLERANCE, differences
    return max(differences.values())


def row(mesh: str, ranks: int, of_stages: dict[int, float]) -> str:
    """Of the table; `of_stages` has for a ZeRO stage the largest difference of the masters."""
    stages = ", ".join(map(str, sorted(of_stages)))
    return f"| {mesh} | {ranks} | {stages} | {short(max(of_stages.values()))} |"


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_losses_masters_and_displacements_equal_those_of_the_unsharded_computation(ranks, tell):
    def work(mesh):
        told = []
        for zero in STAGES:
            for micro in (None, 2):  # with accumulation it must not act on a micro-batch
                engine = tiny.start_engine(mesh, zero=zero, micro_batch=micro, methods=[method()])
                told.append((*steps_told(engine, mesh, 0, NUM_STEPS), tiny.fragments(engine)))
        return told

    expected = reference()
    of_stages: dict[int, float] = {}
    for index, of_ranks in enumerate(zip(*on_ranks(ranks, work, 300.0), strict=True)):
        for losses, reports, _ in of_ranks:
            assert losses == pytest.approx(expected["loss"], abs=TOLERANCE)
            told = [report["method/reptile/displacement"] for report in reports if report]
            assert told == pytest.approx(expected["displacement"], rel=1e-5)
            assert [step for step, report in enumerate(reports) if report] == [2, 5, 8]
            assert reports[2]["method/reptile/kept"] == pytest.approx(STEP_SIZE, rel=1e-5)
        difference = assert_near(tiny.join([fragments for _, _, fragments in of_ranks]), expected["masters"])
        of_stages[STAGES[index // 2]] = max(difference, of_stages.get(STAGES[index // 2], 0.0))
    tell(row("data, a Llama against plain torch, with and without accumulation", ranks, of_stages))


class ExactGradients(nn.Module):
    """Loss and gradients are the same however they are summed: it is linear in the weights, its factors have few bits.

    They are another in each step, which the tokens tell; those are the same in all windows, of 16 positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(31, 7))
        self.bias = nn.Parameter(torch.empty(5))
        self.one_norm = nn.Parameter(torch.empty(1))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        products = [p * self.factors(p.shape, int(tokens[0, 0])) for p in self.parameters()]
        return sum(product.sum() for product in products) + torch.zeros(tokens.shape)

    @staticmethod
    def factors(shape: torch.Size, step: int) -> torch.Tensor:
        numbers = torch.arange(shape.numel())
        return (((numbers * 7 + step * 5) % 16 - 8) / 16 + 1 / 32).reshape(shape)

    def initial_value(self, name: str, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + len(name))
        return torch.empty(self.shapes[name]).normal_(0.0, 1.0, generator=generator)

    def decays(self, name: str) -> bool:
        return not name.endswith("norm")


def exact_reference() -> dict[str, torch.Tensor]:
    """AdamW and Reptile on whole parameters, by torch."""
    model = ExactGradients()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(model.initial_value(name, tiny.SEED))
    groups = [
        {"params": [p for n, p in model.named_parameters() if model.decays(n) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    anchor = [p.detach().clone() for p in model.parameters()]
    for step in range(NUM_STEPS):
        for parameter in model.parameters():
            parameter.grad = model.factors(parameter.shape, step)
        for group in optimizer.param_groups:
            group["lr"] = tiny.rate_of_step(step)
        optimizer.step()
        if (step + 1) % EVERY == 0:
            for parameter, old in zip(model.parameters(), anchor, strict=True):
                old.copy_(torch.lerp(old, parameter.detach(), STEP_SIZE))
                parameter.data.copy_(old)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_where_gradients_are_exact_so_are_the_masters_to_the_bit(ranks, tell):
    """What is left between meshes elsewhere is the order of sums in the gradients, nothing of the outer step."""

    def work(mesh):
        told = []
        for zero in STAGES:
            engine = tiny.start_engine(mesh, zero=zero, model=ExactGradients, clip=0.0, methods=[method()])
            here = 8 // mesh.size
            for step in range(NUM_STEPS):
                tokens, sources = torch.full((here, 17), step), torch.arange(here) % 2
                engine.step(tokens, sources, 2, tiny.rate_of_step(step), Progress(step=step, stage_step=step))
            told.append(tiny.fragments(engine))
        return told

    expected = exact_reference()
    for zero, of_ranks in zip(STAGES, zip(*on_ranks(ranks, work), strict=True), strict=True):
        masters = tiny.join(of_ranks)
        for name in expected:
            assert torch.equal(masters[name], expected[name]), (name, zero)
    tell(row("data, gradients that are exact however they are summed", ranks, dict.fromkeys(STAGES, 0.0)))


MESHES = [(2, {"tensor": 2}, (0, 1, 3)), (2, {"pipeline": 2}, (0, 1)), (4, {}, (0, 2, 3)), (2, {"sequence": 2}, (2,)),
          (4, {"pipeline": 2, "tensor": 2}, (1,)), (4, {"tensor": 2}, (1, 2))]  # fmt: skip
# The other ZeRO stages of each, and what is left of the table.
MORE = [(2, {"tensor": 2}, (2,)), (4, {"tensor": 2}, (0, 3)), (4, {"pipeline": 2}, (0, 1)), (4, {}, (1,)),
        (2, {"sequence": 2}, (0, 1, 3)), (4, {"pipeline": 2, "tensor": 2}, (0,))]  # fmt: skip


@pytest.mark.parametrize("case", [*MESHES, *(pytest.param(one, marks=pytest.mark.long) for one in MORE)], ids=str)
def test_on_every_mesh_it_is_the_unsharded_computation(case, tell):
    ranks, axes, stages = case
    settings = dataclasses.replace(tiny.LLAMA, heads=4, kv_heads=2, head_width=6)

    def make():
        return build(settings, "Model", choose(Settings(), torch.device("cpu")))

    def work(mesh):
        told = []
        for zero in stages:
            engine = tiny.start_engine(mesh, zero=zero, micro_batch=2, methods=[method()], model=make, epsilon=1e-4)
            told.append((*steps_told(engine, mesh, 0, NUM_STEPS), tiny.fragments(engine)))
        return told

    ((losses, reports, fragments), *_) = on_ranks(1, work)[0]
    of_stages: dict[int, float] = {}
    for zero, of_ranks in zip(stages, zip(*on_ranks(ranks, work, **axes), strict=True), strict=True):
        for mine, told, _ in of_ranks:
            assert mine == pytest.approx(losses, abs=TOLERANCE)
            assert told == [pytest.approx(report, rel=1e-4) for report in reports]
        of_stages[zero] = assert_near(tiny.join([one for _, _, one in of_ranks]), tiny.join([fragments]))
    tell(row(name_of_mesh(ranks, axes), ranks, of_stages))


@pytest.mark.parametrize("outer", [{"momentum": 0.9}, {"momentum": 0.6, "nesterov": True}], ids=str)
def test_with_momentum_it_is_the_outer_step_of_torchs_sgd_and_goes_on_on_another_mesh(tmp_path, outer):
    def leave(mesh):
        engine = tiny.start_engine(mesh, zero=1, methods=[method(**outer)])
        losses, _ = steps_told(engine, mesh, 0, 5)
        engine.save(tmp_path / "left", {})
        return losses

    def go_on(mesh):
        engine = tiny.start_engine(mesh, zero=3, methods=[method(**outer)], fill=False)
        engine.load(Checkpoint(tmp_path / "left"), with_optimizer=True, with_methods=True)
        return *steps_told(engine, mesh, 5, NUM_STEPS), tiny.fragments(engine)

    expected = reference(outer=outer)
    assert on_ranks(2, leave)[0] == pytest.approx(expected["loss"][:5], abs=TOLERANCE)
    of_ranks = on_ranks(1, go_on)
    assert of_ranks[0][0] == pytest.approx(expected["loss"][5:], abs=TOLERANCE)
    assert_near(tiny.join([fragments for *_, fragments in of_ranks]), expected["masters"])


def test_the_warm_up_keeps_all_of_the_first_window_and_less_of_each_after():
    def work(mesh):
        engine = tiny.start_engine(mesh, methods=[method(warmup_windows=2)])
        return *steps_told(engine, mesh, 0, NUM_STEPS), tiny.fragments(engine)

    ((losses, reports, fragments),) = on_ranks(1, work)
    kept = [report["method/reptile/kept"] for report in reports if report]
    assert kept == pytest.approx([1.0, 0.7, 0.4], rel=1e-5)
    expected = reference(warmup_windows=2)
    assert losses == pytest.approx(expected["loss"], abs=TOLERANCE)
    assert_near(tiny.join([fragments]), expected["masters"])


def test_a_stage_begins_with_a_new_anchor_where_that_is_asked_for():
    def work(mesh):
        told = []
        for reset in ("never", "at_stage_start"):
            one = method(momentum=0.5, reset_anchor=reset)
            engine = tiny.start_engine(mesh, methods=[one])
            first = steps_told(engine, mesh, 0, 4)[1]
            engine.end_stage(Progress(step=4))
            begins_at = tiny.fragments(engine)
            second = steps_told(engine, mesh, 4, 5)[1]
            kept = {name: tiny.fragments_of(engine.masters.pieces, one.state_dict()[name]) for name in KEPT}
            second += steps_told(engine, mesh, 5, 8)[1]
            windows_end = [step for step, report in enumerate(first + second) if report]
            told.append((windows_end, begins_at, kept["anchor"], kept["velocity"]))
        return told

    (of_settings,) = on_ranks(1, work)
    (never, *_, old_velocity), (at_start, begins_at, anchor, velocity) = of_settings
    assert never == [2, 5] and at_start == [2, 6]
    begins_at, anchor = tiny.join([begins_at]), tiny.join([anchor])
    assert all(torch.equal(anchor[name], begins_at[name]) for name in begins_at)
    assert all(bool(values.any()) for values in tiny.join([old_velocity]).values()), "there is something to lose"
    assert not any(bool(values.any()) for values in tiny.join([velocity]).values())


def test_an_anchor_in_host_memory_is_the_same_method():
    """Of the setting: on a CPU the anchor lies in host memory either way, so that only a GPU could show the copying."""

    def work(mesh):
        engine = tiny.start_engine(mesh, methods=[method(anchor_on="host", momentum=0.5)])
        on_host = steps_told(engine, mesh, 0, 6)
        engine = tiny.start_engine(mesh, methods=[method(momentum=0.5)])
        return [on_host, steps_told(engine, mesh, 0, 6)]

    ((on_host, on_device),) = on_ranks(1, work)
    assert on_host == on_device


def test_pieces_longer_than_what_is_moved_at_once_are_moved_whole(monkeypatch):
    def work(mesh):
        told = []
        for at_once in (2**22, 7):
            monkeypatch.setattr(reptile, "_ELEMENTS_AT_ONCE", at_once)
            engine = tiny.start_engine(mesh, methods=[method(momentum=0.5)])
            tiny.take_steps(engine, mesh, 0, 4)
            told.append(tiny.fragments(engine))
        return told

    ((whole, in_parts),) = on_ranks(1, work)
    assert all(torch.equal(one[3], other[3]) for one, other in zip(whole, in_parts, strict=True))


class Allocations(TorchDispatchMode):
    """Bytes of tensors that operations have made and that are still there: `most` of them at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.most = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((arguments, named)) if isinstance(t, torch.Tensor)}
        out = function(*arguments, **(named or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                number = made.untyped_storage().nbytes()
                self.here += number
                self.most = max(self.most, self.here)
                weakref.finalize(made, self._let_go, number)
        return out

    def _let_go(self, number: int) -> None:
        self.here -= number


@pytest.mark.parametrize("more", [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}], ids=str)
def test_an_outer_step_takes_no_memory_of_the_anchors_size(monkeypatch, more):
    at_once, number = 64, 10_000
    monkeypatch.setattr(reptile, "_ELEMENTS_AT_ONCE", at_once)
    one, values = method(1, **more), torch.randn(number)
    masters = SimpleNamespace(pieces=[SimpleNamespace(values=values)], total=sum)
    with Allocations() as first:
        one.before_update(masters, Progress())
    copies = one.num_copies
    assert copies * values.nbytes <= first.most < copies * values.nbytes + 100, "the mode sees what is allocated"
    values.add_(1.0)
    with Allocations() as then:
        assert one.after_update(masters, Progress())
    assert 2 * at_once * 4 <= then.most < (3 if more.get("nesterov") else 2) * at_once * 4 + 100
    assert one.report()["method/reptile/displacement"] == pytest.approx(number**0.5, rel=1e-5)


@pytest.mark.parametrize(("step_size", "momentum", "is_told"), [(0.1, 0.0, True), (0.3, 0.0, False), (0.1, 0.9, False)])
def test_a_step_size_that_stalls_learning_is_warned_of(caplog, step_size, momentum, is_told):
    method(500, step_size, momentum=momentum).meet(None, None, None, None)
    told = "reptile.step_size = 0.1 keeps 10% of what each window of 500 updates has learned: learning all but stops"
    assert (told in caplog.text) == is_told


class LosesItsStep:
    """The published way, on a stand-in: bf16 weights are interpolated, the optimiser's fp32 masters are not."""

    def __init__(self, start: torch.Tensor) -> None:
        self.masters = start.clone()
        self.weights = start.bfloat16()

    def update(self, gradient: torch.Tensor) -> None:
        self.masters -= gradient
        self.weights = self.masters.bfloat16()


def test_the_published_code_loses_its_outer_step_with_the_next_update():
    """So that nobody interpolates the weights that the model computes with: see cpt/parallel/weights.py."""
    stand_in = LosesItsStep(torch.zeros(100))
    anchor = stand_in.weights.clone()
    for _ in range(3):
        stand_in.update(torch.full((100,), -1.0))
    stand_in.weights = torch.lerp(anchor, stand_in.weights, 0.1)
    assert (stand_in.weights - 0.3).abs().max() < 0.01  # for one forward and backward pass
    stand_in.update(torch.full((100,), -1.0))
    assert (stand_in.weights == 4.0).all()  # and not 1.3: as if it had never been


def test_it_matters():
    plain, other = reference(every=NUM_STEPS + 1), reference()
    differences = [float((plain["masters"][name] - other["masters"][name]).abs().max()) for name in plain["masters"]]
    assert min(differences) > 100 * TOLERANCE


@pytest.mark.parametrize(("left_at", "warmup"), [(2, 0), (4, 2)])  # the latter within the second of the warm-up
def test_a_run_taken_up_in_the_middle_of_a_window_on_another_mesh_and_stage_goes_on_the_same(tmp_path, left_at, warmup):
    def leave(mesh):
        engine = tiny.start_engine(mesh, zero=1, methods=[method(warmup_windows=warmup)])
        tiny.take_steps(engine, mesh, 0, left_at)
        engine.save(tmp_path / "left", {})

    def go_on(mesh):
        told = []
        for zero in (0, 3):
            engine = tiny.start_engine(mesh, zero=zero, methods=[method(warmup_windows=warmup)], fill=False)
            engine.load(Checkpoint(tmp_path / "left"), with_optimizer=True, with_methods=True)
            told.append((*steps_told(engine, mesh, left_at, NUM_STEPS), tiny.fragments(engine)))
        return told

    on_ranks(2, leave)
    expected = reference(warmup_windows=warmup)
    for ranks in (1, 4):
        for of_ranks in zip(*on_ranks(ranks, go_on), strict=True):
            assert of_ranks[0][0] == pytest.approx(expected["loss"][left_at:], abs=TOLERANCE)
            assert_near(tiny.join([fragments for _, _, fragments in of_ranks]), expected["masters"])


class Poison(Seams):
    """Makes the gradient of step 1 not finite."""

    def after_forward(self, forward):
        return forward.losses.mean() * float("nan") if forward.progress.step == 1 else None


def test_a_skipped_update_does_not_count():
    def work(mesh):
        told = []
        for zero in STAGES:
            engine = tiny.start_engine(mesh, zero=zero, methods=[Poison(reptile.Settings()), method()])
            losses, reports = steps_told(engine, mesh, 0, NUM_STEPS)
            told.append((losses, reports, tiny.fragments(engine)))
        return told

    expected = reference(without=1)
    for of_ranks in zip(*on_ranks(2, work), strict=True):
        losses, reports, _ = of_ranks[0]
        assert [step for step, report in enumerate(reports) if report] == [3, 6, 9]
        assert losses == pytest.approx(expected["loss"], abs=TOLERANCE)
        assert_near(tiny.join([fragments for *_, fragments in of_ranks]), expected["masters"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"every": 0}, "every = 0: at least 1 update in a window"),
        ({"step_size": 0}, r"step_size = 0.0: above 0 \(keep nothing\) and at most 1 \(keep all\)"),
        ({"step_size": 1.5}, "step_size = 1.5: above 0"),
        ({"warmup_windows": -1}, "warmup_windows = -1: at least 0"),
        ({"momentum": 1}, "momentum = 1.0: at least 0 and below 1"),
        ({"nesterov": True}, "nesterov: true needs a momentum above 0, such as 0.9"),
    ],
    ids=str,
)
def test_settings_that_are_no_interpolation_are_faults(settings, told):
    with pytest.raises(Fault, match=told):
        read_settings(reptile.Settings, settings)
