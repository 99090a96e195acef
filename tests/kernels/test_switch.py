"""The switch: which twin serves, and what it says of that."""

from __future__ import annotations

import logging

import pytest
import torch

from cpt_kernels import Settings, attention, choose, cross_entropy, language, rms_norm, rotary, switch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPERATIONS = {"attention", "rms_norm", "layer_norm", "rotary", "swiglu", "gelu", "cross_entropy", "adamw"}


@pytest.fixture
def hopper(monkeypatch):
    """As if there were a GPU: to be asked, not to be used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    monkeypatch.setattr(language, "IS_INTERPRETED", False)
    monkeypatch.setattr(language, "triton", language.triton or torch)
    for file in switch._OPERATIONS.values():
        monkeypatch.setattr(file, "check", lambda device: None, raising=False)


def test_every_operation_is_served_and_told():
    kernels = choose(Settings(), CPU)
    assert set(kernels.told) == OPERATIONS
    assert all(kernels.told.values())


def test_on_a_cpu_nothing_goes_through_triton_unasked():
    assert not any(told.startswith("triton") for told in choose(Settings(), CPU).told.values())


def test_a_twin_that_is_asked_for_serves():
    kernels = choose(Settings(attention="torch", cross_entropy="chunked"), CPU)
    assert kernels.attention is attention.fused
    assert kernels.linear_cross_entropy is cross_entropy.chunked
    assert kernels.told["attention"] == "torch (asked for)"


def test_all_plain_overrides_every_single_choice():
    kernels = choose(Settings(all="plain", attention="torch"), CPU)
    assert kernels.attention is attention.plain
    assert kernels.rms_norm is rms_norm.plain
    assert all(told == "plain (asked for)" for told in kernels.told.values())


def test_all_triton_takes_the_twins_of_triton_where_there_are(hopper):
    kernels = choose(Settings(all="triton", attention="torch", adamw="plain"), CUDA)
    for operation, file in switch._OPERATIONS.items():
        told = kernels.told[operation]
        assert told == "triton (asked for)" or "triton" not in file.TWINS
    assert kernels.attention is attention.triton and kernels.rotary is rotary.triton


def test_unknown_twins_are_told_all_at_once_with_the_known_ones():
    with pytest.raises(ValueError) as raised:
        choose(Settings(attention="flash9", all="torch"), CPU)
    assert str(raised.value).splitlines() == [
        "kernels.attention = flash9 is not known; use auto, plain, torch, triton, cudnn, flash, flex",
        "kernels.all = torch is not known; use auto, plain, triton",
    ]


def test_twins_that_cannot_serve_here_are_told_all_at_once_with_those_that_can(monkeypatch):
    monkeypatch.setattr(language, "IS_INTERPRETED", False)
    monkeypatch.setattr(language, "triton", language.triton or torch)
    with pytest.raises(ValueError) as raised:
        choose(Settings(attention="triton", rotary="triton"), CPU)
    assert str(raised.value).splitlines() == [
        "kernels.attention = triton cannot serve on cpu: Triton has no cpu; use auto, plain or torch",
        "kernels.rotary = triton cannot serve on cpu: Triton has no cpu; use auto or plain",
    ]
    assert Settings(all="triton").faults_on(CPU) == [
        "all = triton cannot serve on cpu: Triton has no cpu; use auto or plain"
    ]
    assert Settings(all="plain", attention="triton").faults_on(CPU) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("triton", None), "Triton is not installed"),
        (("capability", (7, 5)), "the GPU is older than sm_80"),
        (("is_available", False), "there is no GPU"),
    ],
)
def test_what_keeps_triton_from_a_gpu_is_told(hopper, monkeypatch, change, reason):
    name, value = change
    if name == "triton":
        monkeypatch.setattr(language, "triton", value)
    elif name == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: value)
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: value)
    (line,) = Settings(rotary="triton").faults_on(CUDA)
    assert line == f"rotary = triton cannot serve on cuda: {reason}; use auto or plain"
    assert choose(Settings(), CUDA).told["rotary"] == f"plain ({reason})"


def test_on_a_gpu_what_passes_its_check_serves(hopper):
    kernels = choose(Settings(), CUDA)
    assert kernels.attention is attention.triton_in_documents
    assert kernels.rotary is rotary.triton
    assert kernels.told["attention"].startswith("triton within documents (flash-attn is not installed), torch")
    assert kernels.here.startswith("A GPU, sm_90, ")


@pytest.mark.parametrize("way", ["tells", "raises"])
def test_on_a_gpu_what_fails_its_check_is_replaced_and_warned_of(hopper, way, monkeypatch, caplog):
    def check(device: torch.device) -> str:
        if way == "tells":
            return "output in bfloat16 is off by 3.0e-01 of its largest entry"
        raise RuntimeError("output in bfloat16 is off by 3.0e-01 of its largest entry\nand a long trace")

    monkeypatch.setattr(attention, "check", check)
    monkeypatch.setattr(rotary, "check", check)
    with caplog.at_level(logging.WARNING):
        kernels = choose(Settings(), CUDA)
    assert kernels.attention is attention.fused and kernels.rotary is rotary.plain
    told = ("" if way == "tells" else "RuntimeError: ") + "output in bfloat16 is off by 3.0e-01 of its largest entry"
    assert [record.getMessage() for record in caplog.records] == [
        f"kernels.{name}: Triton's twin is not used, it failed its check on cuda: {told}"
        for name in ("attention", "rotary")
    ]
    assert kernels.told["attention"] == f"torch (Triton's twin failed its check here: {told})"


def _raises(*inputs):
    raise ImportError("undefined symbol: _ZN3c10\nand a long trace")


FLASHES = {"raises": _raises, "wrong": lambda *inputs: 1.1 * attention.plain(*inputs), "right": attention.plain}
TOLD_OF_FLASHES = {
    "raises": "ImportError: undefined symbol: _ZN3c10",
    "wrong": "output in bfloat16 is off by 1.0e-01 of its largest entry, in heads of 64 entries",
}


@pytest.fixture(params=FLASHES)
def flash(hopper, request, monkeypatch):
    """As if flash-attn were installed, to be tried on a CPU: that which raises, that which is wrong, the right one."""
    tried = attention.PREFERRED[attention.flash_in_documents][1]
    monkeypatch.setattr(attention, "flash", FLASHES[request.param])
    monkeypatch.setitem(attention.WHY_NOT, "flash", lambda device: None)
    monkeypatch.setitem(attention.PREFERRED, attention.flash_in_documents, ("flash-attn", lambda device: tried(CPU)))
    return request.param


def test_flash_attn_serves_unasked_only_if_it_passes_its_check(flash, caplog):
    with caplog.at_level(logging.WARNING):
        kernels = choose(Settings(), CUDA)
    warned = [record.getMessage() for record in caplog.records]
    if flash == "right":
        assert kernels.attention is attention.flash_in_documents and warned == []
        assert kernels.told["attention"].startswith("flash within documents, torch")
        return
    fault = TOLD_OF_FLASHES[flash]
    assert kernels.attention is attention.triton_in_documents
    assert warned == [f"kernels.attention: flash-attn is not used, it failed its check on cuda: {fault}"]
    assert kernels.told["attention"].startswith(
        f"triton within documents (flash-attn failed its check here: {fault}), torch"
    )


@pytest.mark.parametrize("flash", ["raises", "wrong"], indirect=True)
@pytest.mark.parametrize("why", ["it fails its check", "it cannot run"])
def test_where_neither_flash_attn_nor_triton_will_do_torch_serves(flash, why, monkeypatch, caplog):
    if why == "it cannot run":
        monkeypatch.setattr(language, "triton", None)
    monkeypatch.setattr(attention, "check", lambda device: "output is off")
    with caplog.at_level(logging.WARNING):
        kernels = choose(Settings(), CUDA)
    warned = [record.getMessage() for record in caplog.records]
    assert kernels.attention is attention.fused
    assert warned[0].endswith(f"flash-attn is not used, it failed its check on cuda: {TOLD_OF_FLASHES[flash]}")
    if why == "it cannot run":
        assert len(warned) == 1 and "(Triton is not installed)" in kernels.told["attention"]
    else:
        assert warned[1].endswith("Triton's twin is not used, it failed its check on cuda: output is off")
        assert kernels.told["attention"] == "torch (Triton's twin failed its check here: output is off)"


def test_a_twin_that_is_asked_for_is_not_checked(hopper, monkeypatch):
    monkeypatch.setattr(rotary, "check", None)
    assert choose(Settings(rotary="triton"), CUDA).rotary is rotary.triton


def test_the_interpreter_serves_only_when_asked(hopper, monkeypatch, caplog):
    monkeypatch.setattr(language, "IS_INTERPRETED", True)
    kernels = choose(Settings(), CUDA)
    assert kernels.rotary is rotary.plain and kernels.attention is attention.fused
    assert kernels.told["rotary"] == "plain (Triton is interpreted, which is for tests)"
    assert caplog.records == []


def test_the_switch_makes_a_choice_for_a_gpu_where_there_is_none(monkeypatch):
    kernels = choose(Settings(), CUDA)
    assert kernels.attention in (attention.fused, attention.triton_in_documents, attention.flash_in_documents)


def test_what_there_is_is_told(monkeypatch):
    assert choose(Settings(), CPU).here.startswith("cpu, ")
    monkeypatch.setattr(language, "triton", None)
    assert choose(Settings(), CPU).here == "cpu, without Triton"
