"The repository: modules and notebooks, README, metadata."
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import metadata, requires, version
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
modules = sorted((root/'pyramidreid').glob('*.py'))
hand_written = {'__init__.py','__main__.py','all.py','_modidx.py'}

@pytest.mark.parametrize('module', [m for m in modules if m.name not in hand_written], ids=lambda m: m.name)
def test_every_module_has_its_notebook(module):
    source = re.search(r'File to edit: \.\./(\S+)\.$', module.read_text(encoding='utf-8'), re.M)
    assert source and (root/source[1]).exists()

@pytest.mark.parametrize('module', [m for m in modules if m.name!='_modidx.py'], ids=lambda m: m.name)
def test_modules_are_small(module): assert len(module.read_text(encoding='utf-8').splitlines()) <= 260

def test_metadata_comes_from_settings():
    import pyramidreid
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    cfg = cfg['DEFAULT']
    assert version('pyramidreid')==cfg['version']==pyramidreid.__version__
    assert metadata('pyramidreid')['Requires-Python']==f">={cfg['min_python']}"
    core = {re.match(r'[\w-]+', r)[0] for r in requires('pyramidreid') if 'extra ==' not in r}
    assert core=={'fastai','torch','torchvision','pandas','matplotlib','safetensors','click'}

def test_readme_is_fresh():
    sys.path.insert(0, str(root/'dev'))
    from readme import readme
    assert (root/'README.md').read_text(encoding='utf-8')==readme(), 'run `make readme`'

def test_readme_links_lead_somewhere():
    text = (root/'README.md').read_text(encoding='utf-8')
    for link in re.findall(r'\]\((?!http)([^)]+)\)', text): assert (root/link).exists(), link

def test_readme_examples_run(tmp_path, monkeypatch):
    "The README's lines of a training and of the use of a model, on a smaller scale"
    for o in ('faiss','pyarrow','onnxruntime','onnxscript'): pytest.importorskip(o, reason='needs the extras gallery and onnx')
    import matplotlib
    matplotlib.use('agg')
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', (root/'README.md').read_text(encoding='utf-8'), re.S)
    code = '\n'.join(o for o in blocks if 'synth_persons' in o or 'Gallery' in o)
    for old,new in {'n_train=60, n_test=40':'path="people", n_train=8, n_test=6, size=(96,48)', '(384,128)':'(96,48), num_workers=0',
                    'resnet50)':'resnet10, pretrained=False, path=".")', '60, 3.5e-4':'1, 1e-3', 'far=.05':'far=.2'}.items():
        assert old in code
        code = code.replace(old, new)
    space = {}
    exec(code, space)
    assert space['learn'].model.trained and len(space['found'])==5
    assert {o.name for o in tmp_path.iterdir()}>={'person.pkl','street','model','person.onnx'}

def test_help_of_the_demo_is_quick():
    "Nothing heavy is imported for it"
    code = "import sys\nfrom pyramidreid.cli.frame import main\nmain(['demo','--help'])\nassert 'torch' not in sys.modules"
    assert 'epochs' in subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, check=True).stdout

def test_no_images_of_a_data_set_are_tracked():
    if not (root/'.git').exists(): pytest.skip('no git checkout')
    files = subprocess.run(['git','ls-files'], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert not [f for f in files if re.search(r'(^|/)-?\d{1,4}_c\d.*\.(jpg|png)$', f)]

def test_names_of_fastai_are_left_alone():
    "`from pyramidreid.all import *` gives all that `from fastai.vision.all import *` gives"
    import fastai.vision.all as theirs

    import pyramidreid.all as ours
    assert [n for n,o in vars(theirs).items() if not n.startswith('_') and getattr(ours, n, None) is not o]==[]
