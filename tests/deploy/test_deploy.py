"""The files in deploy/ are valid, and our command line accepts the commands in them."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from making import OWN_NET, picture, write_tar

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
INSTRUCTIONS = {
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "LABEL",
    "RUN",
    "USER",
    "VOLUME",
    "WORKDIR",
}


def accept(words: list[str]) -> dict[str, Any]:
    """Return the parameters as our command line parses them. It raises on unknown ones."""
    from saltern.jobs.main import app

    command = typer.main.get_group(app).commands[words[0]]
    with command.make_context(words[0], words[1:]) as ctx:
        return dict(ctx.params)


def dockerfile() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def test_the_dockerfile_is_made_of_instructions() -> None:
    made = dockerfile()
    assert made[0][0] == "FROM"
    assert {name for name, _ in made} <= INSTRUCTIONS
    assert all(rest.strip() for _, rest in made)


def test_all_that_the_image_copies_is_there() -> None:
    sources = [word for name, rest in dockerfile() if name == "COPY" for word in shlex.split(rest)[:-1]]
    assert {"pyproject.toml", "constraints.txt", "schemas", "pipeline", "jobs"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_image_installs_by_the_constraints_and_runs_without_privileges() -> None:
    made = dockerfile()
    (install,) = [rest for name, rest in made if name == "RUN" and "pip install" in rest]
    words = shlex.split(install)
    assert words[words.index("--constraint") + 1] == "constraints.txt"
    users = [rest for name, rest in made if name == "USER"]
    assert users
    assert users[-1] not in ("0", "root")
    assert made[-1] == ("ENTRYPOINT", '["saltern"]')


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    return made


def test_the_rayjob_runs_an_extract(rayjob: dict[str, Any]) -> None:
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(rayjob["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "saltern", "extract"]
    read = accept(words[3:])
    assert (read["engine"], read["device"]) == ("ray", "cuda")
    assert read["out"].startswith("s3://")
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert read["decode_threads"] <= int(container["resources"]["requests"]["cpu"])
    assert read["workers"] == group["replicas"]


def test_the_rayjob_is_closed_and_goes_when_done(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    cluster = spec["rayClusterSpec"]
    auth = cluster["authOptions"]
    assert auth["mode"] == "token"
    assert f"create secret generic {auth['secretName']}" in (DEPLOY / "rayjob.yaml").read_text()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    assert len({container["image"] for container in containers}) == 1
    assert all(container["securityContext"]["runAsNonRoot"] for container in containers)
    assert all({"requests", "limits"} == set(container["resources"]) for container in containers)
    assert containers[-1]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_rayjob_names_the_ray_of_the_image(rayjob: dict[str, Any]) -> None:
    pinned = re.search(r"^ray(?:\[.*\])?==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]


SLURM = DEPLOY / "slurm.sh"


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    assert not [line for line in SLURM.read_text().splitlines() if "ray stop" in line and not line.startswith("#")]


def test_the_slurm_script_runs_an_extract() -> None:
    text = SLURM.read_text()
    (example,) = re.findall(r"^#   sbatch deploy/slurm.sh (.*)$", text, re.MULTILINE)
    (line,) = re.findall(r"^saltern (.*)$", text, re.MULTILINE)
    words = shlex.split(line.replace('"$@"', example).replace("$address", "node1:6379").replace("$count", "8"))
    read = accept(words)
    assert (read["engine"], read["address"], read["out"], read["workers"]) == ("ray", "node1:6379", "RUN", 8)


STUBS = {
    "scontrol": "echo 127.0.0.1",
    # Skips srun's options, which all begin with --, and runs the command.
    "srun": 'stat -c %a "$RAY_AUTH_TOKEN_PATH" > mode; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
}


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return the environment of a job on one node."""
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        stub = tmp_path / "bin" / name
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
    number = str(_job_number())
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    job = {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}
    kept |= {"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "120"}  # the cores may be busy
    cpus = str(len(os.sched_getaffinity(0)))
    yield {**kept, **job, "SLURM_CPUS_PER_TASK": cpus, "HOME": str(tmp_path), "PATH": os.pathsep.join(path)}
    shutil.rmtree(f"/tmp/saltern-{number}", ignore_errors=True)


def _job_number() -> int:
    """Return a job number for which the script's port is free."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) != 0:
                return port - 20000
    pytest.fail("no port is free")


@pytest.mark.slow
def test_the_slurm_script_on_one_node(slurm: dict[str, str], tmp_path: Path) -> None:
    """Only srun and scontrol are replaced; the head, its token and the run are real."""
    shard = write_tar(tmp_path / "a.tar", [("one", {"jpg": picture(0)})])
    (tmp_path / "nets.py").write_text(OWN_NET)
    words = ["--out", "run", "--model", "nets:small", "--layer", "1", "--method", "grad-cam", "--target", "top1"]
    command = ["bash", str(SLURM), str(shard), *words, "--crop", "64", "--resize", "64"]
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(command, cwd=tmp_path, env=slurm, stdout=log, stderr=log, start_new_session=True)
    try:
        code = job.wait(timeout=150)
    finally:
        os.killpg(job.pid, signal.SIGKILL)  # as Slurm ends the steps of a job
        job.wait()
    assert code == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "mode").read_text().strip() == "600"
    assert not list(tmp_path.glob(".saltern-token-*"))
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "run" / "receipts").rglob("*.json")]
    assert [receipt["statuses"] for receipt in receipts] == [{"ok": 1}]


def test_the_recipe_is_one_that_train_casm_takes(tmp_path: Path) -> None:
    """The command fails only because its shards are missing."""
    from typer.testing import CliRunner

    from saltern.jobs.main import app

    words = ["train-casm", f"{tmp_path}/none.tar", "--out", f"{tmp_path}/out", "--config"]
    ended = CliRunner().invoke(app, [*words, str(DEPLOY / "casm-tiny-imagenet.toml")])
    assert "none.tar" in str(ended.exception)
    assert not (tmp_path / "out").exists()
