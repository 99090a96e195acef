"""From a file with `versions:` to the runs of its plan: the main path, and the branch that releases each version.

    output: runs/yearly
    main: {peak: 3e-4, warmup: 1%}                   # constant; the warm-up is in the first version
    branch: {share: 60%, floor: 3e-5}                # of each version's steps, and how its branch goes down
    versions:
      - {name: year-1, tokens: 10B, sources: {web: {corpus: data/year-1}}}
      - {name: year-2, tokens: 10B, sources: {web: {corpus: data/year-2}}, replay: {share: 5%}}

All else is as in the file of one run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from cpt.checkpoint import settings as checkpoint_settings
from cpt.config import Fault, as_mapping, build, read_mapping, read_settings
from cpt.progress import Progress
from cpt.run import Run, Stage, branch_of, run_of
from cpt.schedules import branch, constant
from cpt.versions.cost import Cost


@dataclass(frozen=True)
class Share:
    """`share`: the part of a version's steps, its last, over which its branch goes down."""

    share: Fraction = Fraction(3, 5)

    def faults(self) -> list[str]:
        """A branch of nothing, or one that begins with the version."""
        return [] if 0 < self.share < 1 else [f"share = {float(self.share):g}: above 0 and below 1"]


@dataclass(frozen=True)
class Release:
    """A version's branch: it leaves the path at `place`, whose stage is the version's; `run` is the branch itself."""

    name: str
    place: Progress
    run: Run


@dataclass(frozen=True)
class Versions:
    """The runs of a plan. `kept`: what is said of checkpoints, apart from those that branches leave.

    `tokens`: of each version, replayed ones included, in whole steps.
    """

    main: Run
    releases: tuple[Release, ...]
    kept: checkpoint_settings.Settings
    tokens: tuple[int, ...]

    @property
    def cost(self) -> Cost:
        """What it costs, in tokens."""
        return Cost(self.tokens, [release.run.total_tokens for release in self.releases])


def read_versions(words: Sequence[str]) -> Versions | None:
    """The plan that YAML files and key=value words describe; None if they describe one run and no versions.

    Raises Fault with every mistake at once.
    """
    mapping = read_mapping(words)
    if "versions" not in mapping:
        return None
    if faults := _faults_of_words(mapping):
        raise Fault(faults)
    main, schedule = mapping.get("main") or {}, dict(mapping.get("branch") or {})
    share = _read(Share, {"share": schedule.pop("share")} if "share" in schedule else {}, "branch", faults)
    _read(constant.Settings, main, "main", faults)
    _read(branch.Settings, schedule, "branch", faults)
    if faults:
        raise Fault(faults)
    stages = [
        {**version, "schedule": {"name": "constant", **main, **({"warmup": 0} if number else {})}}
        for number, version in enumerate(mapping["versions"])
    ]
    rest = {key: value for key, value in mapping.items() if key not in ("versions", "main", "branch")}
    output = Path(str(mapping.get("output"))).expanduser()
    try:
        whole = run_of({**rest, "output": str(output / "main"), "stages": stages})
    except Fault as fault:
        raise Fault([_told_of_versions(line) for line in fault.lines]) from None
    return _plan(whole, output, share.share, {"name": "branch", **schedule})


def _plan(whole: Run, output: Path, share: Fraction, schedule: Mapping[str, Any]) -> Versions:
    """The plan of a path through all of every version, which ends where the last branch leaves it."""
    faults, places, lengths = [], [], []
    steps_before = tokens_before = 0
    for number, stage in enumerate(whole.stages):
        place, length = _leaving(whole, number, share)
        if place.stage_step < 1:
            faults.append(
                f"versions.{number}: {whole.num_steps(stage)} step(s) in all, of which the branch takes "
                f"{length // whole.tokens_a_step} and the path none before it; give it more tokens, or lower "
                "branch.share or batch.windows"
            )
        elif whole.windows_at(stage, place) != whole.batch.windows:
            faults.append(
                f"versions.{number}.batch_warmup: the batch still grows when the branch leaves; make it shorter"
            )
        step, tokens = steps_before + place.step, tokens_before + place.tokens
        places.append(dataclasses.replace(place, step=step, tokens=tokens))
        lengths.append(length)
        steps_before += whole.num_steps(stage)
        tokens_before += _tokens_of(whole, stage)
    if (whole.output.parent / "run.yaml").is_file():
        faults.append(f"output = {output}: this is a run's own folder; name one for the plan")
    if faults:
        raise Fault(faults)
    main = _ending_at(whole, places)
    if main.num_steps(main.stages[-1]) != places[-1].stage_step:
        last = len(places) - 1
        raise Fault(f"versions.{last}.batch_warmup: the path ends within this version; write its length in tokens")
    above, releases = as_mapping(main), []
    for number, (place, length) in enumerate(zip(places, lengths, strict=True)):
        folder, progress = output / f"version-{number + 1}", dataclasses.asdict(place)
        mapping = branch_of(main.output, above, progress, folder, length, schedule, continues=True)
        mapping["checkpoint"] = as_mapping(whole.checkpoint)
        run = read_settings(Run, mapping)
        faults.extend(_faults_of_rate(main, place, run))
        releases.append(Release(main.stages[number].name, place, run))
    if faults:
        raise Fault(faults)
    tokens = tuple(_tokens_of(whole, stage) for stage in whole.stages)
    return Versions(main, tuple(releases), whole.checkpoint, tokens)


def _leaving(whole: Run, number: int, share: Fraction) -> tuple[Progress, int]:
    """Where the branch of a version leaves, counted from the version's beginning, and its tokens; in whole steps."""
    stage = whole.stages[number]
    num_steps = max(1, int(share * whole.num_slots(stage) / whole.batch.windows + Fraction(1, 2)))
    length = num_steps * whole.tokens_a_step
    step, tokens = whole.num_steps(stage) - num_steps, _tokens_of(whole, stage) - length
    return Progress(step, tokens, number, step, tokens, whole.tokens_a_step), length


def _tokens_of(run: Run, stage: Stage) -> int:
    """Tokens of a stage in whole steps."""
    return run.num_slots(stage) * run.sequence_length


def _ending_at(whole: Run, places: Sequence[Progress]) -> Run:
    """The path, ended where its last branch leaves; keeps the checkpoints that the others leave."""
    last = whole.stages[-1]
    replay = last.replay and dataclasses.replace(last.replay, accounting="replaces_new")  # all tokens are counted here
    last = dataclasses.replace(last, tokens=places[-1].stage_tokens, replay=replay)
    left = tuple(sorted({*whole.checkpoint.keep_at_tokens, *(place.tokens for place in places[:-1])}))
    kept = dataclasses.replace(whole.checkpoint, keep_at_tokens=left)
    return dataclasses.replace(whole, stages=(*whole.stages[:-1], last), checkpoint=kept)


def _faults_of_rate(main: Run, place: Progress, run: Run) -> list[str]:
    """Why a branch cannot go down from the rate that the path has where it is left."""
    stage = main.stages[place.stage]
    path = build(stage.schedule, "Schedule", stage.total_tokens, 0.0)
    rate = path.rate(Progress(stage_tokens=place.stage_tokens - main.tokens_a_step))
    try:
        build(run.stages[0].schedule, "Schedule", run.total_tokens, rate)
    except Fault as fault:
        return [f"branch.{line.removeprefix('schedule.')}" for line in fault.lines]
    return []


def _faults_of_words(mapping: Mapping[str, Any]) -> list[str]:
    """What stands in the file of a run and has no place in that of a plan."""
    faults: list[str] = []
    if "output" not in mapping:
        faults.append("output is not set; it has no default")
    if "stages" in mapping:
        faults.append("stages: a plan has versions in their place; leave one of them out")
    for name in ("main", "branch"):
        if not isinstance(mapping.get(name, {}), Mapping):
            return [*faults, f"{name} = {mapping[name]!r}: expected 'key: value' lines"]
    versions = mapping["versions"]
    if not isinstance(versions, list) or not versions or not all(isinstance(version, Mapping) for version in versions):
        return [*faults, f"versions = {versions!r}: expected a list, each with name, tokens and sources"]
    return faults + [
        f"versions.{number}.{name}: the plan sets it; leave it out"
        for number, version in enumerate(versions)
        for name in ("schedule", "continues")
        if name in version
    ]


def _read(kind: type, mapping: Mapping[str, Any], where: str, faults: list[str]) -> Any:
    try:
        return read_settings(kind, mapping, where)
    except Fault as fault:
        faults.extend(fault.lines)
        return None


def _told_of_versions(line: str) -> str:
    """A fault of the path's stages in the words of the plan's file."""
    return f"versions{line.removeprefix('stages')}" if line.startswith("stages") else line
