"""The batch files, on a cluster of shell scripts that stand for Slurm: what they start, and how a job comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import TINY, environment

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts/slurm").iterdir())
BASH = shutil.which("bash") or "bash"

SBATCH = """#!/bin/bash
# Runs the job here, from a copy, as Slurm does.
cp "$1" "$SPOOL/slurm_script" && shift
exec bash "$SPOOL/slurm_script" "$@"
"""
SRUN = """#!/bin/bash
# Runs a command once for every machine, and hands signals on to it.
echo "srun $*" >>"$SPOOL/calls"
while [[ "$1" == --* ]]; do shift; done
pids=() status=0
for ((machine = 0; machine < SLURM_NNODES; machine++)); do
    SLURM_NODEID=$machine "$@" &
    pids+=("$!")
done
trap 'kill -USR1 "${pids[@]}" 2>/dev/null' USR1
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid" || status=$?
done
exit "$status"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$SPOOL/calls"
if [[ "$1" == show ]]; then echo 127.0.0.1; fi
"""
LAUNCHER = f"""#!/bin/bash
# Stands for torchrun: USR1 would end it were it not ignored. Its process listens to USR1 a little later.
echo "python $* threads=$OMP_NUM_THREADS" >>"$SPOOL/calls"
{sys.executable} -c '
import signal, sys, time
time.sleep(0.5)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
print("training", flush=True)
time.sleep(20)
sys.exit(3)' &
wait $!
"""


def cluster(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a job, with the stand-ins first on the path."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text, encoding="utf-8")
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    for program in programs.iterdir():
        program.chmod(0o755)
    job = {
        "SPOOL": str(folder), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "4711", "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node[1-2]", "VENV_DIR": str(folder / "none"), "AGAIN_SECONDS": "0.3",
    }  # fmt: skip
    paths = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    return {**environment(), **paths, **job, **variables}


def submit(variables: dict[str, str], script: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["sbatch", str(ROOT / "scripts/slurm" / script), *words], env=variables, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
    )  # fmt: skip


def said(job: subprocess.Popen[str], until: str = "") -> str:
    """What a job prints until a line contains this text, or until it ends."""
    assert job.stdout
    text = ""
    for line in job.stdout:
        text += line
        if until and until in line:
            return text
    assert not until, text[-3000:]
    job.wait(10)
    return text


def calls(variables: dict[str, str]) -> list[str]:
    return (Path(variables["SPOOL"]) / "calls").read_text(encoding="utf-8").splitlines()


def with_launcher(folder: Path, **variables: str) -> dict[str, str]:
    """A cluster on which nothing is trained."""
    job = cluster(folder, **variables)
    (folder / "bin/python").write_text(LAUNCHER, encoding="utf-8")
    del job["OMP_NUM_THREADS"]
    return job


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_the_scripts(script: Path) -> None:
    done = subprocess.run([BASH, "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_job_that_nears_its_time_limit_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    variables = with_launcher(tmp_path, SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE="34", SLURM_CPUS_PER_TASK="34")
    job = submit(variables, "single_node.sbatch", "pretrain", "--data_path", "two words.jsonl")
    time.sleep(0.3)  # the process does not listen yet: it is asked again
    os.kill(job.pid, signal.SIGUSR1)
    text = said(job)
    assert job.returncode == 0, text
    srun, python, requeue = calls(variables)
    assert "--cpus-per-task=34" in srun and "--nodes=1" in srun
    assert "--nproc-per-node=4 --max-restarts=3 --standalone -m minillm pretrain --resume_from auto" in python
    assert python.endswith("--data_path two words.jsonl threads=8")
    assert requeue == "scontrol requeue 4711"


def test_a_cancelled_job_saves_and_stays_away(tmp_path: Path) -> None:
    variables = with_launcher(tmp_path)
    job = submit(variables, "single_node.sbatch", "sft")
    said(job, until="training")
    os.kill(job.pid, signal.SIGTERM)
    text = said(job)
    assert "TERM: the run saves and ends" in text and job.returncode == 0
    assert not any("requeue" in call for call in calls(variables))


def test_a_job_that_fails_fails(tmp_path: Path) -> None:
    variables = with_launcher(tmp_path)
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    job = submit(variables, "single_node.sbatch", "pretrain")
    said(job)
    assert job.returncode == 3


def test_several_machines_meet_at_the_first(tmp_path: Path) -> None:
    variables = with_launcher(tmp_path, SLURM_NNODES="2", SLURM_RESTART_COUNT="1", MAX_RESTARTS="0")
    job = submit(variables, "multi_node.sbatch", "pretrain", "--shards", "8")
    said(job, until="training")
    os.kill(job.pid, signal.SIGUSR1)
    said(job)
    started = [call for call in calls(variables) if call.startswith("python")]
    assert len(started) == 2
    for call in started:
        assert "--nnodes=2 --rdzv-backend=c10d --rdzv-id=4711-1 --rdzv-endpoint=127.0.0.1:24711" in call
    assert sorted(re.findall(r"is_host=(\d)", "".join(started))) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("script, machines", [("single_node.sbatch", 1), ("multi_node.sbatch", 2)])
def test_a_real_run_is_taken_out_of_the_queue_and_comes_back(
    demo_data: Path, tmp_path: Path, script: str, machines: int
) -> None:
    out = tmp_path / "out"
    variables = cluster(tmp_path, SLURM_NNODES=str(machines), PROCESSES_PER_NODE=str(2 // machines))
    flags = ["--data_path", str(demo_data / "pretrain.jsonl"), "--out_dir", str(out), *TINY, "--max_steps", "60"]
    words = ("pretrain", *flags, "--save_every", "25", "--eval_every", "60")
    first = submit(variables, script, *words)
    text = said(first, until="step 15/60")
    os.kill(first.pid, signal.SIGUSR1)
    text += said(first)
    assert first.returncode == 0, text[-3000:]
    stopped = re.search(r"stopped at step (\d+)", text)
    assert stopped and 15 <= int(stopped[1]) < 60, text[-3000:]
    assert "Traceback" not in text
    assert calls(variables)[-1] == "scontrol requeue 4711"
    again = submit({**variables, "SLURM_RESTART_COUNT": "1"}, script, *words)
    text = said(again)
    assert again.returncode == 0, text[-3000:]
    assert f"at step {stopped[1]} of 60" in text
    log = json.loads((out / "pretrain_32/training_log.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in log] == list(range(1, 61))
    assert not (out / "pretrain_32.previous").exists()
