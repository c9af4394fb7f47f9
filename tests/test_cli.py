"The command line as a person or a program meets it: in a shell, in a terminal, in a pipe, interrupted"
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import entry_points, version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import pyramidreid.export.files
from pyramidreid.cli.frame import main
from pyramidreid.cli.inputs import held_out, image_files, open_model, read_data
from pyramidreid.core import atomic_write
from pyramidreid.data.datasets import market_table
from pyramidreid.data.loaders import ReIDDataLoaders

root = Path(__file__).resolve().parent.parent
env = {**os.environ, 'PATH':os.pathsep.join([sysconfig.get_path('scripts'), os.environ.get('PATH','')]), 'OMP_NUM_THREADS':'1', 'COLUMNS':'100', 'TERM':'xterm'}
env.pop('PYTHONPATH', None)
terminal = pytest.mark.skipif(os.name=='nt', reason='pseudo-terminals and their signals are of Unix')
SMALL = '--arch resnet10 --weights none --size 96 48 --workers 0'

def page():
    "Commands of the page, each with the exit code that the page asserts"
    cells = [''.join(c['source']) for c in json.loads((root/'nbs'/'56_command_line.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    after = dict(zip(cells, cells[1:]+['']))
    code = lambda c: int(m[1]) if (m:=re.search(r'exit_code==(\d)', after[c])) else 0
    return [(line[1:],code(c)) for c in cells for line in c.splitlines() if line.startswith('!pyramidreid')]

def readme():
    "Commands of the README, made smaller where a training or a real data set is meant"
    text = (root/'README.md').read_text(encoding='utf-8')
    found = re.findall(r'^(?: {4}|\$ )?(pyramidreid [a-z-][^\n]*)', text, re.M)+re.findall(r'`(pyramidreid [a-z-][^`\n]*)`', text)
    lines = [shlex.join(shlex.split(o, comments=True)) for o in found]
    more = lambda o: o+' --epochs 1' if o.startswith('pyramidreid demo') else f'{o} {SMALL} --epochs 1' if o.startswith('pyramidreid train') and 'resnet10' not in o else o
    return [more(re.sub(r'Market-1501\S*', 'people', o)) for o in dict.fromkeys(lines)]

def sh(line, cwd, **kwargs): return subprocess.run(line, shell=True, cwd=cwd, env=env, capture_output=True, text=True, timeout=400, **kwargs)
def rubbish(path): return [o for o in Path(path).rglob('*') if o.name.startswith('.partial-')]

@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "A folder in which all commands of page and README were typed into a shell, and what came of each"
    d = tmp_path_factory.mktemp('desk')
    lines = page()
    known = {shlex.join(shlex.split(o)) for o,_ in lines}
    lines += [(o,None) for o in readme() if o not in known]
    return d,[(line,code,sh(line, d)) for line,code in lines]

# every command as typed

def test_commands_of_page_and_readme(desk):
    d,done = desk
    assert len(done)>=12
    for line,code,res in done:
        said = f'{line}\n{res.stdout}\n{res.stderr}'
        assert res.returncode in ((0,1) if code is None else (code,)), said
        assert 'Traceback' not in said and not {'\r','\x1b'} & set(res.stdout+res.stderr), said
        if '--json' in line: assert isinstance(json.loads(res.stdout), dict)
        if res.returncode==2: assert not res.stdout and res.stderr.rstrip().splitlines()[-1].startswith('Error: ')
    assert not rubbish(d)

def test_page_covers_every_command():
    import click

    from pyramidreid.cli.frame import app
    def names(group, before=''):
        for k,c in group.commands.items(): yield from names(c, f'{before}{k} ') if isinstance(c, click.Group) else [f'{before}{k}']
    typed = [o.removeprefix('pyramidreid ') for o,_ in page()]
    assert {o for o in names(app) if not any(t.startswith(o) for t in typed)}<={'demo'} # takes minutes; the tests of packaging and its own page run it

def test_lines_in_a_pipe(desk):
    out = next(res.stdout for line,_,res in desk[1] if line.startswith('pyramidreid train'))
    epochs = [o for o in out.splitlines() if o.startswith('epoch ')]
    assert [o.split('  ')[0] for o in epochs]==[f'epoch {i} of 6' for i in range(1,7)] and all('mAP 0.' in o for o in epochs)
    assert 'images' in next(res.stdout for line,_,res in desk[1] if line.startswith('pyramidreid embed'))

# nothing heavy

def test_help_imports_nothing_heavy():
    "All helps in one process: each with examples, none with more than click behind it"
    code = '''
import click,io,sys
from contextlib import redirect_stdout
from pyramidreid.cli.frame import app,main
def walk(group, before):
    for k,c in group.commands.items():
        if isinstance(c, click.Group): yield from walk(c, [*before,k])
        yield [*before,k],isinstance(c, click.Group)
assert main(['--help'])==main(['--version'])==0
for names,is_group in list(walk(app, [])):
    with redirect_stdout(io.StringIO()) as out: assert main([*names,'--help'])==0
    assert is_group or ('Examples:' in out.getvalue() and f"pyramidreid {' '.join(names)} " in out.getvalue()), names
heavy = {'torch','torchvision','fastai','pandas','numpy','matplotlib','PIL','scipy','safetensors','onnxruntime'} & set(sys.modules)
assert not heavy, heavy
'''
    subprocess.run([sys.executable,'-c',code], env=env, check=True)

def test_entry_point_and_module(tmp_path):
    assert [o.value for o in entry_points(group='console_scripts', name='pyramidreid')][:1]==['pyramidreid.cli.frame:main']
    for line in ('pyramidreid --version', f'{shlex.quote(sys.executable)} -m pyramidreid --version'):
        assert version('pyramidreid') in sh(line, tmp_path).stdout

def test_completion(tmp_path):
    res = subprocess.run(['pyramidreid'], env={**env, '_PYRAMIDREID_COMPLETE':'bash_complete', 'COMP_WORDS':'pyramidreid gallery se', 'COMP_CWORD':'2'}, cwd=tmp_path, capture_output=True, text=True)
    assert 'search' in res.stdout

# in a real terminal

def in_terminal(line, cwd, until=None, timeout=300):
    "Type `line`, and Ctrl-C once `until()` holds; what the terminal showed, and the exit code"
    import pty
    import select
    pid,fd = pty.fork()
    if not pid:
        os.chdir(cwd)
        os.execvpe('pyramidreid', shlex.split(line), env)
    shown,end,typed = b'',time.monotonic()+timeout,False
    while time.monotonic()<end:
        if select.select([fd], [], [], .05)[0]:
            try: data = os.read(fd, 65536)
            except OSError: break # the other side has gone
            if not data: break
            shown += data
        if until and not typed and until(): typed = os.write(fd, b'\x03')
    else: os.kill(pid, signal.SIGKILL)
    os.close(fd)
    return shown.decode('utf-8', 'replace'),os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

@terminal
def test_ctrl_c_in_a_training_and_resume(desk):
    "In a terminal: bars; Ctrl-C: 130, the newest checkpoint is whole and nothing else is there; the command it names finishes the run"
    d,_ = desk
    shown,code = in_terminal(f'pyramidreid train people --out cut --epochs 2 {SMALL}', d, until=lambda: any(time.time()-o.stat().st_mtime>.3 for o in (d/'cut'/'checkpoints').glob('1-*.pth'))) # not just when fastprogress begins a bar: it has an `except:` there that eats Ctrl-C
    assert code==130, shown
    assert '█' in shown and '\r' in shown and 'Traceback' not in shown
    assert re.search(r'[\r\n]1 +\d+\.\d{6} ', shown) and ' nan ' not in shown # the row of the first epoch
    assert not rubbish(d/'cut') and not (d/'cut'/'card.json').exists() and not (d/'cut'/'model').exists()
    again = re.search(r'pyramidreid train .*--resume', shown)[0]
    res = sh(again+' --json', d)
    assert res.returncode==0, res.stderr
    assert '1 of 2 epochs are done' in res.stderr and 'epoch 2 of 2' in res.stderr
    assert json.loads(res.stdout)['mAP']==pytest.approx(json.loads((d/'cut'/'card.json').read_text())['mAP'])
    assert open_model(d/'cut').emb_sz==2688

@terminal
@pytest.mark.parametrize('how,code', [(signal.SIGINT,130),(signal.SIGTERM,143)], ids=['int','term'])
def test_interrupted_while_it_embeds(desk, how, code):
    d,_ = desk
    p = subprocess.Popen(['pyramidreid','embed','person.onnx',*['people/query']*400,'--out',f'big-{code}.npz'], cwd=d, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert 'Embedding 19,200 images' in p.stdout.readline()
    time.sleep(.5)
    p.send_signal(how)
    out,err = p.communicate(timeout=60)
    assert p.returncode==code, err
    assert 'Traceback' not in err and not (d/f'big-{code}.npz').exists() and not rubbish(d)

@terminal
def test_interrupted_while_it_adds(desk):
    "In a terminal: a bar; the gallery stays what it was"
    d,_ = desk
    shutil.copytree(d/'street', d/'lane')
    before = {o.name:o.read_bytes() for o in (d/'lane').iterdir()}
    (d/'crowd').mkdir()
    for i in range(60): shutil.copytree(d/'people'/'query', d/'crowd'/f'{i}')
    began = time.monotonic()
    shown,code = in_terminal('pyramidreid gallery add lane crowd --model person.onnx', d, until=lambda: time.monotonic()-began>4)
    shutil.rmtree(d/'crowd')
    if code==0: pytest.skip('this machine had added them all before Ctrl-C')
    assert code==130 and 'Traceback' not in shown, shown
    assert {o.name:o.read_bytes() for o in (d/'lane').iterdir()}==before

@terminal
def test_the_reader_goes_away(desk):
    res = subprocess.run(['bash','-c','pyramidreid gallery info street | true; echo ${PIPESTATUS[0]}'], cwd=desk[0], env=env, capture_output=True, text=True)
    assert res.stdout.strip()=='141' and not res.stderr

def test_interrupted_while_it_writes(desk, monkeypatch, tmp_path):
    "The file that was there stays"
    def half(f, **arrays):
        Path(f).write_bytes(b'half')
        raise KeyboardInterrupt
    file = tmp_path/'emb.npz'
    file.write_bytes(b'old')
    monkeypatch.setattr(np, 'savez', half)
    assert main(['embed', desk[0]/'person.onnx', desk[0]/'people'/'query', '--out', file])==130
    assert file.read_bytes()==b'old' and [o.name for o in tmp_path.iterdir()]==['emb.npz']

# figures and formats

def run(capfd, *args):
    "Exit code, stdout and stderr of a command in this process"
    capfd.readouterr()
    code = main(args)
    out,err = capfd.readouterr()
    return code,out,err

@pytest.fixture(scope='module')
def shared(trained, tmp_path_factory): return trained.save_model(tmp_path_factory.mktemp('shared')/'model')

@pytest.mark.parametrize('options', [dict(), dict(flip=True), dict(rerank=True)], ids=['plain','flip','rerank'])
def test_evaluate_is_the_learners(trained, shared, people, options, capfd, tmp_path):
    ours = trained.evaluate(**options)
    code,out,err = run(capfd, 'evaluate', shared, people, *[f'--{o}' for o in options], '--json', '--card', tmp_path/'card.json')
    assert code==0
    theirs = json.loads(out)
    for k in ('mAP','rank1','rank5','mINP','mAP_trapezoid'): assert theirs[k]==pytest.approx(getattr(ours, k), abs=1e-6)
    assert {**ours.words(), 'data':''}=={**theirs['choices'], 'data':''}
    assert json.loads((tmp_path/'card.json').read_text(encoding='utf-8'))['n_query']==ours.n_query

def test_evaluate_by_onnx(desk, capfd):
    d,_ = desk
    by = [json.loads(run(capfd, 'evaluate', d/o, d/'people', '--json', '-q')[1]) for o in ('run','person.onnx')]
    assert by[0]['mAP']==pytest.approx(by[1]['mAP'], abs=1e-4) and by[0]['choices']['trained on']==by[1]['choices']['trained on']

def test_formats(trained, shared, people, capfd, tmp_path):
    "All three hold the same, in the order of names"
    files = image_files([people/'query'])
    emb = trained.embed(trained.dls.test_dl(files)).numpy()
    for o in ('e.safetensors','e.npz','e.csv'): assert run(capfd, 'embed', shared, people/'query', '--out', tmp_path/o)[0]==0
    with safe_open(tmp_path/'e.safetensors', 'np') as f: st,names,fp = f.get_tensor('embeddings'),json.loads(f.metadata()['names']),f.metadata()['fingerprint']
    with np.load(tmp_path/'e.npz') as f: nz,nz_names,nz_fp = f['embeddings'],f['names'].tolist(),str(f['fingerprint'])
    import pandas as pd
    csv = pd.read_csv(tmp_path/'e.csv', index_col='fn')
    for o in (st,nz,csv.to_numpy()): np.testing.assert_allclose(o, emb, atol=2e-5)
    assert names==nz_names==csv.index.tolist()==[str(f) for f in files]
    assert fp==nz_fp==open_model(shared).fingerprint

def test_the_same_people_are_held_out(people, tmp_path):
    "By train and by evaluate, from a CSV file as from a folder"
    df = market_table(people)
    df[df.split=='train'].drop(columns='split').to_csv(tmp_path/'own.csv', index=False)
    for src in (people, tmp_path/'own.csv'):
        dls = ReIDDataLoaders.from_table(read_data(src), p=4, k=4, size=(48,24), valid_pct=.25, seed=7, num_workers=0)
        ours,name = held_out(read_data(src), .25, seed=7)
        assert sorted(map(str, ours.fn))==sorted(map(str, dls.valid.items.fn)) and name==dls.data_name

def test_folder_for_each_person(people, capfd, tmp_path):
    for fn,pid in market_table(people).query('split=="train"')[['fn','pid']].itertuples(index=False):
        (tmp_path/'mine'/f'p{pid}').mkdir(parents=True, exist_ok=True)
        shutil.copy(fn, tmp_path/'mine'/f'p{pid}')
    assert read_data(tmp_path/'mine').pid.nunique()==12
    assert run(capfd, 'doctor', tmp_path/'mine', '--quick')[0]==0
    code,out,err = run(capfd, 'train', tmp_path/'mine', '--out', tmp_path/'run', *SMALL.split(), '--epochs', 1, '--p', 4, '--k', 4, '--recipe', 'paper', '--quiet')
    assert code==0 and not err and 'epoch' not in out and 'mAP' in out
    card = json.loads((tmp_path/'run'/'card.json').read_text(encoding='utf-8'))
    code,out,_ = run(capfd, 'evaluate', tmp_path/'run', tmp_path/'mine', '--hold-out', .2, '--json', '-q')
    assert json.loads(out)['mAP']==pytest.approx(card['mAP'], abs=1e-6)
    code,out,err = run(capfd, 'evaluate', tmp_path/'run', tmp_path/'mine')
    assert code==2 and '--hold-out' in err and not out

# a model to begin with, and the doctor

def test_train_on_from_a_model(shared, people, capfd, tmp_path):
    code,out,err = run(capfd, 'train', people, '--out', tmp_path/'run', '--weights', shared, '--size', 48, 24, '--workers', 0, '--p', 4, '--k', 4, '--epochs', 1, '--cache', 'memory', '--json')
    assert code==0, err
    assert open_model(json.loads(out)['model']).about['n_parts']==3
    assert run(capfd, 'train', people, '--out', tmp_path/'other', '--weights', shared, '--arch', 'resnet18', '--size', 48, 24, '--p', 4)[0]==2

def test_doctor(people, capfd, tmp_path):
    bad = tmp_path/'bad'
    shutil.copytree(people, bad)
    next((bad/'query').glob('*.jpg')).write_bytes(b'no image')
    code,out,err = run(capfd, 'doctor', bad, '--json', '--plot', tmp_path/'p.png')
    assert code==1 and json.loads(out)['findings'][0]['finding']=='unreadable' and Image.open(tmp_path/'p.png').size[0]>500
    assert run(capfd, 'doctor', people)[0]==0

# galleries

def test_gallery(desk, capfd, tmp_path):
    d,_ = desk
    model,street = ['--model',d/'person.onnx'],tmp_path/'street'
    files = image_files([d/'people'/'query'])[:8]
    table = tmp_path/'seen.csv'
    table.write_text('fn,pid,cam,time,coat\n'+''.join(f'{os.path.relpath(f, tmp_path)},{i//4},{i%2+1},2026-11-23 08:{i:02d},{"red" if i%2 else "blue"}\n' for i,f in enumerate(files)))
    assert run(capfd, 'gallery', 'add', street, '--csv', table, *model)[0]==0
    search = lambda *args: run(capfd, 'gallery', 'search', street, files[0], *model, '--json', '-q', *args)
    code,out,_ = search()
    found = json.loads(out)['matches']
    assert code==0 and len(found)==8 and found[0]['similarity']==pytest.approx(1, abs=1e-5) and Path(found[0]['key']).resolve()==files[0].resolve()
    assert [o['similarity'] for o in found]==sorted((o['similarity'] for o in found), reverse=True)
    only = lambda *args: {(o['cam'],o['coat']) for o in json.loads(search(*args)[1])['matches']}
    assert only('--exclude-cam', 1)=={(2,'red')} and only('--where', 'coat=="blue"')=={(1,'blue')}
    assert len(json.loads(search('--since', '2026-11-23 08:05')[1])['matches'])==3 and len(json.loads(search('-k', 2)[1])['matches'])==2
    assert search('--threshold', 1.5)[0]==search('--exclude-cam', 1, '--exclude-cam', 2)[0]==1
    for args in (['--far','.1'],['--where','colour==1'],['--since','yesterday evening'],['--exclude-cam','door'],['--far','.1','--threshold','.5']):
        code,out,err = search(*args)
        assert code==2 and not out and 'Error: ' in err and 'Traceback' not in err, args
    code,out,_ = run(capfd, 'gallery', 'calibrate', street, d/'people', *model, '--far', .2, '--json', '-q')
    found_at = json.loads(out)
    assert code==0 and found_at['interval'][0]<.2<found_at['interval'][1] and found_at['searches']==len(image_files([d/'people'/'query']))
    assert search('--far', .2)[1]==search('--threshold', found_at['threshold'])[1]
    for args in (('--far',.0001),('--far',2)):
        before = (street/'gallery.json').read_bytes()
        assert run(capfd, 'gallery', 'calibrate', street, d/'people', *model, *args)[0]==2 and (street/'gallery.json').read_bytes()==before
    assert run(capfd, 'gallery', 'add', street, '--csv', table, *model)[0]==2
    assert '0 added, 8 in all' in run(capfd, 'gallery', 'add', street, '--csv', table, *model, '--skip-known')[1]
    code,out,_ = run(capfd, 'gallery', 'info', street, '--json')
    info = json.loads(out)
    assert (info['entries'],info['people'],info['cameras'],info['calibrated']['searches'])==(8,2,2,found_at['searches'])
    assert run(capfd, 'gallery', 'remove', street, found[0]['key'])[0]==0 and run(capfd, 'gallery', 'remove', street, 'nobody')[0]==2
    assert json.loads(run(capfd, 'gallery', 'info', street, '--json')[1])['entries']==7

def keys(street): # of a gallery in a folder
    from pyramidreid.gallery.gallery import Gallery
    return sorted(Gallery.load(street).table.key)

def test_keys_are_text(desk, capfd, tmp_path):
    d,_ = desk
    files = [f.resolve() for f in image_files([d/'people'/'query'])[:3]]
    (tmp_path/'seen.csv').write_text('fn,key,pid\n'+''.join(f'{f},{k},{i}\n' for i,(f,k) in enumerate(zip(files, ('0001','0002','')))))
    assert run(capfd, 'gallery', 'add', tmp_path/'street', '--csv', tmp_path/'seen.csv', '--model', d/'person.onnx')[0]==0
    assert keys(tmp_path/'street')==sorted(['0001','0002',str(files[2])])
    shutil.copy(files[0], tmp_path/'0007')
    (tmp_path/'seen.csv').write_text('fn\n0007\n')
    assert run(capfd, 'gallery', 'add', tmp_path/'street', '--csv', tmp_path/'seen.csv', '--model', d/'person.onnx')[0]==0
    assert str(tmp_path/'0007') in keys(tmp_path/'street')

def test_a_file_is_one_entry_however_it_is_typed(desk, capfd, tmp_path, monkeypatch):
    d,_ = desk
    (tmp_path/'in'/'deep').mkdir(parents=True)
    for i,f in enumerate(image_files([d/'people'/'query'])[:3]): shutil.copy(f, tmp_path/'in'/f'{i}.jpg')
    add = lambda *files: run(capfd, 'gallery', 'add', tmp_path/'street', *files, '--model', d/'person.onnx', '--json', '-q')
    monkeypatch.chdir(tmp_path)
    assert json.loads(add('in/0.jpg')[1])['entries']==1
    for cwd,typed in ((tmp_path,tmp_path/'in'/'0.jpg'),(tmp_path/'in','0.jpg'),(tmp_path/'in'/'deep','../0.jpg')):
        monkeypatch.chdir(cwd)
        code,_,err = add(typed)
        assert code==2 and 'already' in err
        assert json.loads(add(typed, '--skip-known')[1])==dict(gallery=str(tmp_path/'street'), added=0, skipped=1, entries=1)
    monkeypatch.chdir(tmp_path)
    assert json.loads(add('in', 'in/1.jpg', '--skip-known')[1])['added']==2 # a folder and a file in it
    assert keys('street')==[str(tmp_path/'in'/f'{i}.jpg') for i in range(3)]
    out = run(capfd, 'gallery', 'search', 'street', 'in/1.jpg', '--model', d/'person.onnx')[1]
    assert out.splitlines()[1].split()[-1]==os.path.join('in','1.jpg')
    monkeypatch.chdir(tmp_path/'in')
    assert run(capfd, 'gallery', 'remove', '../street', '1.jpg', tmp_path/'in'/'2.jpg')[0]==0 and keys('../street')==[str(tmp_path/'in'/'0.jpg')]
    code,_,err = run(capfd, 'gallery', 'remove', '../street', '9.jpg')
    assert code==2 and "'9.jpg'" in err
    assert run(capfd, 'gallery', 'remove', '../street', '0.jpg', '../in/0.jpg')[1].startswith('../street: 1 removed, 0 in all')
    for args in ([],['--json'],['--far','.1']):
        code,out,err = run(capfd, 'gallery', 'search', '../street', '0.jpg', '--model', d/'person.onnx', *args)
        assert code==1 and not err and ('Nobody found.' in out or json.loads(out)['matches']==[])

def test_all_kinds_of_pictures_are_found(desk, capfd, tmp_path):
    d,_ = desk
    im = Image.open(image_files([d/'people'/'query'])[0])
    for o in ('a.webp','b.JFIF','c.png','d.tiff'): im.save(tmp_path/o, 'JPEG' if o=='b.JFIF' else None)
    for o in ('._a.jpg','notes.txt','film.mpg','paper.pdf'): (tmp_path/o).write_bytes(b'not a picture')
    (tmp_path/'.trash').mkdir()
    im.save(tmp_path/'.trash'/'e.jpg')
    assert [f.name for f in image_files([tmp_path])]==['a.webp','b.JFIF','c.png','d.tiff']
    assert json.loads(run(capfd, 'gallery', 'add', tmp_path/'street', tmp_path, '--model', d/'person.onnx', '--json', '-q')[1])['added']==4

def test_what_cannot_be_added_is_said_before_anything_is_embedded(desk, capfd, tmp_path, monkeypatch):
    d,_ = desk
    files,model,street = [f.resolve() for f in image_files([d/'people'/'query'])[:4]],['--model',d/'person.onnx'],tmp_path/'street'
    (tmp_path/'seen.csv').write_text('fn,pid,coat\n'+''.join(f'{f},{i},red\n' for i,f in enumerate(files[:2])))
    assert run(capfd, 'gallery', 'add', street, '--csv', tmp_path/'seen.csv', *model)[0]==0
    def never(*args): raise AssertionError('embedded')
    monkeypatch.setattr('pyramidreid.cli.inputs.embed_files', never)
    table = lambda head,*rows: (tmp_path/'new.csv').write_text('\n'.join([head,*rows])+'\n') and ['--csv',tmp_path/'new.csv']
    for args,words in ((lambda: [files[2],'--pid','ann'],'--pid ann: this column of the gallery holds numbers'), (lambda: [files[2],'--time','tomorrow'],"'time'"),
                       (lambda: table('fn,pid,coat', f'{files[2]},7,3'),"'coat' held text"), (lambda: table('fn,pid', f'{files[2]},ann'),"'pid' held number"),
                       (lambda: table('fn,key', f'{files[2]},x', f'{files[3]},x'),'key of another'), (lambda: [files[2],*table('fn', f'{files[2]}')],'key of another'),
                       (lambda: table('fn', f'{files[2]}', 'gone.jpg'),'1 of 2 files are not there')):
        code,out,err = run(capfd, 'gallery', 'add', street, *args(), *model)
        assert code==2 and words in err and not out, err
    code,_,err = run(capfd, 'gallery', 'search', street, files[0], *model, '--exclude-cam', 'door')
    assert code==2 and "exclude_cam" in err

@pytest.mark.skipif(sys.platform!='linux', reason='other systems refuse such a name')
def test_a_name_that_is_not_utf8(desk, tmp_path):
    d,_ = desk
    bad = os.fsencode(tmp_path)+b'/caf\xe9.jpg'
    shutil.copy(os.fsencode(image_files([d/'people'/'query'])[0]), bad)
    res = subprocess.run([b'pyramidreid',b'gallery',b'add',b'there',bad,b'--model',b'person.onnx'], cwd=d, env=env, capture_output=True, text=True)
    assert res.returncode==2 and 'caf\\udce9.jpg' in res.stderr and 'not UTF-8' in res.stderr and not (d/'there').exists()

def test_another_command_was_quicker(desk, capfd, tmp_path, monkeypatch):
    "Two that make one folder, and two that add to it: the second is told to begin again, and then all are there"
    import pyramidreid.cli.inputs as m
    d,_ = desk
    files,embed = image_files([d/'people'/'query'])[:3],m.embed_files
    add = lambda f: run(capfd, 'gallery', 'add', tmp_path/'street', f, '--model', d/'person.onnx', '-q')
    def late(*args):
        monkeypatch.setattr(m, 'embed_files', embed)
        assert add(other)[0]==0
        return embed(*args)
    for mine,other in ((files[0],files[1]),(files[0],files[2])):
        monkeypatch.setattr(m, 'embed_files', late)
        code,_,err = add(mine)
        assert code==2 and 'Nothing was added: run the command again' in err
    assert add(files[0])[0]==0 and len(keys(tmp_path/'street'))==3

def test_our_own_warnings_are_said_and_no_others(desk, capfd, tmp_path, monkeypatch):
    import warnings
    d,_ = desk
    df,model,street = market_table(d/'people').query('split!="train" and pid>0'),['--model',d/'person.onnx'],tmp_path/'street'
    df[df.pid.isin(df.pid.unique()[:5])].to_csv(tmp_path/'few.csv', index=False)
    assert run(capfd, 'gallery', 'add', street, d/'people', *model)[0]==0
    code,out,err = run(capfd, 'gallery', 'calibrate', street, tmp_path/'few.csv', *model, '--far', .3, '--json')
    said = [o for o in err.splitlines() if o.startswith('Warning: ')]
    assert code==0 and len(said)==1 and 'The calibration searched' in said[0] and isinstance(json.loads(out), dict)
    ask = ['gallery','search',street,df.fn.iloc[0],*model,'--far',.3]
    from pyramidreid.gallery.gallery import Gallery
    real = Gallery.search
    def noisy(*args, **kwargs):
        warnings.warn('of the tests')
        return real(*args, **kwargs)
    monkeypatch.setattr(Gallery, 'search', noisy)
    for _ in range(2):
        code,out,err = run(capfd, *ask)
        assert code==0 and err.startswith('Warning: The calibration searched') and len(err.splitlines())==1 and 'Warning' not in out
    assert not run(capfd, *ask, '--quiet')[2]
    with pytest.warns(UserWarning, match='of the tests'): run(capfd, *ask, '--debug')

def test_devices_of_an_onnx_file(desk, capfd, monkeypatch):
    import onnxruntime
    d,_ = desk
    file,ask = d/'person.onnx',lambda device: run(capfd, 'gallery', 'search', d/'street', image_files([d/'people'/'query'])[0], '--model', d/'person.onnx', '--device', device)
    assert ask('cpu')[0]==0
    for o in ('gpu','cuda:','cuda:x','cuda:-1','tpu'):
        code,_,err = ask(o)
        assert code==2 and f'--device {o}: an ONNX file runs on cpu, cuda' in err
    if 'CUDAExecutionProvider' not in onnxruntime.get_available_providers():
        code,_,err = ask('cuda:1')
        assert code==2 and err.splitlines()[-1].startswith('Error: --device cuda:1: onnxruntime finds no such GPU')
    asked,real = [],onnxruntime.InferenceSession
    class Session:
        def __init__(self, data, opts, providers): self.real,self.providers = real(data, opts, providers=['CPUExecutionProvider']),asked.append(providers) or [o[0] if isinstance(o, tuple) else o for o in providers]
        def get_providers(self): return self.providers
        def __getattr__(self, name): return getattr(self.real, name)
    monkeypatch.setattr(onnxruntime, 'InferenceSession', Session)
    for o in ('cuda','cuda:3',None,'cpu'): open_model(file, o)
    assert [o[0] for o in asked]==[('CUDAExecutionProvider',dict(device_id=0)),('CUDAExecutionProvider',dict(device_id=3)),'CPUExecutionProvider','CPUExecutionProvider']

def test_what_runs_without_torch(desk, tmp_path):
    "And what is said where it does not"
    d,_ = desk
    code = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch','torchvision','fastai'): raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Forbid())
from pyramidreid.cli.frame import main
sys.exit(main())"""
    alone = lambda *args: subprocess.run([sys.executable,'-W','ignore','-c',code,*map(str, args)], cwd=d, env=env, capture_output=True, text=True)
    query = image_files([d/'people'/'query'])[0]
    street,model = tmp_path/'street',['--model','person.onnx']
    for args in (['add',street,'people/query',*model],['search',street,query,*model],['info',street],['remove',street,query]):
        res = alone('gallery', *args)
        assert res.returncode==0, res.stderr
    assert alone('embed', 'person.onnx', query, '--out', tmp_path/'e.npz').returncode==0
    for args in (['embed','person.onnx',query,'--out',tmp_path/'f.npz','--flip'],['gallery','calibrate',street,'people',*model,'--far','.1']):
        res = alone(*args)
        assert res.returncode==2 and 'is not installed, and this command needs it' in res.stderr, res.stderr

def test_gallery_of_another_model(desk, shared, capfd):
    d,_ = desk
    code,_,err = run(capfd, 'gallery', 'search', d/'street', image_files([d/'people'/'query'])[0], '--model', shared)
    assert code==2 and 'Another model' in err

# what a newcomer sees

def test_help_names_every_command_in_a_whole_line(tmp_path):
    "In the order of use, at the width of a common terminal"
    for group,names in (('','draw demo doctor train evaluate embed export gallery'),('gallery','add remove search calibrate info')):
        res = subprocess.run(['pyramidreid',*group.split(),'--help'], cwd=tmp_path, env={**env,'COLUMNS':'80'}, capture_output=True, text=True)
        commands = res.stdout.split('Commands:\n')[1].split('\n\n')[0].splitlines()
        assert [o.split()[0] for o in commands]==names.split() and all('...' not in o and len(o)<=80 for o in commands)

def test_search_shows_the_key_last_and_a_dash_for_gaps(desk, capfd, tmp_path, monkeypatch):
    "Also where a name holds what would move the cursor of a terminal"
    d,_ = desk
    monkeypatch.chdir(tmp_path)
    files,odd = image_files([d/'people'/'query'])[:2],'new\nline\x1b[31m\u202e.jpg'
    shutil.copy(files[0], 'a b.jpg')
    shutil.copy(files[1], odd)
    (tmp_path/'seen.csv').write_text('fn,pid\na b.jpg,3\n')
    model = ['--model',d/'person.onnx']
    assert run(capfd, 'gallery', 'add', 'street', '--csv', 'seen.csv', *model)[0]==run(capfd, 'gallery', 'add', 'street', odd, *model)[0]==0
    code,out,_ = run(capfd, 'gallery', 'search', 'street', 'a b.jpg', *model)
    head,*rows = out.splitlines()
    assert code==0 and head.split()==['similarity','pid','key'] and [o.split(maxsplit=2)[2] for o in rows]==['a b.jpg',r'new\nline\x1b[31m\u202e.jpg']
    assert [o.split()[1] for o in rows]==['3','–'] and rows[0].split()[0]=='1.0000' and not any(o.endswith(' ') for o in (head,*rows))
    assert json.loads(run(capfd, 'gallery', 'search', 'street', 'a b.jpg', *model, '--json')[1])['matches'][1]['key'].endswith(odd)

def test_numbers_that_are_none(desk, people, capfd, tmp_path):
    d,_ = desk
    query = image_files([d/'people'/'query'])[0]
    search = ['gallery','search',d/'street',query,'--model',d/'person.onnx']
    for args in ([*search,'--threshold','nan'],[*search,'--threshold','inf'],[*search,'--far','nan'],[*search,'--far','0'],['train',people,'--out',tmp_path/'x','--lr','nan'],
                 ['train',people,'--out',tmp_path/'x','--hold-out','nan'],['gallery','calibrate',d/'street',people,'--model',d/'person.onnx','--far','nan']):
        code,out,err = run(capfd, *args)
        assert code==2 and not out and f"Invalid value for '{args[-2]}'" in err, err

def test_a_rate_out_of_reach_is_refused_before_anything_is_embedded(desk, capfd, monkeypatch):
    d,_ = desk
    def never(*args): raise AssertionError('embedded')
    monkeypatch.setattr('pyramidreid.cli.inputs.embed_files', never)
    code,_,err = run(capfd, 'gallery', 'calibrate', d/'street', d/'people', '--model', d/'person.onnx', '--far', '.001')
    assert code==2 and '48 queries' in err and 'at least 1,000' in err
    code,_,err = run(capfd, 'gallery', 'calibrate', d/'street', d/'people', '--model', d/'person.onnx', '--far', 1/48)
    assert code==3 and 'embedded' in err # just within reach

# where nothing can be written

def test_no_right_to_write_is_said_before_the_work(desk, shared, people, capfd, tmp_path, monkeypatch):
    d,_ = desk
    def never(*args, **kwargs): raise AssertionError('worked')
    for o in ('cli_inputs.embed_files','cli_inputs.open_model','data.ReIDDataLoaders.from_table','synth.synth_persons','doctor.doctor'): monkeypatch.setattr(f'pyramidreid.{o}', never)
    monkeypatch.setattr(os, 'access', lambda path, mode, **kwargs: not mode & os.W_OK)
    t,query,model = tmp_path,image_files([d/'people'/'query'])[0],['--model',d/'person.onnx']
    for args in (['train',people,'--out',t/'deep'/'run'],['draw',t/'p'],['embed',shared,query,'--out',t/'e.npz'],['export',shared,'--to','onnx','--out',t/'m.onnx'],['evaluate',shared,people,'--card',t/'c.json'],
                 ['doctor',people,'--plot',t/'p.png'],['gallery','add',t/'street',query,*model],['gallery','remove',t/'street',query],['gallery','calibrate',t/'street',people,*model]):
        code,out,err = run(capfd, *args)
        assert code==2 and not out and 'cannot be written: no right to write in' in err, err
    assert not list(t.iterdir())
    assert run(capfd, 'gallery', 'info', d/'street')[0]==0 # who reads needs no right

@pytest.mark.skipif(os.name=='nt', reason='limits are of Unix')
@pytest.mark.parametrize('out', ['e.npz','e.csv','e.safetensors','street'])
def test_a_full_disk(desk, tmp_path, out):
    "As the limit on a file's size makes one: exit code 2, what could not be written, and nothing left"
    import resource
    d,_ = desk
    what = ['gallery','add',tmp_path/out,'people/query','--model','person.onnx'] if out=='street' else ['embed','person.onnx','people/query','--out',tmp_path/out]
    res = subprocess.run(['pyramidreid',*map(str, what)], cwd=d, env=env, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,100_000)))
    assert res.returncode==2 and f'{tmp_path/out} could not be written: ' in res.stderr and 'Errno' not in res.stderr and 'partial' not in res.stderr, res.stderr
    assert not rubbish(tmp_path) and [o.name for o in tmp_path.rglob('*') if o.is_file()]==['gallery.json']*(out=='street')

def test_a_first_add_that_failed_leaves_the_folder_free(desk, shared, capfd, tmp_path, monkeypatch):
    "Also for another model"
    d,_ = desk
    def full(*args): raise OSError(28, 'No space left on device')
    add = lambda model: run(capfd, 'gallery', 'add', tmp_path/'street', image_files([d/'people'/'query'])[0], '--model', model)
    with monkeypatch.context() as m:
        m.setattr('pyramidreid.gallery.store.write_embeddings', full)
        code,_,err = add(d/'person.onnx')
        assert code==2 and err==f"Error: {tmp_path/'street'} could not be written: No space left on device\n"
    assert add(shared)[0]==0 and len(keys(tmp_path/'street'))==1

@terminal
def test_closed_and_full_streams(desk, tmp_path):
    "Nobody listens, as cron may have it; and help that cannot be printed"
    d,_ = desk
    query = image_files([d/'people'/'query'])[0]
    sh_ = lambda line: subprocess.run(['bash','-c',line], cwd=d, env=env, capture_output=True, text=True)
    for streams in ('<&-','>&-','2>&-','<&- >&- 2>&-'):
        file = tmp_path/f'{len(streams)}.npz'
        res = sh_(f'pyramidreid embed person.onnx {query} --out {file} {streams}')
        assert res.returncode==0 and not res.stderr, res.stderr
        with np.load(file) as o: assert len(o['embeddings'])==1
    assert sh_('pyramidreid --help | true; exit ${PIPESTATUS[0]}').returncode==141
    if Path('/dev/full').exists():
        for line in ('pyramidreid --help','pyramidreid gallery info street'):
            res = sh_(f'{line} >/dev/full')
            assert res.returncode==2 and res.stderr.startswith('Error: ') and 'Traceback' not in res.stderr, res.stderr

@terminal
def test_a_training_that_is_asked_to_end(desk):
    "SIGTERM, as a queue sends it: 143, and the log says how to go on"
    d,_ = desk
    p = subprocess.Popen(shlex.split(f'pyramidreid train people --out ended --epochs 40 {SMALL}'), cwd=d, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((d/'ended'/'checkpoints').glob('1-*.pth')) and p.poll() is None: time.sleep(.05)
    time.sleep(.3)
    p.terminate()
    out,err = p.communicate(timeout=120)
    assert p.returncode==143 and re.search(r'Ended\. ended/checkpoints/1-\d{4}\.pth is whole\. To go on:\npyramidreid train .*--resume\n', err) and 'Traceback' not in err, err
    assert not rubbish(d/'ended')

# errors of others, in words

def test_errors_of_a_training(people, capfd, tmp_path, monkeypatch):
    from urllib.error import URLError
    base = ['train',people,'--out',tmp_path/'run','--size',48,24,'--workers',0,'--p',4,'--k',4,'--epochs',1,'-q']
    code,_,err = run(capfd, *base, '--arch', 'resnet19')
    assert code==2 and '--arch resnet19: neither torchvision nor timm' in err
    def no_way(*args): raise URLError('no route to host')
    monkeypatch.setattr('pyramidreid.models.backbone._new_model', no_way)
    code,_,err = run(capfd, *base, '--arch', 'resnet18')
    assert code==2 and 'resnet18 could not be downloaded (no route to host)' in err and '--weights FILE' in err and '--weights none' in err
    assert not tmp_path.joinpath('run').exists()

def test_a_loss_that_is_not_finite(people, capfd, tmp_path):
    code,_,err = run(capfd, 'train', people, '--out', tmp_path/'run', *SMALL.split(), '--p', 4, '--k', 4, '--epochs', 1, '--lr', '1e9', '-q')
    assert code==2 and err.startswith('Error: The loss is nan') and 'Exception occ' not in err

def test_what_data_is_said_to_be(people, shared, capfd, tmp_path):
    "A file, a .CSV in capitals, a folder that is not recognised: the same for all commands that take DATA"
    df = market_table(people)
    df.to_csv(tmp_path/'ALL.CSV', index=False)
    assert run(capfd, 'doctor', tmp_path/'ALL.CSV', '--quick')[0]==0
    (tmp_path/'part'/'bounding_box_train').mkdir(parents=True)
    for name,*args in (['doctor'],['evaluate',shared],['train','--out',tmp_path/'run']):
        code,_,err = run(capfd, name, *args, df.fn[0])
        assert code==2 and 'is a file, and not a .csv' in err, err
        code,_,err = run(capfd, name, *args, tmp_path/'part')
        assert code==2 and err.count('--data-set NAME')==1, err
        code,_,err = run(capfd, name, *args, people, '--data-set', 'viper')
        assert code==2 and 'market1501' in err and '--data-set NAME' not in err, err

# what is wrong is said, and nothing is written

def test_bad_input(desk, shared, people, capfd, tmp_path):
    d,_ = desk
    (tmp_path/'in').mkdir()
    cut = tmp_path/'in'/'cut.jpg'
    cut.write_bytes(image_files([people/'query'])[0].read_bytes()[:300])
    (tmp_path/'in'/'empty').mkdir()
    (tmp_path/'in'/'no.csv').write_text('a,b\n1,2\n')
    (tmp_path/'in'/'nobody.csv').write_text(f'fn\n{cut}\n')
    (tmp_path/'in'/'bad.onnx').write_bytes(b'not a model')
    i,out = tmp_path/'in',tmp_path/'out'
    cases = {
        ('trian',):"Did you mean 'train'", ('train',people,'--epoch','1'):'--epochs', ('train',people,'--epochs','0'):'0 is not in the range', ('train','nowhere'):'nowhere', ('train',):"Missing argument 'DATA'",
        ('train',people,'--out',out,'--p','50'):'cannot be filled', ('train',people,'--out',out,'--weights','no.pth'):'no.pth', ('train',people,'--out',out,'--data-set','viper'):'no known data set',
        ('train',i/'no.csv','--out',out):"no column 'fn'", ('train',i/'nobody.csv','--out',out):"no column 'pid'", ('train',people/'query','--out',out):'pass that path', ('train',i/'empty','--out',out):'No images',
        ('evaluate',people,people):'There is no model', ('evaluate',i/'bad.onnx',people):'bad.onnx', ('evaluate',shared,i/'empty'):'No images',
        ('embed',shared,cut,'--out',out/'e.npz'):'cut.jpg', ('embed',shared,i/'empty','--out',out/'e.npz'):'no images', ('embed',shared,people/'query','--out',out/'e.pkl'):'.safetensors',
        ('embed',shared,people/'query','--out',cut/'e.npz'):'cut.jpg', ('embed',shared,people/'query'):"Missing option '--out'",
        ('export',shared,'--to','onnx','--out',out/'m.pt2'):'.onnx', ('export',d/'person.onnx','--to','onnx','--out',out/'m.onnx'):'exported already',
        ('gallery','info',i):'no gallery', ('gallery','search',out,cut,'--model',shared):'no gallery', ('gallery','add',out,'--model',shared):'Nothing to add', ('gallery','add',out,cut,'--model',shared):'cut.jpg',
        ('doctor',people,'--plot','x.doc'):'.png'}
    for args,words in cases.items():
        code,shown,err = run(capfd, *args)
        assert code==2 and words in err and 'Traceback' not in err, (args,shown,err)
        assert err.splitlines()[-1].startswith('Error: ') or args[0]=='train' or words in err
        assert not out.exists(), args

def test_faults_of_ours(monkeypatch, people, capfd):
    def broken(*args, **kwargs): raise KeyError('x')
    monkeypatch.setattr('pyramidreid.data.health.doctor', broken)
    code,_,err = run(capfd, 'doctor', people)
    assert code==3 and 'Traceback' not in err and '--debug' in err
    code,_,err = run(capfd, 'doctor', people, '--debug')
    assert code==3 and 'Traceback' in err
