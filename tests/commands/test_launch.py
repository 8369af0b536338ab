"""The launcher: the commands it prints are those it runs, arguments arrive as they were given, and what fails says why.

Nothing here reaches a cloud or a cluster: the programs that would are replaced by ones that note how they were called.
"""

import os
import pathlib
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from bbqrec_jax.commands import launch as program
from bbqrec_jax.launch import slurm

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "bbqrec_jax" / "launch"
WORKER = "bash bbqrec_jax/bbqrec_jax/launch/tpu_worker.sh"
TPU = ("tpu", "--name=bb", "--zone=us-west4-a")
FLAGS = ("--config=configs/beauty.py:dense", "--workdir=/mnt/bbqrec/runs/bb")
# What a shell, systemd or Kubernetes would make something else of.
ODD = ("--config.data.name=it's a b", '--config.note="$HOME" $(id) ${x} $$ `id` %h \\ *', "--config.empty=", "")
MAIN = ("-m", "bbqrec_jax.main", "--distributed=on")


@pytest.fixture(scope="module")
def no_clouds(tmp_path_factory):
  """A PATH on which the programs of clouds and clusters only fail, should a plan be run that was to be printed."""
  folder = tmp_path_factory.mktemp("no_clouds")
  for name in ("docker", "gcloud", "kubectl", "mkdir", "sbatch", "tar"):
    (folder / name).symlink_to(shutil.which("false"))
  return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def launch(no_clouds):
  """A function that calls the launcher as a shell does, without a terminal: own arguments, the program's flags."""

  def call(*arguments, flags=(), path=no_clouds, environment=None, stdin=subprocess.DEVNULL):
    command = [
      sys.executable,
      "-c",
      "from bbqrec_jax.commands import main; main()",
      "launch",
      *arguments,
      *(["--", *flags] if flags else []),
    ]
    environment = os.environ | {"PATH": str(path)} | (environment or {})
    return subprocess.run(
      command, capture_output=True, text=True, timeout=60, check=False, env=environment, stdin=stdin
    )

  return call


@pytest.fixture
def stand_ins(tmp_path):
  """A function that puts programs before the real ones: name=shell commands after the call is noted; gives the calls.

  The calls are lists of arguments, the name first, in their order.
  """
  folder, notes = tmp_path / "programs", tmp_path / "calls"
  folder.mkdir()

  def put(**programs):
    for name, body in programs.items():
      path = folder / name.replace("_", "-")
      path.write_text(f"#!/bin/bash\nprintf '%s\\0' {path.name} \"$@\" $'\\x1e' >>{shlex.quote(str(notes))}\n{body}\n")
      path.chmod(0o755)
    return lambda: [
      call.split("\0")[:-1] for call in (notes.read_text() if notes.exists() else "").split("\x1e\0")[:-1]
    ]

  put.path = f"{folder}{os.pathsep}{os.environ['PATH']}"
  return put


def shellcheck(*arguments, text=None):
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  program = str(beside) if beside.exists() else shutil.which("shellcheck")
  assert program, "shellcheck is neither beside Python nor on PATH: pip install -e '.[test]'"
  result = subprocess.run([program, *arguments], input=text, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stdout + result.stderr


def commands(result):
  """The lines of a printed plan after its head, which is checked, as is the whole by shellcheck."""
  assert result.returncode == 0, result.stderr
  shellcheck("-", text=result.stdout)
  lines = result.stdout.splitlines()
  assert lines[3:5] == ["set -euo pipefail", shlex.join(["cd", str(ROOT)])]
  return lines[5:]


def test_the_scripts_pass_shellcheck():
  scripts = sorted(map(str, FOLDER.glob("*.sh")))
  assert len(scripts) == 4
  shellcheck(*scripts)


def test_plan_of_a_resumed_queued_tpu(launch):
  options = ("--spot", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite")
  result = launch(*TPU, "resume", *options, "--bucket=my-bucket", "--dry-run", flags=FLAGS)
  assert commands(result) == [
    "# asks first: delete the TPU bb in us-west4-a",
    "gcloud compute tpus queued-resources delete bb --zone=us-west4-a --quiet --force",
    "# asks first: create the TPU bb in us-west4-a (v5litepod-16), which costs money until it is deleted",
    "gcloud compute tpus queued-resources create bb --zone=us-west4-a --accelerator-type=v5litepod-16"
    " --runtime-version=v2-alpha-tpuv5-lite --node-id=bb --spot",
    "bash bbqrec_jax/launch/check.sh active bb --zone=us-west4-a",
    "bash bbqrec_jax/launch/check.sh bucket my-bucket",
    "mkdir -p dist",
    "tar --create --gzip --file=dist/bbqrec_jax.tar.gz --exclude=__pycache__ LICENSE README.md bbqrec_jax configs"
    " experiments pyproject.toml setup.cfg",
    "gcloud compute tpus tpu-vm scp dist/bbqrec_jax.tar.gz bb: --zone=us-west4-a --worker=all",
    "gcloud compute tpus tpu-vm ssh bb --zone=us-west4-a --worker=all '--command=mkdir -p bbqrec_jax && tar --extract"
    f" --gzip --file=bbqrec_jax.tar.gz --directory=bbqrec_jax && {WORKER} install my-bucket'",
    f"gcloud compute tpus tpu-vm ssh bb --zone=us-west4-a --worker=all '--command={WORKER} start -m bbqrec_jax.main"
    " --distributed=on --config=configs/beauty.py:dense --workdir=/mnt/bbqrec/runs/bb'",
  ]
  assert all((ROOT / name).exists() for name in commands(result)[7].split()[5:])


def test_plan_of_a_tpu_with_flags_of_its_own(launch):
  options = ("--project=p", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e")
  result = launch(*TPU, "create", "logs", "stop", "delete", *options, "--create-flag=--network=my net", "--dry-run")
  where = "--zone=us-west4-a --project=p"
  assert commands(result) == [
    "# asks first: create the TPU bb in us-west4-a (v6e-8), which costs money until it is deleted",
    f"gcloud compute tpus queued-resources create bb {where} --accelerator-type=v6e-8"
    " --runtime-version=v2-alpha-tpuv6e --node-id=bb '--network=my net'",
    f"bash bbqrec_jax/launch/check.sh active bb {where}",
    f"gcloud compute tpus tpu-vm ssh bb {where} --worker=0"
    " '--command=sudo journalctl --unit=bbqrec --output=cat --lines=1000 --follow'",
    f"gcloud compute tpus tpu-vm ssh bb {where} --worker=all '--command=sudo systemctl stop bbqrec'",
    "# asks first: delete the TPU bb in us-west4-a",
    f"gcloud compute tpus queued-resources delete bb {where} --quiet --force",
  ]


def test_plan_of_a_slurm_job(launch):
  own = ("slurm", "--nodes=2", "--gpus-per-node=4", "--python=/env/bin/python", "--sbatch=--partition=gpu")
  flags = ("--config=configs/beauty.py", "--workdir", "/shared/my runs")
  assert commands(launch(*own, "--sbatch=--time=4:00:00", "--dry-run", flags=flags)) == [
    "mkdir -p runs",
    "# asks first: submit a job of 2 nodes with 4 GPUs each",
    "sbatch --job-name=bbqrec --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --requeue --signal=TERM@180"
    " --open-mode=append --output=runs/%x-%j.log --partition=gpu --time=4:00:00 bbqrec_jax/launch/slurm_job.sh"
    " '/shared/my runs' /env/bin/python -m bbqrec_jax.main --distributed=on --config=configs/beauty.py --workdir"
    " '/shared/my runs'",
  ]


def manifest(lines):
  """The objects that `kubectl apply` reads, by kind."""
  start = next(at for at, line in enumerate(lines) if line.endswith("apply --filename=- <<'END'"))
  items = yaml.safe_load_all("\n".join(lines[start + 1 : lines.index("END")]))
  return {item["kind"]: item for item in items}


def test_plan_of_a_jobset_of_tpus(launch):
  own = ("--tpu=tpu-v5-lite-podslice", "--topology=4x8", "--bucket=my-bucket", "--service-account=trainer", "--spot")
  own += ("--name=bb", "--image=registry/bb:1", "--context=mine", "--namespace=lab", "--dry-run")
  lines = commands(launch("jobset", "delete", "build", "apply", "logs", *own, flags=FLAGS))
  kubectl = "kubectl --context=mine --namespace=lab"
  start, end = next(at for at, line in enumerate(lines) if line.endswith("<<'END'")), lines.index("END")
  assert lines[: start + 1] + lines[end:] == [
    "# asks first: delete the JobSet bb",
    f"{kubectl} delete jobsets.jobset.x-k8s.io bb --cascade=foreground --ignore-not-found",
    "docker build --file=bbqrec_jax/launch/Dockerfile --platform=linux/amd64 --build-arg=ACCELERATOR=tpu"
    " --tag=registry/bb:1 .",
    "# asks first: push the image registry/bb:1",
    "docker push registry/bb:1",
    "bash bbqrec_jax/launch/check.sh bucket my-bucket",
    "# asks first: start the JobSet bb, whose nodes may cost money until it ends or is deleted",
    f"{kubectl} apply --filename=- <<'END'",
    "END",
    f"{kubectl} logs --selector=jobset.sigs.k8s.io/jobset-name=bb,batch.kubernetes.io/job-completion-index=0"
    " --container=bbqrec --tail=1000 --follow",
  ]
  objects = manifest(lines)
  assert list(objects) == ["JobSet"]
  jobset = objects["JobSet"]
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert jobset["metadata"] == {
    "name": "bb",
    "namespace": "lab",
    "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
  }
  assert jobset["spec"]["failurePolicy"] == {
    "maxRestarts": 20,
    "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
  }
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job.pop("template")
  assert job == {
    "parallelism": 8,
    "completions": 8,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        {"action": "FailJob", "onExitCodes": {"containerName": "bbqrec", "operator": "In", "values": [2]}},
      ]
    },
  }
  assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  spec = pod["spec"]
  assert spec["serviceAccountName"] == "trainer"
  assert spec["restartPolicy"] == "Never"
  assert spec["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x8",
    "cloud.google.com/gke-spot": "true",
  }
  assert spec["tolerations"] == [{"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}]
  (container,) = spec["containers"]
  assert (container["name"], container["image"]) == ("bbqrec", "registry/bb:1")
  assert container["resources"] == {"limits": {"google.com/tpu": 4}}
  shared = {"name": "shared-memory", "mountPath": "/dev/shm"}
  assert container["volumeMounts"] == [{"name": "storage", "mountPath": "/mnt/bbqrec"}, shared]
  assert spec["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
  script = ("bash", "bbqrec_jax/launch/container.sh", "/mnt/bbqrec/runs/bb")
  assert container["command"] == [*script, "python", *MAIN, *FLAGS]


def test_plan_of_a_jobset_of_gpus(launch):
  own = ("jobset", "apply", "--name=bb", "--image=registry/bb:1", "--hosts=2", "--gpus-per-host=8", "--claim=shared")
  objects = manifest(commands(launch(*own, "--gpu=nvidia-h100-80gb", "--dry-run", flags=(*FLAGS, *ODD))))
  assert list(objects) == ["Role", "RoleBinding", "JobSet"]
  # What JAX's detection of Kubernetes asks for: its pod by address, its job by name.
  allowed = {(rule["apiGroups"][0], *rule["resources"], *rule["verbs"]) for rule in objects["Role"]["rules"]}
  assert allowed == {("", "pods", "get", "list"), ("batch", "jobs", "get", "list")}
  assert objects["RoleBinding"]["roleRef"]["name"] == objects["Role"]["metadata"]["name"] == "bb"
  assert objects["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": "default", "namespace": "default"}]
  job = objects["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert (job["parallelism"], job["completions"]) == (2, 2)
  spec = job["template"]["spec"]
  assert spec["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
  assert spec["volumes"] == [
    {"name": "storage", "persistentVolumeClaim": {"claimName": "shared"}},
    {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
  ]
  (container,) = spec["containers"]
  assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
  # Kubernetes makes $ of $$ and a variable's value of $(NAME).
  assert not any("$" in word.replace("$$", "") for word in container["command"])
  assert [word.replace("$$", "$") for word in container["command"][3:]] == ["python", *MAIN, *FLAGS, *ODD]


def test_arguments_arrive_unchanged_on_every_worker_of_a_tpu(launch, stand_ins, tmp_path):
  (tmp_path / "bbqrec_jax").symlink_to(ROOT)
  on_the_worker = (
    'for word; do case $word in --command=*) cd "$HOME" && exec bash -c "${word#--command=}" ;; esac; done'
  )
  calls = stand_ins(gcloud=on_the_worker, sudo='exec "$@"', mountpoint="", systemd_run="")
  result = launch(*TPU, "run", flags=(*FLAGS, *ODD), path=stand_ins.path, environment={"HOME": str(tmp_path)})
  assert result.returncode == 0, result.stderr
  (service,) = [call for call in calls() if call[0] == "systemd-run"]
  start = service.index(f"{tmp_path}/bbqrec_env/bin/python")
  assert not any("$" in word.replace("$$", "") for word in service[start:])  # systemd makes $ of $$.
  assert [word.replace("$$", "$") for word in service[start + 1 :]] == [*MAIN, *FLAGS, *ODD]
  assert "--unit=bbqrec" in service[:start]
  assert f"--uid={os.getuid()}" in service[:start]
  assert f"--working-directory={tmp_path}/bbqrec_jax" in service[:start]


def test_a_job_in_a_workdir_of_the_home_folder_is_seen_to_be_done(launch, stand_ins, tmp_path):
  batch = 'while [[ $1 != *.sh ]]; do shift; done; SLURM_JOB_ID=7 exec bash "$@"'
  calls = stand_ins(sbatch=batch, mkdir="", srun=f"touch {tmp_path}/results.json", scontrol="")
  own, environment = ("slurm", "--nodes=1", "--gpus-per-node=1", "--yes"), {"HOME": str(tmp_path.parent)}
  flags = ("--config=c", f"--workdir=~/{tmp_path.name}")
  result = launch(*own, flags=flags, path=stand_ins.path, environment=environment)
  assert result.returncode == 0, result.stderr
  assert [call[0] for call in calls()] == ["mkdir", "sbatch", "srun"]


def test_arguments_arrive_unchanged_at_every_task_of_slurm(launch, stand_ins, tmp_path):
  # The script and what follows it, as Slurm would start them.
  batch = 'while [[ $1 != *.sh ]]; do shift; done; SLURM_JOB_ID=7 SLURM_CPUS_PER_TASK=3 exec bash "$@"'
  calls = stand_ins(
    sbatch=batch, mkdir="", srun=f'echo "cpus $SRUN_CPUS_PER_TASK"; touch {tmp_path}/results.json', scontrol=""
  )
  flags = ("--config=c", f"--workdir={tmp_path}", *ODD)
  own = ("slurm", "--nodes=1", "--gpus-per-node=1", "--python=/env/bin/python", "--yes")
  result = launch(*own, flags=flags, path=stand_ins.path)
  assert result.returncode == 0, result.stderr
  assert "cpus 3" in result.stdout
  assert calls()[-1] == ["srun", "--kill-on-bad-exit=1", "/env/bin/python", *MAIN, *flags]


@pytest.mark.parametrize(
  ("srun", "status", "requeued"),
  [("exit 0", 0, True), ('touch "$WORKDIR/results.json"', 0, False), ("exit 3", 3, False)],
  ids=["stopped", "done", "failed"],
)
def test_a_slurm_job_goes_back_to_the_queue_when_it_was_stopped(stand_ins, tmp_path, srun, status, requeued):
  calls = stand_ins(srun=srun, scontrol="")
  environment = os.environ | {"PATH": stand_ins.path, "SLURM_JOB_ID": "7", "WORKDIR": str(tmp_path)}
  command = ["bash", FOLDER / "slurm_job.sh", tmp_path, "python"]
  result = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
  assert result.returncode == status
  assert (calls()[-1] == ["scontrol", "requeue", "7"]) == requeued


@pytest.mark.parametrize(
  ("program", "status"),
  [("exit 0", 75), ('touch "$0/results.json"', 0), ("exit 2", 2), ("kill -KILL $$", 137)],
  ids=["saved", "done", "refused", "killed"],
)
def test_a_pod_ends_with_0_only_when_the_run_is_done(stand_ins, tmp_path, program, status):
  stand_ins(sleep="")
  command = ["bash", FOLDER / "container.sh", tmp_path, "bash", "-c", program, tmp_path]
  result = subprocess.run(
    command, env=os.environ | {"PATH": stand_ins.path}, capture_output=True, check=False, timeout=60
  )
  assert result.returncode == status


SAVES_ON_SIGTERM = """
import pathlib, signal, sys, time

def stop(*_):
  time.sleep(0.5)
  print("saved", flush=True)
  for path in sys.argv[1:]:
    pathlib.Path(path).touch()
  sys.exit(0)

signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("written", "status"), [((), 75), (("results.json",), 0)], ids=["saved", "done"])
def test_a_pod_passes_sigterm_on_and_waits(tmp_path, written, status):
  program = (sys.executable, "-c", SAVES_ON_SIGTERM, *(tmp_path / name for name in written))
  with subprocess.Popen(["bash", FOLDER / "container.sh", tmp_path, *program], stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b"up\n"
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"saved\n"
    assert process.wait(30) == status
  assert time.monotonic() - begin < 30  # It does not wait for results that cannot come.


def test_a_worker_mounts_and_installs_once(stand_ins, tmp_path):
  uv = tmp_path / ".local" / "bin" / "uv"
  uv.parent.mkdir(parents=True)
  mounted = tmp_path / "mounted"
  calls = stand_ins(
    sudo='exec "$@"',
    install="",
    mountpoint=f"[[ -e {mounted} ]]",
    systemd_run=f"touch {mounted}",
    gcsfuse="",
    python3="",
    uv='[[ $1 != venv ]] || { mkdir -p "${@: -1}/bin"; cp "$(type -P true)" "${@: -1}/bin/python"; }',
  )
  uv.symlink_to(stand_ins.path.split(os.pathsep)[0] + "/uv")
  environment = os.environ | {"PATH": stand_ins.path, "HOME": str(tmp_path)}
  command = ["bash", FOLDER / "tpu_worker.sh", "install", "my-bucket"]
  for _ in range(2):
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
  plain = [call for call in calls() if call[0] not in ("sudo", "mountpoint")]
  every_time = [["python3", "-m"], ["uv", "pip"]]
  once = [
    ["install", "--directory"],
    ["systemd-run", "--unit=bbqrec-storage"],
    every_time[0],
    ["uv", "venv"],
    every_time[1],
  ]
  assert [call[:2] for call in plain] == once + every_time
  storage = ["gcsfuse", "--implicit-dirs", "--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"]
  assert plain[1][-6:] == [*storage, "my-bucket", "/mnt/bbqrec"]
  assert plain[4][-1] == f"{tmp_path}/bbqrec_jax[tpu]"


def test_a_worker_without_its_storage_starts_nothing(stand_ins, tmp_path):
  calls = stand_ins(sudo="", mountpoint="exit 1", hostname="echo w0")
  environment = os.environ | {"PATH": stand_ins.path, "HOME": str(tmp_path)}
  command = ["bash", FOLDER / "tpu_worker.sh", "start", "-m", "x"]
  result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
  assert (result.returncode, result.stderr) == (1, "error: w0: nothing is mounted at /mnt/bbqrec: install first\n")
  assert not any(call[0] == "sudo" for call in calls())


@pytest.mark.parametrize(("answer", "status"), [("True", 0), ("", 1)])
def test_a_bucket_must_have_a_hierarchical_namespace(stand_ins, answer, status):
  calls = stand_ins(gcloud=f"echo {answer}")
  command = ["bash", FOLDER / "check.sh", "bucket", "my-bucket"]
  environment = os.environ | {"PATH": stand_ins.path}
  result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
  assert result.returncode == status
  assert ("--enable-hierarchical-namespace" in result.stderr) == bool(status)
  assert calls()[0][:5] == ["gcloud", "storage", "buckets", "describe", "gs://my-bucket"]


@pytest.mark.parametrize(("last", "status"), [("ACTIVE", 0), ("FAILED", 1), ("SUSPENDED", 1)])
def test_a_queued_resource_is_waited_for(stand_ins, tmp_path, last, status):
  states = tmp_path / "states"
  states.write_text(f"WAITING_FOR_RESOURCES\nPROVISIONING\n{last}\n")
  calls = stand_ins(gcloud=f"head -n 1 {states}; sed -i 1d {states}", sleep="")
  command = ["bash", FOLDER / "check.sh", "active", "bb", "--zone=z"]
  environment = os.environ | {"PATH": stand_ins.path}
  result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
  assert result.returncode == status
  assert result.stdout.splitlines() == ["bb: WAITING_FOR_RESOURCES", "bb: PROVISIONING", f"bb: {last}"]
  assert len([call for call in calls() if call[0] == "gcloud"]) == 3
  assert (f"the queued resource bb is {last}" in result.stderr) == bool(status)


CREATE = (*TPU, "create", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e")
JOBSET = ("jobset", "apply", "--name=bb", "--image=r/i:1", "--claim=c")
GPUS = ("--hosts=2", "--gpus-per-host=8")
SLURM = ("slurm", "--nodes=2", "--gpus-per-node=4")


@pytest.mark.parametrize(
  ("arguments", "flags", "named"),
  [
    ((), (), "required: {tpu,slurm,jobset}"),
    (("tpu", "create"), (), "required: --name, --zone"),
    ((*TPU, "create", "--accelerator-type=v6e-8"), (), "needs --accelerator-type and --runtime-version"),
    (("tpu", "run", "--name=My TPU", "--zone=z"), FLAGS, "got My TPU"),
    ((*TPU, "launch"), FLAGS, "choose from create, install, run, logs, stop, delete, resume"),
    ((*CREATE, "--typo"), (), "--typo"),
    ((*TPU, "run"), (), "--config is missing: give the program's flags after --"),
    ((*TPU, "run"), ("--config=c",), "--workdir is missing"),
    ((*TPU, "run"), ("--config=c", "--workdir=runs/x"), "--workdir=runs/x: expected a folder below /mnt/bbqrec"),
    ((*TPU, "run"), ("--config=c", "--workdir", "gs://b/x"), "--workdir=gs://b/x: expected a path, got a URL"),
    ((*TPU, "run"), (*FLAGS, "--config.data.path=gs:/b"), "--config.data.path=gs:/b: expected a path, got a URL"),
    ((*TPU, "run"), ("--config=c", "--workdir=/mnt/bbqrec/../x"), "expected a folder below"),
    ((*TPU, "run"), (*FLAGS, "--config.data.path=/home/me/data"), "--config.data.path=/home/me/data: expected"),
    ((*TPU, "install"), (), "`install` needs --bucket"),
    ((*SLURM[:2], "--gpus-per-node=0"), FLAGS, "--gpus-per-node: expected a number from 1 on, got 0"),
    (SLURM, (), "--config is missing"),
    (SLURM, ("--config=c", "--workdir=S3://b/x"), "--workdir=S3://b/x: expected a path, got a URL"),
    (SLURM, ("--config=file:///c", "--workdir=x"), "give the path alone, --config=/c"),
    (SLURM, ("--config=c", "--workdir=/tmp/x"), "every node has a /tmp of its own"),
    ((*JOBSET, *GPUS), ("--config=c", "--workdir=runs/x"), "expected a folder below /mnt/bbqrec"),
    ((*JOBSET, *GPUS, "--bucket=b"), FLAGS, "needs one of --bucket and --claim"),
    (JOBSET, FLAGS, "which devices?"),
    ((*JOBSET, "--tpu=tpu-v6e-slice"), FLAGS, "expected the shape of the slice of tpu-v6e-slice"),
    ((*JOBSET, "--tpu=tpu-v6e-slice", "--topology=2x3"), FLAGS, "has 6 chips, not a multiple of --chips-per-host=4"),
    (("jobset", "build", "--name=bb"), (), "--image is missing"),
  ],
)
def test_what_cannot_work_is_refused_in_one_line(capsys, arguments, flags, named):
  own = [*arguments, "--dry-run"] if arguments else []
  with pytest.raises(SystemExit) as end:
    program.main([*own, *(["--", *flags] if flags else [])])
  assert end.value.code == 2
  printed = capsys.readouterr()
  assert printed.out == ""
  (line,) = printed.err.splitlines()
  assert line.startswith("error: ")
  assert named in line


@pytest.mark.parametrize(
  ("arguments", "flags", "tool"),
  [(CREATE, (), "gcloud"), ((*JOBSET, *GPUS), FLAGS, "kubectl")],
)
def test_a_missing_tool_is_named(launch, tmp_path, arguments, flags, tool):
  result = launch(*arguments, "--yes", flags=flags, path=tmp_path)
  assert (result.returncode, result.stdout) == (2, "")
  (line,) = result.stderr.splitlines()
  assert line.startswith(f"error: {tool} is not on PATH: install ")


def test_shared_storage_is_told_from_a_nodes_own():
  mounts = "/dev/sda1 / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n/dev/sdb /home/scratch xfs rw 0 0\n"
  assert "is on ext4 here" in slurm.check_shared(pathlib.Path("/opt/runs"), mounts)
  assert slurm.check_shared(pathlib.Path("/home/me/runs"), mounts) == ""
  assert "is on xfs here" in slurm.check_shared(pathlib.Path("/home/scratch/runs"), mounts)
  assert slurm.check_shared(pathlib.Path("/anywhere"), "") == ""


def test_without_a_terminal_nothing_that_costs_is_run(launch, stand_ins):
  calls = stand_ins(gcloud="")
  result = launch(*CREATE, path=stand_ins.path)
  assert result.returncode == 2
  assert result.stderr == (
    "error: this would create the TPU bb in us-west4-a (v6e-8), which costs money until it is deleted: there is no"
    " terminal to ask on, give --yes to agree\n"
  )
  assert calls() == []


@pytest.mark.parametrize(
  ("answers", "status", "run"), [("y\ny\n", 0, 3), ("y\nn\n", 1, 0), ("\n", 1, 0)], ids=["agreed", "half", "declined"]
)
def test_everything_is_asked_before_anything_is_run(launch, stand_ins, answers, status, run):
  calls = stand_ins(gcloud="echo ACTIVE")
  terminal, end = pty.openpty()
  try:
    os.write(terminal, answers.encode())
    result = launch(*TPU, "delete", *CREATE[3:], path=stand_ins.path, stdin=end)
  finally:
    os.close(terminal)
    os.close(end)
  assert result.returncode == status
  assert result.stdout.startswith("This will delete the TPU bb in us-west4-a. Go on? [y/N] ")
  assert ("nothing was run" in result.stderr) == bool(status)
  assert len(calls()) == run


def test_what_is_run_is_what_is_printed_until_something_fails(launch, stand_ins):
  own = (*TPU, "delete", "create", "run", *CREATE[4:])
  noted = stand_ins(gcloud='echo ACTIVE; [[ $4 != "$FAILING" ]]')

  def calls():
    return [call for call in noted() if "describe" not in call]

  lines = commands(launch(*own, "--dry-run", flags=(*FLAGS, *ODD), path=stand_ins.path))
  printed = [shlex.split(line) for line in lines if line.startswith("gcloud")]
  assert calls() == []
  result = launch(*own, "--yes", flags=(*FLAGS, *ODD), path=stand_ins.path)
  assert result.returncode == 0, result.stderr
  assert calls() == printed
  assert len(printed) == 3
  failing = {"FAILING": "create"}
  result = launch(*own, "--yes", flags=(*FLAGS, *ODD), path=stand_ins.path, environment=failing)
  assert calls()[3:] == printed[:2]
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: status 1 of gcloud compute tpus queued-resources create bb ")
