"The command line: in this process, in a shell, in a terminal, in a pipe, interrupted"
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import click
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors import safe_open
from toys import THERMAL_RANGE, scaled_to_rgb, thermal_copy

import pyramidreid.cli.inputs
import pyramidreid.export.model_files
from pyramidreid.cli.entry import app, main
from pyramidreid.cli.inputs import held_out, image_files, open_model, read_data
from pyramidreid.data.datasets import market_table
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.export.onnx_runtime import Runtime
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.training.checkpoints import Checkpoints

root = Path(__file__).resolve().parent.parent
env = {**os.environ, 'OMP_NUM_THREADS':'1', 'COLUMNS':'100', 'TERM':'xterm'}
PROGRAM = [sys.executable,'-m','pyramidreid']
TRAINING = '--arch resnet10 --weights none --size 96 48 --workers 0'.split() # a small one, from scratch
SMALLER = '--size 48 24 --workers 0 --p 4 --k 4 --epochs 1'.split() # too small for six parts
unix = pytest.mark.skipif(os.name=='nt', reason='pseudo-terminals, signals and limits of Unix')
linux = pytest.mark.skipif(sys.platform!='linux', reason='other systems refuse such a file name')

# helpers

class Outcome(namedtuple('Outcome', 'code out err')):
    "What a command returned and printed"
    @property
    def json(self): return json.loads(self.out)

@pytest.fixture
def cli(capfd):
    "`cli(*args)`: run a command in this process"
    def run(*args):
        capfd.readouterr()
        code = main(args)
        return Outcome(code, *capfd.readouterr())
    return run

def in_shell(line, cwd):
    "Run a shell command, with this Python's program as `pyramidreid`"
    program = shlex.join(PROGRAM)
    script = f'pyramidreid() {{ {program} "$@"; }}\n{line}'
    done = subprocess.run(['bash','-c',script], cwd=cwd, env=env, capture_output=True, text=True, timeout=400)
    return Outcome(done.returncode, done.stdout, done.stderr)

def partial_files(path): return [o for o in Path(path).rglob('*') if o.name.startswith('.partial-')]
def keys(gallery): return sorted(Gallery.load(gallery).table.key)
def is_error(outcome): return outcome.code==2 and not outcome.out and re.search('^Error: ', outcome.err, re.M)
def never(*args, **kwargs): raise AssertionError('it was called')

@pytest.fixture(scope='module')
def desk(trained, people, tmp_path_factory):
    "A folder with people, a small model, the same exported to ONNX, and a gallery"
    folder = tmp_path_factory.mktemp('desk').resolve()
    shutil.copytree(people, folder/'people')
    model = trained.save_model(folder/'run'/'model')
    onnx,street = folder/'person.onnx',folder/'street'
    assert main(['export', folder/'run', '--to', 'onnx', '--out', onnx, '-q'])==0
    assert main(['gallery','add', street, folder/'people'/'bounding_box_test', '--model', onnx, '-q'])==0
    return SimpleNamespace(folder=folder, people=folder/'people', queries=image_files([folder/'people'/'query']),
                           model=model, onnx=onnx, street=street)

@pytest.fixture(scope='module')
def other_model(make_learner, tmp_path_factory):
    return make_learner(emb_sz=4).save_model(tmp_path_factory.mktemp('other')/'model')

# the guide and the overview

def guide_lines():
    "Commands of the guide, each with the exit code that the next cell asserts"
    notebook = json.loads((root/'nbs'/'guides'/'command_line.ipynb').read_text(encoding='utf-8'))
    cells = [''.join(o['source']) for o in notebook['cells'] if o['cell_type']=='code']
    lines,code = [],0
    for cell in reversed(cells):
        if cell.startswith('!pyramidreid'):
            lines.insert(0, (cell[1:].strip(), code))
            code = 0
        asserted = re.search(r'exit_code==(\d)', cell)
        if asserted: code = int(asserted[1])
    return lines

def overview_lines():
    "Commands of the overview, the first page of the guides"
    notebook = json.loads((root/'nbs'/'guides'/'overview.ipynb').read_text(encoding='utf-8'))
    text = '\n'.join(''.join(o['source']) for o in notebook['cells'] if o['cell_type']=='markdown')
    found = re.findall(r'^(?: {4}|\$ )?(pyramidreid [a-z-][^\n]*)', text, re.M)
    found += re.findall(r'`(pyramidreid [a-z-][^`\n]*)`', text)
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in found))

def smaller(line):
    "A command of the overview that needs neither real data nor much time"
    line = re.sub(r'Market-1501\S*', 'people', line)
    if line.startswith('pyramidreid demo'): return f'{line} --epochs 1'
    if line.startswith('pyramidreid train'): return ' '.join([line, *TRAINING, '--epochs', '1'])
    return line

def command_names(group=app, before=()):
    "The words that name each command"
    for name,command in group.commands.items():
        if isinstance(command, click.Group): yield from command_names(command, [*before,name])
        else: yield [*before,name]

def find_command(words):
    command = app
    while isinstance(command, click.Group): command,words = command.commands[words[0]],words[1:]
    return command,words

def test_guide_covers_every_command():
    lines = [line for line,_ in guide_lines()]
    assert len(lines)>=12
    used = [' '.join(names) for names in command_names() if any(f'pyramidreid {" ".join(names)}' in o for o in lines)]
    missing = {' '.join(names) for names in command_names()}-set(used)
    assert missing=={'demo','serve'} # one takes minutes, one waits for Ctrl-C; their own pages run them

def test_overview_uses_options_that_exist():
    lines = overview_lines()
    assert lines
    for line in lines:
        command,words = find_command(shlex.split(line)[1:])
        options = {o for param in command.params for o in param.opts}
        assert {o for o in words if o.startswith('-')}<=options, line

@pytest.mark.slow
@pytest.mark.parametrize('source', ['guide','overview'])
def test_commands_in_a_shell(tmp_path, source):
    lines = guide_lines() if source=='guide' else [(smaller(line), None) for line in overview_lines()]
    for line,code in lines:
        done = in_shell(line, tmp_path)
        said = f'{line}\n{done.out}\n{done.err}'
        assert done.code in ((0,1) if code is None else (code,)), said
        assert 'Traceback' not in said and not {'\r','\x1b'} & set(said), said
        if '--json' in line: assert isinstance(done.json, dict)
        if done.code==2: assert is_error(done), said
    assert not partial_files(tmp_path)

# help

def test_help_imports_nothing_heavy():
    "All help texts in one process: each has examples, none imports more than click"
    code = '''
import io, sys
from contextlib import redirect_stdout
import click
from pyramidreid.cli.entry import app, main

def walk(group, before):
    for name,command in group.commands.items():
        if isinstance(command, click.Group): yield from walk(command, [*before,name])
        yield [*before,name],isinstance(command, click.Group)

assert main(['--help'])==main(['--version'])==0
for names,is_group in walk(app, []):
    with redirect_stdout(io.StringIO()) as out: assert main([*names,'--help'])==0
    text = out.getvalue()
    assert is_group or ('Examples:' in text and f"pyramidreid {' '.join(names)} " in text+' '), names
heavy = {'torch','torchvision','fastai','pandas','numpy','matplotlib','PIL','scipy','safetensors','onnxruntime'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
'''
    subprocess.run([sys.executable,'-c',code], env=env, check=True)

def test_entry_point_and_module(tmp_path):
    found = entry_points(group='console_scripts', name='pyramidreid')
    assert [o.value for o in found][:1]==['pyramidreid.cli.entry:main']
    script = Path(sys.executable).with_name('pyramidreid')
    for program in ([script],PROGRAM):
        done = subprocess.run([*program,'--version'], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert version('pyramidreid') in done.stdout

def test_completion(tmp_path):
    words = dict(_PYRAMIDREID_COMPLETE='bash_complete', COMP_WORDS='pyramidreid gallery se', COMP_CWORD='2')
    done = subprocess.run(PROGRAM, env={**env,**words}, cwd=tmp_path, capture_output=True, text=True)
    assert 'search' in done.stdout

@pytest.mark.parametrize('group,names', [
    ([], 'draw demo doctor train evaluate embed export models gallery serve identify'),
    (['gallery'], 'add remove search calibrate info')], ids=['app','gallery'])
def test_help_lists_commands_in_order_of_use(group, names, cli, monkeypatch):
    "Each on one line, at the width of a common terminal"
    monkeypatch.setenv('COLUMNS', '80')
    out = cli(*group, '--help').out
    lines = out.split('Commands:\n')[1].split('\n\n')[0].splitlines()
    assert [o.split()[0] for o in lines]==names.split()
    assert all('...' not in o and len(o)<=80 for o in lines)

# interrupted

class Terminal:
    "A command in a pseudo-terminal"
    def __init__(self, args, cwd):
        import pty
        self.pid,self.fd = pty.fork()
        if not self.pid:
            os.chdir(cwd)
            os.execve(sys.executable, [*PROGRAM, *args], env)
        self.shown = b''

    def read(self):
        "Read what is shown next; False at the end"
        import select
        if not select.select([self.fd], [], [], .05)[0]: return True
        try: data = os.read(self.fd, 65536)
        except OSError: return False # the other side is gone
        self.shown += data
        return bool(data)

    def run(self, interrupt_if, timeout=300):
        "Press Ctrl-C once `interrupt_if(shown)`; return the exit code and what was shown"
        end,interrupted = time.monotonic()+timeout,False
        while self.read():
            if time.monotonic()>end: os.kill(self.pid, signal.SIGKILL)
            if not interrupted and interrupt_if(self.shown.decode('utf-8', 'replace')):
                os.write(self.fd, b'\x03')
                interrupted = True
        os.close(self.fd)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code,self.shown.decode('utf-8', 'replace')

@contextmanager
def signal_in_epoch_2(number, monkeypatch):
    "Send this process a signal when the second epoch of a training begins"
    before_epoch = Checkpoints.before_epoch
    def send(self):
        if self.epoch==1: os.kill(os.getpid(), number)
        return before_epoch(self)
    with monkeypatch.context() as m:
        m.setattr(Checkpoints, 'before_epoch', send)
        yield

@pytest.mark.slow
def test_interrupted_training_is_resumed(desk, cli, monkeypatch):
    "Ctrl-C: exit code 130, a complete checkpoint and nothing else; the command that the message names finishes the run"
    monkeypatch.chdir(desk.folder)
    out = desk.folder/'cut'
    with signal_in_epoch_2(signal.SIGINT, monkeypatch):
        done = cli('train', 'people', '--out', 'cut', '--epochs', 2, *TRAINING)
    assert done.code==130 and 'Traceback' not in done.err
    assert re.search(r'^epoch 1 of 2  .*mAP 0\.', done.out, re.M) and 'epoch 2' not in done.out
    assert not partial_files(out) and {o.name for o in out.iterdir()}=={'checkpoints'}
    resume = re.search(r'^pyramidreid (train .*--resume)$', done.err, re.M)[1]
    resumed = cli(*shlex.split(resume), '--json')
    assert resumed.code==0, resumed.err
    assert '1-0001.pth' in resumed.err and 'epoch 2 of 2' in resumed.err
    card = json.loads((out/'card.json').read_text(encoding='utf-8'))
    assert resumed.json['mAP']==pytest.approx(card['mAP'])
    assert open_model(out).emb_sz==2688

def test_terminated_training(desk, capfd, monkeypatch):
    "SIGTERM, as a queue sends it: exit code 143, and the log says how to resume"
    monkeypatch.chdir(desk.folder)
    with signal_in_epoch_2(signal.SIGTERM, monkeypatch), pytest.raises(SystemExit) as e:
        main(['train','people','--out','terminated','--epochs',2,*TRAINING])
    err = capfd.readouterr().err
    assert e.value.code==143 and 'Traceback' not in err
    assert re.search(r'Terminated\. .*terminated/checkpoints/1-\d{4}\.pth', err)
    assert re.search(r'^pyramidreid train .*--resume$', err, re.M)
    assert not partial_files('terminated')

@unix
@pytest.mark.slow
def test_ctrl_c_in_a_terminal(desk):
    "With bars. The wait spares the moment in which fastprogress draws one and swallows the interrupt"
    def has_checkpoint(shown):
        checkpoints = (desk.folder/'cut_tty'/'checkpoints').glob('1-*.pth')
        return any(time.time()-o.stat().st_mtime>.3 for o in checkpoints)
    args = ['train','people','--out','cut_tty','--epochs','20',*TRAINING]
    code,shown = Terminal(args, desk.folder).run(has_checkpoint)
    assert code==130 and 'Traceback' not in shown, shown
    assert '█' in shown and '\r' in shown
    assert re.search(r'[\r\n]1 +\d+\.\d{6} ', shown) and ' nan ' not in shown # the row of the first epoch
    assert not partial_files(desk.folder/'cut_tty')

@unix
@pytest.mark.slow
def test_sigterm_to_a_process(desk):
    args = ['train','people','--out','ended','--epochs','40',*TRAINING]
    process = subprocess.Popen([*PROGRAM,*args], cwd=desk.folder, env=env, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)
    checkpoints = desk.folder/'ended'/'checkpoints'
    while not list(checkpoints.glob('1-*.pth')) and process.poll() is None: time.sleep(.05)
    process.terminate()
    _,err = process.communicate(timeout=120)
    assert process.returncode==143 and 'Terminated.' in err and 'Traceback' not in err, err
    assert not partial_files(desk.folder/'ended')

def heed_hangups():
    "In a new process: do not ignore SIGHUP, as the tests may do under nohup"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

@unix
@pytest.mark.parametrize('name,code', [('SIGINT',130),('SIGTERM',143),('SIGHUP',129)])
def test_interrupted_while_embedding(desk, name, code):
    file = desk.folder/f'big-{code}.npz'
    args = ['embed','person.onnx',*['people/query']*1000,'--out',file.name]
    process = subprocess.Popen([*PROGRAM,*args], cwd=desk.folder, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=heed_hangups)
    assert 'Embedding 24,000 images' in process.stdout.readline()
    time.sleep(.2)
    process.send_signal(getattr(signal, name))
    _,err = process.communicate(timeout=60)
    assert process.returncode==code and 'Traceback' not in err, err
    assert not file.exists() and not partial_files(desk.folder)

@unix
def test_nohup_is_respected():
    "A signal that is ignored stays ignored, and the handlers of before come back"
    from pyramidreid.cli.frame import _exit_on_signals
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _exit_on_signals(): os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP)==signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(SystemExit, match='129'), _exit_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(1)
        assert signal.getsignal(signal.SIGHUP)==signal.SIG_DFL
    finally: signal.signal(signal.SIGHUP, before)

@unix
@pytest.mark.slow
def test_interrupted_while_adding_in_a_terminal(desk, tmp_path):
    "With a bar; the gallery remains what it was"
    lane,crowd = tmp_path/'lane',tmp_path/'crowd'
    shutil.copytree(desk.street, lane)
    for i in range(300): shutil.copytree(desk.people/'query', crowd/f'{i}')
    before = {o.name:o.read_bytes() for o in lane.iterdir()}
    args = ['gallery','add',lane,crowd,'--model',desk.onnx]
    # Not at the first █ already: fastprogress prints it in a bare except, which would swallow the interrupt
    code,shown = Terminal(list(map(str, args)), tmp_path).run(lambda shown: '% [' in shown)
    assert code==130 and 'Traceback' not in shown, shown
    assert {o.name:o.read_bytes() for o in lane.iterdir()}==before

def test_interrupted_while_writing(desk, monkeypatch, tmp_path):
    "The old file remains"
    def write_half(file, **arrays):
        Path(file).write_bytes(b'half')
        raise KeyboardInterrupt
    file = tmp_path/'emb.npz'
    file.write_bytes(b'old')
    monkeypatch.setattr(np, 'savez', write_half)
    assert main(['embed', desk.onnx, desk.people/'query', '--out', file])==130
    assert file.read_bytes()==b'old' and [o.name for o in tmp_path.iterdir()]==['emb.npz']

@unix
def test_reader_goes_away(tmp_path):
    assert in_shell('pyramidreid --help | true; exit ${PIPESTATUS[0]}', tmp_path).code==141

@unix
@pytest.mark.slow
def test_reader_of_an_answer_goes_away(desk):
    done = in_shell('pyramidreid gallery info street | true; exit ${PIPESTATUS[0]}', desk.folder)
    assert done.code==141 and not done.err

# evaluation and embeddings

@pytest.mark.parametrize('options', [dict(), dict(flip=True), dict(rerank=True)], ids=['plain','flip','rerank'])
def test_evaluation_is_that_of_the_learner(trained, desk, people, options, cli, tmp_path):
    card = trained.evaluate(**options)
    flags = [f'--{o}' for o in options]
    done = cli('evaluate', desk.model, people, *flags, '--json', '--card', tmp_path/'card.json')
    assert done.code==0
    for metric in ('mAP','rank1','rank5','mINP','mAP_trapezoid'):
        assert done.json[metric]==pytest.approx(getattr(card, metric), abs=1e-6)
    assert {**card.words(), 'data':''}=={**done.json['choices'], 'data':''}
    assert json.loads((tmp_path/'card.json').read_text(encoding='utf-8'))['n_query']==card.n_query

def test_evaluation_of_an_onnx_file(desk, cli):
    torch,onnx = [cli('evaluate', model, desk.people, '--json', '-q').json for model in (desk.model, desk.onnx)]
    assert torch['mAP']==pytest.approx(onnx['mAP'], abs=1e-4)
    assert torch['choices']['trained on']==onnx['choices']['trained on']

def read_safetensors(file):
    with safe_open(file, 'np') as f:
        about = f.metadata()
        return f.get_tensor('embeddings'),json.loads(about['names']),about['fingerprint']

def read_npz(file):
    with np.load(file) as f: return f['embeddings'],f['names'].tolist(),str(f['fingerprint'])

def read_embeddings_csv(file):
    df = pd.read_csv(file, index_col='fn')
    return df.to_numpy(),df.index.tolist(),None

@pytest.mark.parametrize('name,read', [
    ('e.safetensors',read_safetensors), ('e.npz',read_npz), ('e.csv',read_embeddings_csv)])
def test_formats_of_embeddings(trained, desk, cli, tmp_path, name, read):
    expected = trained.embed(trained.dls.test_dl(desk.queries)).numpy()
    done = cli('embed', desk.model, desk.people/'query', '--out', tmp_path/name, '--json')
    assert done.code==0 and (done.json['images'],done.json['dimensions'])==expected.shape
    embeddings,names,fingerprint = read(tmp_path/name)
    np.testing.assert_allclose(embeddings, expected, atol=2e-5)
    assert names==[str(o) for o in desk.queries]
    assert fingerprint in (None, open_model(desk.model).fingerprint)

def test_same_people_are_held_out(people, tmp_path):
    "By train and by evaluate, from a CSV file as from a folder"
    df = market_table(people)
    df[df.split=='train'].drop(columns='split').to_csv(tmp_path/'own.csv', index=False)
    for source in (people, tmp_path/'own.csv'):
        table = read_data(source)
        dls = ReIDDataLoaders.from_table(table, p=4, k=4, size=(48,24), valid_pct=.25, seed=7, num_workers=0)
        held,name = held_out(table, .25, seed=7)
        assert sorted(map(str, held.fn))==sorted(map(str, dls.valid.items.fn)) and name==dls.data_name

# training and the doctor

def test_one_folder_per_person(people, cli, tmp_path):
    mine,run = tmp_path/'mine',tmp_path/'run'
    for fn,pid in market_table(people).query('split=="train"')[['fn','pid']].itertuples(index=False):
        (mine/f'p{pid}').mkdir(parents=True, exist_ok=True)
        shutil.copy(fn, mine/f'p{pid}')
    assert read_data(mine).pid.nunique()==12
    assert cli('doctor', mine, '--quick').code==0
    options = '--epochs 1 --p 4 --k 4 --recipe paper --quiet'.split()
    done = cli('train', mine, '--out', run, *TRAINING, *options)
    assert done.code==0 and not done.err and 'train_loss' not in done.out and 'mAP' in done.out
    card = json.loads((run/'card.json').read_text(encoding='utf-8'))
    again = cli('evaluate', run, mine, '--hold-out', .2, '--json', '-q')
    assert again.json['mAP']==pytest.approx(card['mAP'], abs=1e-6)
    without = cli('evaluate', run, mine)
    assert without.code==2 and '--hold-out' in without.err and 'mAP' not in without.out

def test_thermal_pictures(people, cli, tmp_path):
    "Refused without a range, which then goes with the model"
    folder,run,options = thermal_copy(people, tmp_path/'thermal'),tmp_path/'run','--epochs 1 --p 4 --k 4 -q'.split()
    refused = cli('train', folder, '--out', run, *TRAINING, *options)
    assert is_error(refused) and '.png' in refused.err and '--pixel-range' in refused.err
    both = cli('train', folder, '--out', run, *TRAINING, '--measure-range', '--pixel-range', 1, 2)
    assert is_error(both) and 'use only one of them' in both.err
    done = cli('train', folder, '--out', run, *TRAINING, *options, '--pixel-range', *THERMAL_RANGE)
    assert done.code==0, done.err
    assert open_model(run).pixel_range==THERMAL_RANGE
    card = json.loads((run/'card.json').read_text(encoding='utf-8'))
    again = cli('evaluate', run, folder, '--json', '-q')
    assert again.json['mAP']==pytest.approx(card['mAP'], abs=1e-6)
    assert cli('embed', run, folder/'query', '--out', tmp_path/'q.npz', '-q').code==0
    scaled = tmp_path/'scaled'
    scaled.mkdir()
    for file in (folder/'query').iterdir(): scaled_to_rgb(file, *THERMAL_RANGE).save(scaled/file.name)
    assert cli('embed', run, scaled, '--out', tmp_path/'s.npz', '-q').code==0
    assert np.allclose(*(np.load(tmp_path/name)['embeddings'] for name in ('q.npz','s.npz')), atol=1e-5)
    assert cli('doctor', folder, '--json').json['ok']

def test_training_continues_a_model(desk, people, cli, tmp_path):
    base = ['train', people, '--weights', desk.model, *SMALLER]
    done = cli(*base, '--out', tmp_path/'run', '--cache', 'memory', '--json')
    assert done.code==0, done.err
    assert open_model(done.json['model']).about['n_parts']==3
    assert cli(*base, '--out', tmp_path/'other', '--arch', 'resnet18').code==2
    for arch in (f'local-dir:{tmp_path}', 'hf-hub:someone/net'): # no command could open the model
        unknown = cli('train', people, *SMALLER, '--weights', 'none', '--out', tmp_path/'x', '--arch', arch)
        assert is_error(unknown) and 'neither torchvision nor timm has this backbone' in unknown.err
    refused = cli(*base, '--out', tmp_path/'other', '--neck')
    assert refused.code==2 and 'has its own head, with or without a neck. Leave out --neck' in refused.err

def train_small(people, cli, out, *options):
    "Train a network from scratch on images of which a map has six rows"
    small = [*SMALLER, '--arch', 'resnet10', '--weights', 'none']
    small[small.index('48'):small.index('48')+2] = ['96','24']
    done = cli('train', people, '--out', out, *small, '--json', *options)
    assert done.code==0, done.err
    return done

def test_training_without_a_neck(people, cli, tmp_path):
    done = train_small(people, cli, tmp_path/'run', '--no-neck')
    assert 'neck' not in open_model(done.json['model']).about and "Not the paper's" not in done.out+done.err

def test_the_paper_s_recipe_has_the_paper_s_method(people, cli, tmp_path):
    done = train_small(people, cli, tmp_path/'run', '--recipe', 'paper')
    assert 'neck' not in open_model(done.json['model']).about
    assert "Not the paper's loaders" in done.out+done.err and "Not the paper's method" not in done.out+done.err

def test_training_with_a_neck(people, cli, tmp_path):
    done = train_small(people, cli, tmp_path/'run')
    assert open_model(done.json['model']).about['neck'] is True
    card = json.loads((tmp_path/'run'/'card.json').read_text(encoding='utf-8'))
    assert 'neck=True' in str(card)
    again = cli('evaluate', done.json['model'], people, '--json', '-q')
    assert again.json['mAP']==pytest.approx(card['mAP'], abs=1e-5) and 'neck=True' in again.json['choices']['pyramid']

def test_old_run_is_not_overwritten(people, cli, tmp_path):
    (tmp_path/'checkpoints').mkdir()
    (tmp_path/'checkpoints'/'1-0003.pth').write_bytes(b'')
    done = cli('train', people, '--out', tmp_path)
    assert is_error(done) and '1-0003.pth' in done.err and '--resume' in done.err

def test_doctor(people, cli, tmp_path):
    bad = tmp_path/'bad'
    shutil.copytree(people, bad)
    next((bad/'query').glob('*.jpg')).write_bytes(b'not an image')
    done = cli('doctor', bad, '--json', '--plot', tmp_path/'p.png')
    assert done.code==1 and done.json['findings'][0]['finding']=='unreadable'
    assert Image.open(tmp_path/'p.png').size[0]>500
    assert cli('doctor', people).code==0

# galleries

@pytest.fixture(scope='module')
def seen(desk, tmp_path_factory):
    "A gallery of eight images from a table: two people, two cameras, a time and a coat"
    folder = tmp_path_factory.mktemp('seen').resolve()
    files = desk.queries[:8]
    table,gallery = folder/'seen.csv',folder/'street'
    rows = [f'{os.path.relpath(file, folder)},{i//4},{i%2+1},2026-11-23 08:{i:02d},{"red" if i%2 else "blue"}'
            for i,file in enumerate(files)]
    table.write_text('\n'.join(['fn,pid,cam,time,coat',*rows,'']))
    assert main(['gallery','add', gallery, '--csv', table, '--model', desk.onnx, '-q'])==0
    return SimpleNamespace(gallery=gallery, table=table, files=files)

@pytest.fixture
def search(desk, seen, cli):
    "`search(*args)`: search for the first image in the gallery `seen`"
    base = ['gallery','search', seen.gallery, seen.files[0], '--model', desk.onnx, '--json', '-q']
    return lambda *args: cli(*base, *args)

def test_search(seen, search):
    done = search()
    matches = done.json['matches']
    similarities = [o['similarity'] for o in matches]
    assert done.code==0 and len(matches)==8
    assert similarities==sorted(similarities, reverse=True) and similarities[0]==pytest.approx(1, abs=1e-5)
    assert Path(matches[0]['key']).resolve()==seen.files[0].resolve()

def test_filters_of_a_search(search):
    def coats(*args): return {(o['cam'],o['coat']) for o in search(*args).json['matches']}
    assert coats('--exclude-cam', 1)=={(2,'red')}
    assert coats('--where', 'coat=="blue"')=={(1,'blue')}
    assert len(search('--since', '2026-11-23 08:05').json['matches'])==3
    assert len(search('-k', 2).json['matches'])==2
    assert search('--threshold', 1.5).code==1
    assert search('--exclude-cam', 1, '--exclude-cam', 2).code==1

@pytest.mark.parametrize('args', [
    ['--far','.1'], ['--where','colour==1'], ['--since','yesterday evening'], ['--exclude-cam','door'],
    ['--far','.1','--threshold','.5']], ids=' '.join)
def test_search_with_wrong_options(search, args):
    done = search(*args)
    assert is_error(done) and 'Traceback' not in done.err

def test_calibration(desk, seen, cli, tmp_path):
    street = tmp_path/'street'
    shutil.copytree(seen.gallery, street)
    calibrate = ['gallery','calibrate', street, desk.people, '--model', desk.onnx]
    search = ['gallery','search', street, seen.files[0], '--model', desk.onnx, '--json', '-q']
    done = cli(*calibrate, '--far', .2, '--json', '-q')
    low,high = done.json['interval']
    assert done.code==0 and low<.2<high and done.json['searches']==len(desk.queries)
    assert cli(*search, '--far', .2).out==cli(*search, '--threshold', done.json['threshold']).out
    assert cli('gallery','info', street, '--json').json['calibrated']['searches']==len(desk.queries)
    before = (street/'gallery.json').read_bytes()
    for far in (.0001, 2):
        assert cli(*calibrate, '--far', far).code==2
        assert (street/'gallery.json').read_bytes()==before

def test_add_again_and_remove(desk, seen, cli, tmp_path):
    street = tmp_path/'street'
    shutil.copytree(seen.gallery, street)
    add = ['gallery','add', street, '--csv', seen.table, '--model', desk.onnx]
    assert cli(*add).code==2
    assert '0 added, 8 in total' in cli(*add, '--skip-known').out
    info = cli('gallery','info', street, '--json').json
    assert (info['entries'],info['people'],info['cameras'],info['calibrated'])==(8,2,2,None)
    assert cli('gallery','remove', street, keys(street)[0]).code==0
    assert cli('gallery','remove', street, 'nobody').code==2
    assert cli('gallery','info', street, '--json').json['entries']==7

def test_info_as_text(seen, cli):
    lines = cli('gallery','info', seen.gallery).out.splitlines()
    values = dict(line.split(maxsplit=1) for line in lines)
    assert (values['entries'],values['people'],values['calibrated'])==('8','2','no')
    assert values['time']=='2026-11-23 08:00:00 to 2026-11-23 08:07:00'
    assert 'cam (number)' in values['columns'] and 'coat (text)' in values['columns']

def test_keys_are_text(desk, cli, tmp_path):
    street,table = tmp_path/'street',tmp_path/'seen.csv'
    add = ['gallery','add', street, '--csv', table, '--model', desk.onnx]
    files = desk.queries[:3]
    rows = [f'{file},{key},{i}' for i,(file,key) in enumerate(zip(files, ['0001','0002','']))]
    table.write_text('\n'.join(['fn,key,pid',*rows,'']))
    assert cli(*add).code==0
    assert keys(street)==sorted(['0001','0002',str(files[2])])
    shutil.copy(files[0], tmp_path/'0007')
    table.write_text('fn\n0007\n')
    assert cli(*add).code==0
    assert str(tmp_path/'0007') in keys(street)

@pytest.fixture
def three_images(desk, tmp_path, monkeypatch):
    "The working directory, with three images in the folder `in`"
    folder = tmp_path.resolve()
    (folder/'in'/'deep').mkdir(parents=True)
    for i,file in enumerate(desk.queries[:3]): shutil.copy(file, folder/'in'/f'{i}.jpg')
    monkeypatch.chdir(folder)
    return folder

def test_file_is_one_entry_however_it_is_typed(desk, cli, three_images, monkeypatch):
    folder,street = three_images,three_images/'street'
    def add(*files): return cli('gallery','add', street, *files, '--model', desk.onnx, '--json', '-q')
    assert add('in/0.jpg').json['entries']==1
    for cwd,typed in ((folder,folder/'in'/'0.jpg'), (folder/'in','0.jpg'), (folder/'in'/'deep','../0.jpg')):
        monkeypatch.chdir(cwd)
        done = add(typed)
        assert done.code==2 and 'already' in done.err
        assert add(typed, '--skip-known').json==dict(gallery=str(street), added=0, skipped=1, entries=1)
    monkeypatch.chdir(folder)
    assert add('in', 'in/1.jpg', '--skip-known').json['added']==2 # a folder, and a file in it
    assert keys(street)==[str(folder/'in'/f'{i}.jpg') for i in range(3)]
    out = cli('gallery','search', 'street', 'in/1.jpg', '--model', desk.onnx).out
    assert out.splitlines()[1].split()[-1]==os.path.join('in','1.jpg')

def test_remove_by_file(desk, cli, three_images, monkeypatch):
    assert cli('gallery','add', 'street', 'in', '--model', desk.onnx).code==0
    monkeypatch.chdir('in')
    assert cli('gallery','remove', '../street', '1.jpg', three_images/'in'/'2.jpg').code==0
    assert keys('../street')==[str(three_images/'in'/'0.jpg')]
    done = cli('gallery','remove', '../street', '9.jpg')
    assert done.code==2 and "'9.jpg'" in done.err
    done = cli('gallery','remove', '../street', '0.jpg', '../in/0.jpg')
    assert done.out.startswith('../street: 1 removed, 0 in total')
    search = ['gallery','search', '../street', '0.jpg', '--model', desk.onnx]
    for args in ([],['--far','.1']):
        done = cli(*search, *args)
        assert done.code==1 and not done.err and 'Nobody was found.' in done.out
    assert cli(*search, '--json').json['matches']==[]

def test_all_kinds_of_images_are_found(desk, cli, tmp_path):
    image = Image.open(desk.queries[0])
    for name in ('a.webp','c.png','d.tiff'): image.save(tmp_path/name)
    image.save(tmp_path/'b.JFIF', 'JPEG')
    for name in ('._a.jpg','notes.txt','film.mpg','paper.pdf'): (tmp_path/name).write_bytes(b'not an image')
    (tmp_path/'.trash').mkdir()
    image.save(tmp_path/'.trash'/'e.jpg')
    assert [o.name for o in image_files([tmp_path])]==['a.webp','b.JFIF','c.png','d.tiff']
    done = cli('gallery','add', tmp_path/'street', tmp_path, '--model', desk.onnx, '--json', '-q')
    assert done.json['added']==4

@pytest.mark.parametrize('table,args,message', [
    (None, ['{2}','--pid','ann'], '--pid ann: this column of the gallery holds numbers'),
    (None, ['{2}','--time','tomorrow'], "'time'"),
    (['fn,pid,coat','{2},7,3'], [], "'coat'"),
    (['fn,pid','{2},ann'], [], "'pid'"),
    (['fn,key','{2},x','{3},x'], [], 'same key as another'),
    (['fn','{2}'], ['{2}'], 'same key as another'),
    (['fn','{2}','gone.jpg'], [], '1 of 2 files do not exist')],
    ids=['pid','time','number for text','text for number','two keys','twice','missing file'])
def test_wrong_entries_are_refused_before_embedding(desk, seen, cli, tmp_path, monkeypatch, table, args, message):
    monkeypatch.setattr('pyramidreid.cli.inputs.embed_files', never)
    files = [None,None,*desk.queries[8:10]]
    args = [o.format(*files) for o in args]
    if table:
        (tmp_path/'new.csv').write_text('\n'.join([*table,'']).format(*files))
        args += ['--csv', tmp_path/'new.csv']
    done = cli('gallery','add', seen.gallery, *args, '--model', desk.onnx)
    assert is_error(done) and message in done.err

@linux
def test_file_name_that_is_not_utf8(desk, tmp_path):
    bad = os.fsencode(tmp_path)+b'/caf\xe9.jpg'
    shutil.copy(os.fsencode(desk.queries[0]), bad)
    args = [b'gallery',b'add',b'there',bad,b'--model',b'person.onnx']
    done = subprocess.run([*PROGRAM,*args], cwd=desk.folder, env=env, capture_output=True, text=True)
    assert done.returncode==2 and 'caf\\udce9.jpg' in done.stderr and 'not UTF-8' in done.stderr
    assert not (desk.folder/'there').exists()

@linux
def test_a_csv_file_has_no_name_that_is_not_utf8(desk, cli, tmp_path, monkeypatch):
    "It is refused before anything is embedded; the other formats keep it"
    bad = os.fsdecode(os.fsencode(tmp_path)+b'/caf\xe9.jpg')
    shutil.copy(desk.queries[0], bad)
    assert cli('embed', desk.model, tmp_path, '--out', tmp_path/'e.npz').code==0
    monkeypatch.setattr('pyramidreid.cli.inputs.embed_files', never)
    done = cli('embed', desk.model, tmp_path, '--out', tmp_path/'e.csv')
    assert is_error(done) and 'caf\\udce9.jpg' in done.err and '.npz or .safetensors' in done.err
    assert not (tmp_path/'e.csv').exists()

@pytest.mark.parametrize('existing', [False,True], ids=['new gallery','existing gallery'])
def test_another_command_was_faster(desk, cli, tmp_path, monkeypatch, existing):
    "Two commands add at the same time: the second is told to run again, and then both are there"
    inputs = pyramidreid.cli.inputs
    embed_files = inputs.embed_files
    first,second,third = desk.queries[:3]
    def add(file): return cli('gallery','add', tmp_path/'street', file, '--model', desk.onnx, '-q')
    def embed_after_another_command(*args):
        monkeypatch.setattr(inputs, 'embed_files', embed_files)
        assert add(second).code==0
        return embed_files(*args)
    if existing: assert add(third).code==0
    monkeypatch.setattr(inputs, 'embed_files', embed_after_another_command)
    done = add(first)
    assert done.code==2 and 'Nothing was added: run the command again' in done.err
    assert add(first).code==0 and len(keys(tmp_path/'street'))==2+existing

def test_only_own_warnings_are_shown(desk, cli, tmp_path, monkeypatch):
    street,few,model = tmp_path/'street',tmp_path/'few.csv',['--model',desk.onnx]
    df = market_table(desk.people).query('split!="train" and pid>0')
    df[df.pid.isin(df.pid.unique()[:5])].to_csv(few, index=False)
    assert cli('gallery','add', street, desk.people, *model).code==0
    done = cli('gallery','calibrate', street, few, *model, '--far', .3, '--json')
    assert done.code==0 and isinstance(done.json, dict)
    assert [o[:9] for o in done.err.splitlines()].count('Warning: ')==1

    search = Gallery.search
    def search_with_warning(*args, **kwargs):
        warnings.warn('of another library', stacklevel=2)
        return search(*args, **kwargs)
    monkeypatch.setattr(Gallery, 'search', search_with_warning)
    args = ['gallery','search', street, df.fn.iloc[0], *model, '--far', .3]
    for _ in range(2): # also the second time
        done = cli(*args)
        assert done.code==0 and re.fullmatch(r'Warning: .*calibration.*\n', done.err) and 'Warning' not in done.out
    assert not cli(*args, '--quiet').err
    with pytest.warns(UserWarning, match='of another library'): cli(*args, '--debug')

def test_devices_of_an_onnx_file(desk, cli):
    import onnxruntime
    embed = ['embed', desk.onnx, desk.queries[0], '--out', desk.folder/'device.npz', '--device']
    assert cli(*embed, 'cpu').code==0
    for device in ('gpu','cuda:','cuda:x','cuda:-1','tpu'):
        done = cli(*embed, device)
        assert is_error(done) and f'--device {device}: an ONNX file runs on cpu, cuda' in done.err
    if 'CUDAExecutionProvider' not in onnxruntime.get_available_providers():
        done = cli(*embed, 'cuda:1')
        assert done.code==2 and 'Error: --device cuda:1: onnxruntime finds no such GPU' in done.err

def test_device_is_passed_to_onnxruntime(desk, monkeypatch):
    import onnxruntime
    asked,real_session = [],onnxruntime.InferenceSession
    class Session:
        def __init__(self, data, options, providers):
            asked.append(providers[0])
            self.real = real_session(data, options, providers=['CPUExecutionProvider'])
            self.names = [o[0] if isinstance(o, tuple) else o for o in providers]
        def get_providers(self): return self.names
        def __getattr__(self, name): return getattr(self.real, name)
    monkeypatch.setattr(onnxruntime, 'InferenceSession', Session)
    for device in ('cuda','cuda:3',None,'cpu'): open_model(desk.onnx, device)
    cuda = [('CUDAExecutionProvider', dict(device_id=i)) for i in (0,3)]
    assert asked==[*cuda,'CPUExecutionProvider','CPUExecutionProvider']

def test_what_runs_without_torch(desk, tmp_path):
    "And the message where torch is needed"
    code = '''
import json, sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch','torchvision','fastai'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Forbid())
from pyramidreid.cli.entry import main
print(json.dumps([main(args) for args in json.loads(sys.argv[1])]))'''
    query,street,model = str(desk.queries[0]),str(tmp_path/'street'),['--model','person.onnx']
    works = [['gallery','add',street,'people/query',*model], ['gallery','search',street,query,*model],
             ['gallery','info',street], ['gallery','remove',street,query],
             ['embed','person.onnx',query,'--out',str(tmp_path/'e.npz')]]
    fails = [['embed','person.onnx',query,'--out',str(tmp_path/'f.npz'),'--flip'],
             ['gallery','calibrate',street,'people',*model,'--far','.1']]
    done = subprocess.run([sys.executable,'-W','ignore','-c',code,json.dumps(works+fails)], cwd=desk.folder, env=env,
                          capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])==[0]*len(works)+[2]*len(fails), done.stderr
    assert done.stderr.count('is not installed, but this command needs it')==len(fails)

def test_gallery_of_another_model(desk, other_model, cli):
    done = cli('gallery','search', desk.street, desk.queries[0], '--model', other_model)
    assert is_error(done)
    for model in (desk.model, other_model): assert open_model(model).fingerprint[:8] in done.err

def test_search_result_as_text(desk, cli, tmp_path, monkeypatch):
    "The key is last, a dash stands for a gap, and no name moves the cursor of the terminal"
    monkeypatch.chdir(tmp_path)
    odd,model = 'new\nline\x1b[31m\u202e.jpg',['--model',desk.onnx]
    shutil.copy(desk.queries[0], 'a b.jpg')
    shutil.copy(desk.queries[1], odd)
    Path('seen.csv').write_text('fn,pid\na b.jpg,3\n')
    assert cli('gallery','add', 'street', '--csv', 'seen.csv', *model).code==0
    assert cli('gallery','add', 'street', odd, *model).code==0
    done = cli('gallery','search', 'street', 'a b.jpg', *model)
    head,*rows = done.out.splitlines()
    assert done.code==0 and head.split()==['similarity','pid','key']
    assert [o.split(maxsplit=2)[2] for o in rows]==['a b.jpg', r'new\nline\x1b[31m\u202e.jpg']
    assert [o.split()[1] for o in rows]==['3','–'] and rows[0].split()[0]=='1.0000'
    assert not any(o.endswith(' ') for o in (head,*rows))
    matches = cli('gallery','search', 'street', 'a b.jpg', *model, '--json').json['matches']
    assert matches[1]['key'].endswith(odd)

# numbers

@pytest.mark.parametrize('line', [
    'gallery search {street} {query} --model {onnx} --threshold nan',
    'gallery search {street} {query} --model {onnx} --threshold inf',
    'gallery search {street} {query} --model {onnx} --far nan',
    'gallery search {street} {query} --model {onnx} --far 0',
    'gallery calibrate {street} {people} --model {onnx} --far nan',
    'train {people} --out {new} --lr nan',
    'train {people} --out {new} --hold-out nan'])
def test_numbers_out_of_range(desk, cli, tmp_path, line):
    words = dict(vars(desk), query=desk.queries[0], new=tmp_path/'new')
    args = [o.format(**words) for o in line.split()]
    done = cli(*args)
    assert is_error(done) and f"Invalid value for '{args[-2]}'" in done.err

def test_rate_out_of_reach_is_refused_before_embedding(desk, cli, monkeypatch):
    monkeypatch.setattr('pyramidreid.cli.inputs.embed_files', never)
    calibrate = ['gallery','calibrate', desk.street, desk.people, '--model', desk.onnx, '--far']
    done = cli(*calibrate, '.001')
    assert is_error(done) and '24 queries' in done.err and 'at least 1,000' in done.err
    done = cli(*calibrate, 1/24) # just within reach
    assert done.code==3 and 'it was called' in done.err

# where nothing can be written

@pytest.mark.parametrize('line', [
    'train {people} --out {new}/deep/run',
    'draw {new}/people',
    'embed {model} {query} --out {new}/e.npz',
    'export {model} --to onnx --out {new}/m.onnx',
    'evaluate {model} {people} --card {new}/c.json',
    'doctor {people} --plot {new}/p.png',
    'gallery add {new}/street {query} --model {onnx}',
    'gallery remove {new}/street {query}',
    'gallery calibrate {new}/street {people} --model {onnx}'])
def test_no_permission_to_write_is_reported_first(desk, cli, tmp_path, monkeypatch, line):
    for name in ('cli.inputs.embed_files', 'cli.inputs.open_model', 'data.loaders.ReIDDataLoaders.from_table',
                 'synth.dataset.synth_persons', 'data.doctor_report.doctor'):
        monkeypatch.setattr(f'pyramidreid.{name}', never)
    monkeypatch.setattr(os, 'access', lambda path, mode, **kwargs: not mode & os.W_OK)
    words = dict(vars(desk), query=desk.queries[0], new=tmp_path)
    done = cli(*line.format(**words).split())
    assert is_error(done) and 'cannot be written: no permission to write in' in done.err
    assert not list(tmp_path.iterdir())

def test_reading_needs_no_permission_to_write(desk, cli, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode, **kwargs: not mode & os.W_OK)
    assert cli('gallery','info', desk.street).code==0

@contextmanager
def full_disk(n_bytes):
    "Let no file grow beyond `n_bytes`"
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes,limits[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)

@unix
@pytest.mark.parametrize('name', ['e.npz','e.csv','e.safetensors','street'])
def test_full_disk(desk, cli, tmp_path, name):
    "Exit code 2, the name of what could not be written, and nothing left behind"
    out = tmp_path/name
    if name=='street': args = ['gallery','add', out, desk.people/'query', '--model', desk.onnx]
    else: args = ['embed', desk.onnx, desk.people/'query', '--out', out]
    cli('--version') # whatever is imported late, or written to a cache, is done before
    with full_disk(2_000): done = cli(*args)
    assert done.code==2 and f'{out} could not be written: ' in done.err
    assert 'Errno' not in done.err and 'partial' not in done.err
    files = {o.name for o in tmp_path.rglob('*') if o.is_file()}
    assert files==({'gallery.json','gallery.lock'} if name=='street' else set()) and not partial_files(tmp_path)

def test_failed_first_add_leaves_the_folder_free(desk, other_model, cli, tmp_path, monkeypatch):
    "Also for another model"
    street = tmp_path/'street'
    def full(*args): raise OSError(28, 'No space left on device')
    def add(model): return cli('gallery','add', street, desk.queries[0], '--model', model)
    with monkeypatch.context() as m:
        m.setattr('pyramidreid.gallery.store.write_embeddings', full)
        done = add(desk.onnx)
        assert done.code==2 and done.err==f"Error: {street} could not be written: No space left on device\n"
    assert add(other_model).code==0 and len(keys(street))==1

@unix
@pytest.mark.parametrize('streams', [
    '<&- >&- 2>&-', pytest.param('<&-', marks=pytest.mark.slow), pytest.param('>&-', marks=pytest.mark.slow),
    pytest.param('2>&-', marks=pytest.mark.slow)])
def test_closed_streams(desk, tmp_path, streams):
    "As in some cron jobs"
    file = tmp_path/'e.npz'
    done = in_shell(f'pyramidreid embed person.onnx {desk.queries[0]} --out {file} {streams}', desk.folder)
    assert done.code==0 and not done.err, done.err
    with np.load(file) as arrays: assert len(arrays['embeddings'])==1

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
@pytest.mark.parametrize('line', [
    'pyramidreid --help', pytest.param('pyramidreid gallery info street', marks=pytest.mark.slow)])
def test_full_stdout(desk, line):
    done = in_shell(f'{line} >/dev/full', desk.folder)
    assert done.code==2 and done.err.startswith('Error: ') and 'Traceback' not in done.err

@pytest.mark.parametrize('command', [
    'evaluate {model} {people} --json', 'embed {model} {file} --out {new}/e.npz',
    pytest.param('gallery add {new}/street {file} --model {model}', marks=pytest.mark.slow)])
def test_an_untrained_model_says_so(desk, other_model, cli, tmp_path, command):
    words = command.format(model=other_model, people=desk.people, file=desk.queries[0], new=tmp_path)
    done = cli(*words.split())
    assert done.code==0 and done.err.count('This model has not been trained')==1
    if '--json' in words: assert done.json['choices']['trained on']=='nothing: untrained (random weights)'

# errors of other libraries, in words

def test_unknown_backbone(people, cli, tmp_path):
    done = cli('train', people, '--out', tmp_path/'run', *SMALLER, '-q', '--arch', 'resnet19')
    assert done.code==2 and '--arch resnet19: neither torchvision nor timm' in done.err
    assert not (tmp_path/'run').exists()

def test_failed_download(people, cli, tmp_path, monkeypatch):
    def no_route(*args): raise URLError('no route to host')
    monkeypatch.setattr('pyramidreid.models.backbone._new_model', no_route)
    done = cli('train', people, '--out', tmp_path/'run', *SMALLER, '-q', '--arch', 'resnet18')
    assert done.code==2 and 'resnet18 could not be downloaded (no route to host)' in done.err
    assert '--weights FILE' in done.err and '--weights none' in done.err
    assert not (tmp_path/'run').exists()

def test_loss_that_is_not_finite(people, cli, tmp_path):
    options = '--p 4 --k 4 --epochs 1 --lr 1e9 -q'.split()
    done = cli('train', people, '--out', tmp_path/'run', *TRAINING, *options)
    assert done.code==2 and done.err.startswith('Error: The loss is nan') and 'Exception occ' not in done.err

@pytest.mark.parametrize('command', ['doctor', 'evaluate {model}', 'train --out {new}'])
def test_data_that_is_not_recognised(desk, people, cli, tmp_path, command):
    "The same for all commands that take DATA"
    args = command.format(model=desk.model, new=tmp_path/'run').split()
    (tmp_path/'unpacked'/'bounding_box_train').mkdir(parents=True)
    done = cli(*args, desk.queries[0])
    assert done.code==2 and 'is a file, but not a .csv' in done.err
    done = cli(*args, tmp_path/'unpacked')
    assert done.code==2 and done.err.count('--dataset NAME')==1
    done = cli(*args, people, '--dataset', 'viper')
    assert done.code==2 and 'market1501' in done.err and '--dataset NAME' not in done.err

def test_csv_in_capitals(people, cli, tmp_path):
    market_table(people).to_csv(tmp_path/'ALL.CSV', index=False)
    assert cli('doctor', tmp_path/'ALL.CSV', '--quick').code==0

# wrong usage and input

@pytest.fixture(scope='module')
def damaged(desk, tmp_path_factory):
    "A folder of files and folders with something wrong"
    folder = tmp_path_factory.mktemp('damaged')
    cut = folder/'cut.jpg'
    cut.write_bytes(desk.queries[0].read_bytes()[:300])
    (folder/'empty').mkdir()
    (folder/'no_fn.csv').write_text('a,b\n1,2\n')
    (folder/'no_pid.csv').write_text(f'fn\n{cut}\n')
    (folder/'bad.onnx').write_bytes(b'not a model')
    return folder

@pytest.mark.filterwarnings('ignore:The ranges of int8')
@pytest.mark.parametrize('option', [['--half'], ['--int8','{people}/query']], ids=['half', 'int8'])
def test_small_exports(desk, cli, tmp_path, option):
    "Smaller than the whole model, close to it, and with a fingerprint of its own, which is the one that is printed"
    option = [o.format(**vars(desk)) for o in option]
    done = cli('export', desk.model, '--to', 'onnx', '--out', tmp_path/'small.onnx', *option)
    small,whole = Runtime(tmp_path/'small.onnx'),Runtime(desk.onnx)
    assert done.code==0 and small.fingerprint in done.out and small.fingerprint!=whole.fingerprint
    assert (tmp_path/'small.onnx').stat().st_size<.6*desk.onnx.stat().st_size
    assert (small.embed(desk.queries)*whole.embed(desk.queries)).sum(1).mean()>.95

@pytest.mark.parametrize('layout', ['nchw','nchw-imagenet'])
def test_export_for_trackers(desk, cli, tmp_path, layout):
    done = cli('export', desk.model, '--to', 'onnx', '--out', tmp_path/'tracker.onnx', '--layout', layout)
    made,whole = Runtime(tmp_path/'tracker.onnx'),Runtime(desk.onnx)
    assert done.code==0 and made.layout==layout and made.fingerprint==whole.fingerprint
    assert abs(made.embed(desk.queries)-whole.embed(desk.queries)).max()<1e-4

def test_int8_takes_crops_from_all_of_a_large_folder(monkeypatch):
    from pyramidreid.cli import inputs, models
    from pyramidreid.export import model_files, small_onnx
    for n,expected in ((1,1), (500,500), (501,251), (1_250,417), (100_000,500)):
        taken = []
        monkeypatch.setattr(inputs, 'image_files', lambda paths, n=n: list(range(n)))
        monkeypatch.setattr(model_files, 'write_onnx', lambda net, about, file, layout: file)
        monkeypatch.setattr(small_onnx, 'quantize_onnx', lambda whole, out, crops, taken=taken: taken.extend(crops))
        models._write_int8(SimpleNamespace(net=None), {}, 'out.onnx', 'crops', 'nhwc')
        assert len(taken)==expected and taken[0]==0 and taken[-1]>=.99*(n-1)-1

WRONG = [
    ('trian', "Did you mean 'train'"),
    ('train {people} --epoch 1', '--epochs'),
    ('train {people} --epochs 0', '0 is not in the range'),
    ('train nowhere', 'nowhere'),
    ('train', "Missing argument 'DATA'"),
    ('train {people} --out {new} --p 50', 'p=50'),
    ('train {people} --out {new} --weights no.pth', 'no.pth'),
    ('train {people} --out {new} --dataset viper', "'viper'"),
    ('train {damaged}/no_fn.csv --out {new}', "no column 'fn'"),
    ('train {damaged}/no_pid.csv --out {new}', "no column 'pid'"),
    ('train {people}/query --out {new}', '--dataset NAME'),
    ('train {damaged}/empty --out {new}', 'damaged'),
    ('evaluate {people} {people}', 'There is no model'),
    ('evaluate {damaged}/bad.onnx {people}', 'bad.onnx'),
    ('evaluate {model} {damaged}/empty', 'empty'),
    ('embed {model} {damaged}/cut.jpg --out {new}/e.npz', 'cut.jpg'),
    ('embed {model} {damaged}/empty --out {new}/e.npz', 'no images'),
    ('embed {model} {people}/query --out {new}/e.pkl', '.safetensors'),
    ('embed {model} {people}/query --out {damaged}/cut.jpg/e.npz', 'cut.jpg'),
    ('embed {model} {people}/query', "Missing option '--out'"),
    ('export {model} --to onnx --out {new}/m.pt2', '.onnx'),
    ('export {onnx} --to onnx --out {new}/m.onnx', 'already exported'),
    ('export {model} --to pt2 --out {new}/m.pt2 --half', 'for --to onnx'),
    ('export {model} --to onnx --out {new}/m.onnx --half --int8 {people}', 'use only one'),
    ('export {model} --to pt2 --out {new}/m.pt2 --layout nchw', 'are for --to onnx'),
    ('export {model} --to onnx --out {new}/m.onnx --int8 {damaged}/empty', 'no images'),
    ('gallery info {damaged}', 'no gallery'),
    ('gallery search {new} {damaged}/cut.jpg --model {model}', 'no gallery'),
    ('gallery add {new} --model {model}', 'Nothing to add'),
    ('gallery add {new} {damaged}/cut.jpg --model {model}', 'cut.jpg'),
    ('doctor {people} --plot x.doc', '.png')]

@pytest.mark.parametrize('line,message', WRONG, ids=[line for line,_ in WRONG])
def test_wrong_usage_and_input(desk, damaged, cli, tmp_path, line, message):
    new = tmp_path/'new'
    words = dict(vars(desk), damaged=damaged, new=new)
    done = cli(*[o.format(**words) for o in line.split()])
    assert done.code==2 and message in done.err and 'Traceback' not in done.err
    assert any(o.startswith('Error: ') for o in done.err.splitlines())
    assert not new.exists()

def test_bugs_of_ours(monkeypatch, people, cli):
    def broken(*args, **kwargs): raise KeyError('x')
    monkeypatch.setattr('pyramidreid.data.doctor_report.doctor', broken)
    done = cli('doctor', people)
    assert done.code==3 and 'Traceback' not in done.err and '--debug' in done.err
    done = cli('doctor', people, '--debug')
    assert done.code==3 and 'Traceback' in done.err

@unix
def test_stdout_without_unicode(monkeypatch, people, tmp_path):
    "A name that stdout cannot encode is printed with question marks"
    (tmp_path/'Łódź').symlink_to(people)
    stream = TextIOWrapper(BytesIO(), encoding='latin-1')
    monkeypatch.setattr(sys, 'stdout', stream)
    assert main(['doctor', tmp_path/'Łódź', '--quick'])==0
    stream.flush()
    assert '?ód?: '.encode('latin-1') in stream.buffer.getvalue()

# What is neither a file nor a folder

def pipe(path): os.mkfifo(path)

def unix_socket(path):
    here = os.getcwd()
    os.chdir(path.parent) # names of sockets are short
    with socket.socket(socket.AF_UNIX) as o: o.bind(path.name)
    os.chdir(here)

def null_device(path): path.symlink_to('/dev/null')

@pytest.mark.skipif(os.name=='nt', reason='needs Unix')
@pytest.mark.parametrize('make,kind', [(pipe,'a pipe (FIFO)'),(unix_socket,'a socket'),(null_device,'a device')])
@pytest.mark.parametrize('line', [
    'embed {odd} x.jpg --out x.npz', 'embed . {odd} --out x.npz', 'gallery add g {odd} --model .',
    'gallery add g --csv {odd} --model .', 'gallery search g {odd} --model .', 'gallery search g x.jpg --model {odd}',
    'doctor {odd}', 'train {odd}', 'evaluate . {odd}'])
def test_a_pipe_is_said_to_be_one(tmp_path, monkeypatch, capfd, line, make, kind):
    monkeypatch.chdir(tmp_path)
    make(tmp_path/'odd')
    (tmp_path/'x.jpg').touch()
    assert main(line.format(odd='odd').split())==2
    assert f'odd is not a regular file but {kind}' in capfd.readouterr().err

@pytest.mark.skipif(os.name=='nt', reason='needs Unix')
def test_files_for_commands_of_others_are_regular(tmp_path):
    pipe(tmp_path/'odd')
    with pytest.raises(ValueError, match='odd is not a regular file but a pipe'): image_files([tmp_path/'odd'])
    with pytest.raises(FileNotFoundError, match='other does not exist'): image_files([tmp_path/'other'])
    (tmp_path/'self').symlink_to('self')
    with pytest.raises(ValueError, match='self is not a regular file but a link to itself'):
        image_files([tmp_path/'self'])
