"The library on a pretend GPU: see `fakegpu/README.md`. Each case runs in a process of its own"
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent/'fakegpu'
ROOT = Path(__file__).parents[1]
CASES = re.findall(r'\w+', re.search(r'^CASES = \[(.*?)\]', (FOLDER/'cases.py').read_text(), re.M|re.S)[1])

def missing():
    "What the build needs and this machine lacks, in words"
    needed = {'ninja': shutil.which('ninja'), 'a C++ compiler': shutil.which(os.environ.get('CXX', 'c++')),
              "Python's headers": (Path(sysconfig.get_paths()['include'])/'Python.h').exists()}
    return ', '.join(name for name,found in needed.items() if not found)

def run(*command, **kwargs):
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':os.pathsep.join([str(ROOT), str(FOLDER)])}
    command = [sys.executable, '-W', 'ignore', *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=env, **kwargs)

@pytest.fixture(scope='module')
def device():
    "Compiles the device once, which takes a minute or two"
    if missing(): pytest.skip(f'The pretend GPU cannot be compiled here without {missing()}')
    res = run('-c', 'import fakegpu, torch; print(torch.ones(2, device="fakegpu").sum().item())', timeout=900)
    assert res.returncode==0 and res.stdout.split()[-1]=='2.0', res.stderr[-3000:]

@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_on_a_pretend_gpu(device, case, people, tmp_path):
    res = run(FOLDER/'cases.py', case, people, tmp_path, timeout=600)
    assert res.returncode==0 and f'{case}: passed' in res.stdout, (res.stdout + res.stderr)[-3000:]

CUDA_ALONE = {'training/checkpoints.py'} # A kind of state in the files of earlier versions
BY_NAME = re.compile(r"'cuda'|\"cuda\"|\.is_cuda|torch\.cuda|\.cuda\(")

def test_the_package_does_not_ask_for_cuda_by_name():
    "So that another GPU takes the same branches"
    files = {file.relative_to(ROOT/'pyramidreid').as_posix():file for file in (ROOT/'pyramidreid').rglob('*.py')}
    asks = {name for name,file in files.items() if BY_NAME.search(file.read_text())}
    assert asks <= CUDA_ALONE
