"""Triton's attention against its plain definition in float64, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from cpt_harness.twins import DEVICES, assert_same_with_gradients, random
from torch import Tensor

from cpt_kernels import Documents, attention, attention_kernels, attention_triton
from cpt_kernels.language import IS_INTERPRETED, why_not

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICE = torch.device("cpu" if IS_INTERPRETED or not torch.cuda.is_available() else "cuda")
# Blocks are 32 x 16 in the interpreter, up to 128 x 128 on a GPU.
STRETCH = 1 if DEVICE.type == "cpu" else 8
here = pytest.mark.skipif(bool(why_not(DEVICE)), reason=str(why_not(DEVICE)))
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="looks into kernels, which only the interpreter lets us")
pytestmark = here


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated is filled with NaN: an entry that no kernel has written is then seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def documents_of(lengths: list[int], num_windows: int = 1) -> Documents:
    starts = torch.zeros(sum(lengths), dtype=torch.bool)
    starts[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    return Documents.from_starts(starts.view(num_windows, -1))


def heads(windows: int, positions: int, heads: int, groups: int, width: int) -> list[Tensor]:
    shapes = [(windows, positions, heads, width), *[(windows, positions, groups, width)] * 2]
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def assert_same(inputs: list[Tensor], documents: Documents | None, dtype: torch.dtype, device=DEVICE) -> None:
    documents = documents and documents.to(device)
    assert_same_with_gradients(
        lambda *x: attention.triton(*x, documents), lambda *x: attention.plain(*x, documents), inputs, dtype, device
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[37], [37 - 20, 1, 19]], ids=["whole", "documents"])
def test_grouped_heads_of_an_odd_window(lengths, dtype):
    lengths = [length * STRETCH for length in lengths]
    assert_same(heads(1, sum(lengths), 4, 2, 24), documents_of(lengths), dtype)


@pytest.mark.parametrize("width", [1, 16, 64, 80, 128, 256])
def test_heads_of_every_width(width):
    assert_same(heads(1, 21, 2, 1, width), documents_of([14, 7]), torch.float32)


# Blocks of 32 queries by 16 keys, and of 32 keys by 16 queries; times STRETCH no smaller than a GPU's.
PACKED = {
    "a whole block": [32 * STRETCH],
    "one more": [32 * STRETCH + 1],
    "ends of blocks": [16 * STRETCH, 16 * STRETCH, 32 * STRETCH, 32 * STRETCH],
    "inside a block": [3 * STRETCH, 5 * STRETCH, 2 * STRETCH, 6 * STRETCH, 30 * STRETCH],
    "long ones": [50 * STRETCH, 61 * STRETCH, 2],
    "long after short": [1] * 7 + [70 * STRETCH],
    "a window of padding": [48 * STRETCH] + [1] * 48 * STRETCH,
    "two windows": [30 * STRETCH, 10 * STRETCH, 7 * STRETCH, 33 * STRETCH],
    "three windows, one of them whole": [1, 41 * STRETCH - 1, 20 * STRETCH, 21 * STRETCH, 41 * STRETCH],
}


@pytest.mark.parametrize("packed", PACKED)
def test_documents_wherever_they_begin(packed):
    lengths = PACKED[packed]
    num_windows = {"a window of padding": 2, "two windows": 2, "three windows, one of them whole": 3}.get(packed, 1)
    documents = documents_of(lengths, num_windows)
    assert_same(heads(*documents.positions.shape, 1, 1, 8), documents, torch.float32)


@pytest.mark.parametrize("lengths", [[1], [1] * 35], ids=["one position", "one token each"])
def test_a_token_that_sees_itself_alone_takes_its_own_value(lengths):
    documents = documents_of([*lengths, 2]).to(DEVICE)
    queries, keys, values = (x.float().to(DEVICE).requires_grad_() for x in heads(1, len(lengths) + 2, 1, 1, 8))
    mixed = attention.triton(queries, keys, values, documents)[:, :-2]
    assert torch.equal(mixed, values[:, :-2])
    of_queries, of_keys, of_values = torch.autograd.grad(mixed.square().sum(), (queries, keys, values))
    torch.testing.assert_close(of_values[:, :-2], 2 * values[:, :-2])
    assert max(of_queries.abs().max(), of_keys.abs().max()) < 1e-5 and not of_values[:, -2:].any()


def test_a_window_of_one_token():
    inputs = [x.float().to(DEVICE) for x in heads(2, 1, 2, 1, 8)]
    assert torch.equal(attention.triton(*inputs), inputs[2].expand(2, 1, 2, 8))


def test_without_documents():
    assert_same(heads(2, 51 * STRETCH, 3, 1, 8), None, torch.float32)


@pytest.mark.parametrize("laid", ["as one tensor", "heads first", "entries apart", "backwards broadcast"])
def test_inputs_wherever_they_lie(laid):
    documents = documents_of([20, 17]).to(DEVICE)

    def parts(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if laid == "as one tensor":  # [B, S, H + 2 G, K]
            return fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
        if laid == "heads first":  # [B, H + 2 G, S, K]
            return tuple(x.transpose(1, 2) for x in fused.transpose(1, 2).contiguous().split([4, 2, 2], dim=1))
        if laid == "entries apart":
            return tuple(fused.mT.contiguous().mT.split([4, 2, 2], dim=2))
        return fused[:, :, :4], fused[:, :1, 4:6].expand(-1, 37, -1, -1), fused[:, :, 6:]

    assert_same_with_gradients(
        lambda x: attention.triton(*parts(x), documents),
        lambda x: attention.plain(*parts(x), documents),
        [random(1, 37, 8, 8, seed=1)],
        torch.float32,
        DEVICE,
    )


def test_a_gradient_that_is_one_number_for_all():
    inputs = [x.float().to(DEVICE).requires_grad_() for x in heads(1, 20, 2, 1, 8)]
    expected = [x.detach().double().requires_grad_() for x in inputs]
    attention.triton(*inputs).sum().backward()
    attention.plain(*expected).sum().backward()
    for mine, theirs in zip(inputs, expected, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:overflow")  # in blocks of hidden scores, which are dropped
def test_scores_too_large_for_their_powers():
    documents = documents_of([1, 20, 16]).to(DEVICE)
    queries, keys, values = (x.to(DEVICE) for x in heads(1, 37, 2, 1, 8))
    inputs = [x.requires_grad_() for x in (queries.float() * 8, keys.float() * 8, values.float())]
    expected = [x.detach().double().requires_grad_() for x in inputs]
    assert (inputs[0].detach() * inputs[1].detach()).sum(-1).max() / 8**0.5 > 100  # and exp(100) is no fp32
    for serving, tensors in ((attention.triton, inputs), (attention.plain, expected)):
        serving(*tensors, documents).square().sum().backward()
    for mine, theirs in zip(inputs, expected, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=2e-4 * theirs.grad.abs().max().item())


def test_the_same_bits_every_time():
    documents = documents_of([20, 37, 7]).to(DEVICE)
    results = []
    for _ in range(2):
        inputs = [x.float().to(DEVICE).requires_grad_() for x in heads(1, 64, 4, 2, 16)]
        mixed = attention.triton(*inputs, documents)
        mixed.square().sum().backward()
        results.append([mixed, *(x.grad for x in inputs)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_documents_see_nothing_of_one_another():
    documents = documents_of([20, 25, 7]).to(DEVICE)
    inputs = [x.float().to(DEVICE) for x in heads(1, 52, 2, 1, 8)]
    changed = [x.clone() for x in inputs]
    for tensor in changed:
        tensor[:, 20:45] += 1e4
    once, again = attention.triton(*inputs, documents), attention.triton(*changed, documents)
    assert torch.equal(once[:, :20], again[:, :20]) and torch.equal(once[:, 45:], again[:, 45:])
    assert (again[:, 20:45] > 9e3).all()


@interpreted
@pytest.mark.parametrize(
    ("lengths", "masked", "whole"),
    [
        # 8 blocks of keys of 16, 4 of queries of 32: a query block meets two on the diagonal and all before it.
        (None, 4 * 2, 0 + 2 + 4 + 6),
        ([128], 4 * 2, 0 + 2 + 4 + 6),
        # As many windows of the same length.
        ([32, 32, 32, 32], 4 * 2, 0),
        ([64, 64], 4 * 2, 0 + 2 + 0 + 2),
        # The second document begins in the middle of the third block of queries, which sees both.
        ([80, 48], 4 * 2 + 4 - 2 + 2, 0 + 2 + 0 + 1),
    ],
)
def test_blocks_that_are_met_follow_the_documents_and_few_are_masked(lengths, masked, whole, monkeypatch):
    met = []
    absorb = attention_kernels._absorb

    def watched(*arguments):
        met.append(arguments[-2])
        return absorb(*arguments)

    monkeypatch.setattr(attention_kernels, "_absorb", watched)
    documents = None if lengths is None else documents_of(lengths)
    attention.triton(*(x.float() for x in heads(1, 128, 1, 1, 8)), documents)
    assert (sum(met), len(met) - sum(met)) == (masked, whole)


def test_windows_of_one_document_have_the_same_bits_as_without():
    inputs = [x.float().to(DEVICE) for x in heads(2, 40, 2, 1, 8)]
    documents = documents_of([40, 40], 2).to(DEVICE)
    assert torch.equal(attention.triton(*inputs, documents), attention.triton(*inputs))
    assert "begins" not in vars(documents)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 8), (torch.float32, 257)])
def test_what_the_kernels_are_not_made_for_is_left_to_torch(dtype, width):
    inputs = [x.to(dtype).to(DEVICE) for x in heads(1, 20, 2, 1, width)]
    documents = documents_of([15, 5]).to(DEVICE)
    assert torch.equal(attention.triton(*inputs, documents), attention.fused(*inputs, documents))


def test_to_torch_it_is_an_operation_with_a_gradient_that_it_can_trace():
    documents = documents_of([12, 8]).to(DEVICE)
    inputs = [x.float().to(DEVICE).requires_grad_() for x in heads(1, 20, 2, 1, 4)]
    torch.library.opcheck(
        attention_triton.attend, (*inputs, documents.begins, documents.ends),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
    whole = torch.compile(attention.triton, backend="aot_eager", fullgraph=True)
    once = torch.autograd.grad(attention.triton(*inputs).sum(), inputs)
    traced = torch.autograd.grad(whole(*inputs).sum(), inputs)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(once, traced, strict=True))


def test_unasked_it_serves_within_documents_where_it_was_checked(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "triton", lambda *x: seen.append("triton"))
    monkeypatch.setattr(attention, "fused", lambda *x: seen.append("torch"))
    documents = documents_of([15, 5])
    for dtype, width, given in [
        (torch.bfloat16, 64, documents), (torch.bfloat16, 80, documents), (torch.bfloat16, 256, documents),
        (torch.float32, 64, documents), (torch.bfloat16, 64, None), (torch.bfloat16, 64, documents_of([20])),
    ]:  # fmt: skip
        attention.triton_in_documents(*(x.to(dtype) for x in heads(1, 20, 2, 1, width)), given)
    assert seen == ["triton", "triton", "torch", "torch", "torch", "torch"]


def test_the_check_passes_and_tells_what_is_wrong(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(attention, "_POSITIONS_OF_A_CHECK", 33)
        monkeypatch.setattr(attention, "_WIDTHS_OF_A_CHECK", (64,))
    assert attention.check(DEVICE) is None
    right = attention.triton
    monkeypatch.setattr(attention, "triton", lambda *x: 1.1 * right(*x))
    fault = attention.check(DEVICE)
    assert fault.startswith("output in bfloat16 is off by") and fault.endswith("in heads of 64 entries")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("device", [device for device in DEVICES if device.id == "gpu"])
def test_real_sizes(device, width, dtype):
    lengths = [700, 1, 1347, 2048, 1024, 1024, 333, 3, 1712]
    assert_same(heads(4, 2048, 8, 2, width), documents_of(lengths, 4), dtype, device)
    assert_same(heads(2, 2047, 8, 8, width), None, dtype, device)
