"""From files and words to a `Run`, and back: what a child inherits, what may change when a run is taken up again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt.checkpoint import step_folder
from cpt.config import Fault, as_mapping, as_pairs, read_mapping, read_settings
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.huggingface.load import read_config
from cpt.models.growth import Growth
from cpt.run.settings import Run


def read_run(words: Sequence[str]) -> Run:
    """The run that YAML files and key=value words describe.

    A child takes the model, the sequence length and the kind of attention from its parent, where it says nothing else,
    and the held-out text that its parent scores, beside its own.
    Raises Fault with every mistake at once.
    """
    return run_of(read_mapping(words))


def run_of(mapping: dict[str, Any]) -> Run:
    """The run that one mapping of settings describes, as `read_run` does."""
    mapping = _with_limits_in_a_list(mapping)
    parent = mapping.get("parent")
    faults: list[str] = []
    try:
        mapping = _with_model_of_folder(mapping)
    except Fault as fault:
        faults.extend(fault.lines)
    if isinstance(parent, dict) and isinstance(parent.get("run"), str):
        try:
            mapping = _with_inherited(_settings_of(Path(os.path.expanduser(parent["run"]))), mapping)
        except Fault as fault:
            faults.extend(fault.lines)
    try:
        run = read_settings(Run, mapping)
    except Fault as fault:
        faults.extend(fault.lines)
    if faults:
        raise Fault(faults)
    return run


# What may change when a run is taken up again: it alters how a step is computed, not the order of the windows.
FREE_TO_CHANGE = (
    "output",
    "zero",
    "recompute",
    "compile",
    "mesh",
    "kernels",
    "evaluation",
    "stop_if",
    "bad_steps",
    "checkpoint",
    "loader",
    "log",
    "health",
    "watch",
    "deepspeed",
    "batch",
    "gate",
)


def _with_limits_in_a_list(mapping: dict[str, Any]) -> dict[str, Any]:
    """`stop_if: {forgetting: {source: en, above: 0.1}}` as a list of one, and so the other guard."""
    for name in ("stop_if", "raise_replay"):
        guards = mapping.get(name)
        if isinstance(guards, dict) and isinstance(guards.get("forgetting"), dict):
            mapping = {**mapping, name: {**guards, "forgetting": [guards["forgetting"]]}}
    return mapping


_NOTHING = ("0", "0.0", "0%", "None")  # ways to write a share of nothing


def _with_model_of_folder(mapping: dict[str, Any]) -> dict[str, Any]:
    """`model: {from: FOLDER, ...}` as the model that the folder's config.json describes; what else is said wins."""
    model = mapping.get("model")
    if not isinstance(model, dict) or "from" not in model:
        return mapping
    folder = Path(os.path.expanduser(str(model["from"])))
    name, settings = read_config(folder)
    said = {key: value for key, value in model.items() if key != "from"}
    more: dict[str, Any] = {"weights": str(folder)}
    if isinstance(said.get("vocabulary"), dict):
        more["growth"] = said["vocabulary"]
        growth = read_settings(Growth, said["vocabulary"], "model.vocabulary")
        said["vocabulary"] = Tokenizer.open(growth.grow_to).vocabulary_size
        if growth.train_new_rows_first:
            first_row = Tokenizer.open(folder).vocabulary_size
            waiting = {"name": "new_rows_first", "tokens": growth.train_new_rows_first, "first_row": first_row}
            more["methods"] = [waiting, *(mapping.get("methods") or [])]  # first: the others see what it has put back
    return {**mapping, **more, "model": {"name": name, **as_mapping(settings), **said}}


def _with_inherited(above: dict[str, Any], mapping: dict[str, Any]) -> dict[str, Any]:
    """A child's mapping with what it takes from its parent's; `model.longest_sequence=N` changes that one setting."""
    above = {**above, "model": model_after(above, _num_stages_before(mapping["parent"], above))}
    model = mapping.get("model")
    if isinstance(model, dict) and "name" not in model and isinstance(above.get("model"), dict):
        mapping = {**mapping, "model": {**above["model"], **model}}
    mapping = _with_held_out(above, mapping)
    return {**{key: above[key] for key in ("model", "sequence_length", "attention") if key in above}, **mapping}


def _with_held_out(above: dict[str, Any], mapping: dict[str, Any]) -> dict[str, Any]:
    """A child's mapping with the held-out text of its parent's, but for names that mean text of its own."""
    own = mapping.get("evaluation") or {}
    if not isinstance(own, dict) or own.get("inherit", True) is not True:
        return mapping
    theirs = above.get("evaluation") or {}
    # What a stage holds out the child cannot name as a corpus: it is the end of one.
    ends = {name: {"corpus": s["corpus"], "share": s["hold_out"]} for name, s in _sources_that_hold_out(above)}
    inherited = {"held_out": theirs.get("held_out") or {}, "ends": {**(theirs.get("ends") or {}), **ends}}
    taken = {name for name, _ in _sources_that_hold_out(mapping)}
    taken.update(name for key in inherited if isinstance(own.get(key), dict) for name in own[key])
    kept = {key: {n: text for n, text in texts.items() if n not in taken} for key, texts in inherited.items()}
    merged = {key: {**(own.get(key) or {}), **texts} for key, texts in kept.items() if texts}
    return {**mapping, "evaluation": {**own, **merged}} if merged else mapping


def _sources_that_hold_out(plain: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and mappings of the sources of all stages that hold out a part of their corpus."""
    stages = plain.get("stages")
    of_stages = [one.get("sources") for one in stages if isinstance(one, dict)] if isinstance(stages, list) else []
    sources = [pair for one in of_stages if isinstance(one, dict) for pair in one.items()]
    return [(str(name), s) for name, s in sources if isinstance(s, dict) and str(s.get("hold_out", 0)) not in _NOTHING]


def model_after(plain: dict[str, Any], num_stages: int) -> Any:
    """The model in a `run.yaml` mapping with the rotary positions that its first stages, so many, gave it."""
    model = plain.get("model")
    for stage in (plain.get("stages") or [])[:num_stages] if isinstance(model, dict) else []:
        rope = stage.get("rope") or {}
        named = {"rope_base": rope.get("base"), "rope_scaling": rope.get("scaling")}
        named["longest_sequence"] = rope.get("longest_sequence")
        model = {**model, **{key: value for key, value in named.items() if value is not None}}
    return model


def stages_trained(progress: Mapping[str, int]) -> int:
    """How many stages the weights of a checkpoint have been in, from the progress that it was saved at."""
    return progress["stage"] + (progress["stage_step"] > 0)


def _num_stages_before(parent: Mapping[str, Any], above: dict[str, Any]) -> int:
    """How many of the parent's stages lie before the checkpoint that a child begins from."""
    at = str(parent.get("at", "latest"))
    folder = Path(os.path.expanduser(parent["run"])) / "checkpoints"
    state = step_folder(folder, int(at) if at.isdigit() else 0) / "state.json"
    if not at.isdigit() or not state.is_file():
        return len(above.get("stages") or [])
    return stages_trained(json.loads(state.read_text(encoding="utf-8"))["progress"])


def in_full(plain: dict[str, Any]) -> dict[str, Any]:
    """The mapping of a `run.yaml`, with what a release has added to the settings since it was written."""
    try:
        return as_mapping(read_settings(Run, plain))
    except Fault:
        return plain  # of a release whose settings this one does not know: compared as it is


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines that tell which settings differ between two `run.yaml` mappings, without those that are free to change."""
    old_lines, new_lines = (dict(as_pairs(plain)) for plain in (old, new))
    keys = [key for key in {**old_lines, **new_lines} if not _is_free(key)]
    return [
        f"{key} is {new_lines.get(key, 'not set')}, the run began with {old_lines.get(key, 'none')}"
        for key in keys
        if old_lines.get(key) != new_lines.get(key)
    ]


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)


def _settings_of(folder: Path) -> dict[str, Any]:
    """The mapping in the `run.yaml` of a run folder."""
    path = folder / "run.yaml"
    if not path.is_file():
        around = [p.parent.name for p in folder.parent.glob("*/run.yaml")] if folder.parent.is_dir() else []
        there = f"; beside it there are: {', '.join(sorted(around)[:5])}" if around else ""
        raise Fault(f"parent.run = {folder}: there is no run (no {path}){there}")
    return read_mapping([str(path)])
