"""An sbatch file says what was asked for, and whatever names it holds reach their programs byte for byte."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpt.config import Fault
from cpt_launcher.submission import Request, render, seconds_of

PLAIN = Request(
    run=Path("/runs/mine"), folder=Path("/home/me"), code=Path("/runs/mine/snapshot/0001"),
    config=Path("/runs/mine/snapshot/0001/config.yaml"), python="/usr/bin/python3", name="mine",
)  # fmt: skip
UGLY = ["a space", "$(touch broken)", "`touch broken`", "it's", 'say "so"', "a;b & c | d > e", "*", "#SBATCH", "%j",
        "-rf", "ünï", "~", "!!", "{a,b}", "$HOME"]  # fmt: skip
# What a folder may be called, but for \ and control characters, which are refused.
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\\x7f\x85\u2028\u2029", exclude_categories=["Cc", "Cs"]),
    min_size=1, max_size=40,
).filter(lambda name: name.strip() and name not in (".", ".."))  # fmt: skip


def directives(text: str) -> list[str]:
    return re.findall(r"(?m)^#SBATCH (.*)", text)


def words_of(script: str, folder: Path, **environment: str) -> list[str]:
    """The words that the script's Python gets, which is a stand-in that writes them down."""
    path = folder / "job.sbatch"
    path.write_text(script, encoding="utf-8")
    job = {"PATH": os.environ["PATH"], "SLURM_JOB_NUM_NODES": "2", **environment}
    done = subprocess.run(["bash", path], capture_output=True, env=job, cwd=folder, timeout=60, check=True)
    return done.stdout.decode().split("\0")[:-1]


@pytest.fixture
def stub(tmp_path) -> str:
    return write_stub(tmp_path / "python")


def write_stub(path: Path) -> str:
    path.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    path.chmod(0o755)
    return str(path)


def test_the_job_says_what_was_asked_for():
    asked = replace(
        PLAIN, nodes=4, tasks_per_node=8, gpus_per_node=8, cpus_per_task=12, partition="gpu", account="a",
        qos="long", constraint="(a100|h100)", time="24:00:00", grace=600, options=("--exclusive", "--mem=0"),
    )  # fmt: skip
    assert directives(render(asked)) == [
        "--job-name=mine", "--output=/runs/mine/logs/job-%j.log", "--open-mode=append", "--nodes=4",
        "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--partition=gpu", "--account=a",
        "--qos=long", "--constraint=(a100|h100)", "--time=24:00:00", "--signal=B:USR1@600", "--requeue", "--exclusive",
        "--mem=0",
    ]  # fmt: skip


def test_a_range_of_nodes_names_no_tasks_for_slurm_would_take_no_more_nodes_than_the_fewest_need():
    lines = directives(render(replace(PLAIN, nodes=4, min_nodes=1, tasks_per_node=8, cpus_per_task=3)))
    assert "--nodes=1-4" in lines and "--cpus-per-task=24" in lines
    assert not [line for line in lines if line.startswith("--ntasks")]


def test_srun_starts_one_task_a_gpu_on_all_nodes_that_the_job_was_given(stub, tmp_path):
    asked = replace(PLAIN, python=stub, folder=tmp_path, nodes=4, min_nodes=2, tasks_per_node=8, gpus_per_node=8,
                    cpus_per_task=12)  # fmt: skip
    words = words_of(render(asked), tmp_path, SLURM_JOB_NUM_NODES="3")
    srun = words[words.index("srun") :]
    assert srun[1:4] == ["--nodes=3", "--ntasks=24", "--ntasks-per-node=8"] and "--cpus-per-task=12" in srun
    assert srun[-4:] == [stub, "-u", f"{PLAIN.code}/launcher/run.py", str(PLAIN.config)]


def test_the_supervisor_kills_in_time_for_a_requeue_before_the_limit(stub, tmp_path):
    words = words_of(render(replace(PLAIN, python=stub, folder=tmp_path, grace=300)), tmp_path)
    assert words[: words.index("--")] == [
        "-u", f"{PLAIN.code}/launcher/supervise.py", "--run", "/runs/mine", "--restarts", "3", "--grace", "270",
    ]  # fmt: skip


@pytest.mark.parametrize(("repeat", "line"), [("chain", "--dependency=singleton"), ("array", "--array=1-5%1")])
def test_jobs_that_follow_one_another_are_not_requeued_at_the_time_limit(repeat, line):
    text = render(replace(PLAIN, repeat=repeat, jobs=5))
    assert line in directives(text) and "--no-requeue" in text
    assert "--requeue" in directives(text)  # a node that dies takes no job of the chain


def test_an_interface_is_named_to_nccl_and_gloo_only_if_it_was_asked_for():
    assert "SOCKET_IFNAME" not in render(PLAIN)
    assert "export NCCL_SOCKET_IFNAME=ib0\nexport GLOO_SOCKET_IFNAME=ib0\n" in render(replace(PLAIN, interface="ib0"))


# ---- names


@example("#").via("begins a comment in a #SBATCH line")
@example("'")
@example('"')
@example("$(touch broken)")
@example("%%j")
@given(NAMES)
@settings(max_examples=40)
def test_any_name_reaches_the_programs_as_it_is(name):
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch) / name
        here.mkdir()
        stub = write_stub(here / "python")
        asked = replace(PLAIN, run=here / "run", folder=here, code=here / "code", config=here / f"{name}.yaml",
                        python=stub, name=name)  # fmt: skip
        words = words_of(render(asked), Path(scratch))
        assert words[1] == f"{here}/code/launcher/supervise.py"
        assert words[words.index("--run") + 1] == str(here / "run")
        assert words[-4:] == [stub, "-u", f"{here}/code/launcher/run.py", str(here / f"{name}.yaml")]
        assert sorted(path.name for path in Path(scratch).iterdir()) == sorted([name, "job.sbatch"])


@pytest.mark.parametrize("value", UGLY)
def test_a_value_with_spaces_or_signs_stands_in_quotes_on_its_line(value):
    text = render(replace(PLAIN, name=value, partition=value, constraint=value))
    for name in ("job-name", "partition", "constraint"):
        (found,) = [line for line in directives(text) if line.startswith(f"--{name}=")]
        given = found.partition("=")[2]
        quoted = '"' + value.replace('"', '\\"') + '"'
        assert given in (value, quoted) and (given == quoted or not re.search(r"[\s#'\"$`;]", value))


@pytest.mark.parametrize("broken", ["a\nb", "a\rb", "a\0b", "a\u2028b", "a\x1b[2Jb", "a\udcffb"])
@pytest.mark.parametrize("field", ["name", "partition", "account", "qos", "constraint"])
def test_what_would_break_a_line_is_refused(field, broken):
    with pytest.raises(Fault, match="breaks the line"):
        render(replace(PLAIN, **{field: broken}))


@pytest.mark.parametrize("field", ["run", "folder", "code"])
def test_a_folder_whose_name_breaks_a_line_is_refused(field):
    with pytest.raises(Fault, match="breaks the line"):
        render(replace(PLAIN, **{field: Path("/runs/a\n#SBATCH --uid=0")}))


def test_a_backslash_in_the_runs_folder_is_refused_because_slurm_does_not_take_it():
    with pytest.raises(Fault, match=r"SLURM takes no \\"):
        render(replace(PLAIN, run=Path("/runs/a\\b")))


def test_a_percent_sign_in_the_runs_folder_is_no_pattern():
    assert "--output=/runs/50%%j/logs/job-%j.log" in directives(render(replace(PLAIN, run=Path("/runs/50%j"))))


def test_the_whole_road_from_the_script_to_the_ranks_keeps_every_word(tmp_path):
    """The supervisor as it is, and an srun that writes down its words and finishes the run."""
    here = tmp_path / "a b$(touch broken)'\"%j"
    (here / "bin").mkdir(parents=True)
    srun = here / "bin" / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >"$OUT/words"\ntouch "$OUT/finished.json"\n')
    srun.chmod(0o755)
    root = Path(__file__).parents[2]
    asked = replace(PLAIN, run=here / "run", folder=here, code=root, config=here / "`id`.yaml", python=sys.executable)
    (here / "job").write_text(render(asked))
    job = {"PATH": f"{here}/bin:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "1", "OUT": str(here / "run")}
    subprocess.run(["bash", here / "job"], env=job, timeout=60, check=True, capture_output=True, cwd=tmp_path)
    words = (here / "run" / "words").read_text().split("\0")[:-1]
    assert words[-2:] == [f"{root}/launcher/run.py", str(here / "`id`.yaml")]
    assert not list(tmp_path.rglob("broken"))


# ---- faults


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"nodes": 0}, "--nodes 0: at least 1"),
        ({"nodes": 2, "min_nodes": 3}, "--min-nodes 3 is above --nodes 2"),
        ({"tasks_per_node": 4, "gpus_per_node": 8}, "one task a GPU"),
        ({"repeat": "chain"}, "a chain or array needs --jobs N"),
        ({"jobs": 3}, "--jobs is for chain and array"),
        ({"grace": 5}, "--grace 5: at least 10 seconds"),
        ({"time": "a day"}, "--time a day: such as 24:00:00"),
        ({"time": "5", "grace": 300}, "--time 5 leaves no time beside --grace 300 s"),
        ({"restarts": -1}, "--restarts -1: at least 0"),
        ({"partition": " "}, "--partition is empty"),
        ({"options": ("exclusive",)}, "--option 'exclusive': one option of sbatch's"),
        ({"options": ("--mem=0\n#SBATCH --uid=0",)}, "one option of sbatch's"),
    ],
)
def test_a_request_that_slurm_would_refuse_or_misunderstand_is_told(changes, told):
    with pytest.raises(Fault, match=re.escape(told)):
        render(replace(PLAIN, **changes))


def test_all_faults_are_told_at_once():
    with pytest.raises(Fault) as caught:
        render(replace(PLAIN, nodes=0, grace=1, time="soon", name="a\nb"))
    assert len(caught.value.lines) == 4


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("01:02:03", 3723), ("1-12", 129600), ("2-00:30", 174600), ("1-00:00:01", 86401),
     ("soon", None), ("1:2:3:4", None), ("", None)],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(time, seconds):
    assert seconds_of(time) == seconds


# ---- templates


def test_a_template_of_ones_own_is_filled(tmp_path):
    path = tmp_path / "mine.sbatch"
    path.write_text(
        "#!/bin/bash\n{{directives}}\nmodule load cuda\nsrun torchrun {{code}}/launcher/run.py {{config}}\n"
    )
    text = render(replace(PLAIN, config=Path("/a b.yaml")), path)
    assert text.endswith(f"module load cuda\nsrun torchrun {PLAIN.code}/launcher/run.py '/a b.yaml'\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{directives}}\n{{pyton}}", "there is no {{pyton}}; did you mean python?"),
        ("srun x", "no place {{directives}}"),
        (None, "No such file"),
    ],
)
def test_a_template_that_cannot_be_filled_is_told(tmp_path, text, told):
    path = tmp_path / "mine.sbatch"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Fault, match=re.escape(told)):
        render(PLAIN, path)
