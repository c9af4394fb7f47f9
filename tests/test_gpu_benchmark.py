"benchmarks/gpu.py: its plan, time limits, crashes, resuming and table, with parts that need no library; reduced runs"
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
from gpu import Part, Run, named, plan, read_json, summary
from test_fakegpu import missing

ROOT = Path(__file__).parents[1]

# What a child does: a line of Python for each part, between the two files that the parts' process writes
CHILD = """
import json,os,signal,sys,time
from pathlib import Path
folder,*parts = sys.argv[1:]
def write(name, status, **more):
    file = Path(folder)/f'{name}.json'
    file.with_suffix('.new').write_text(json.dumps(dict(status=status, seconds=0.0, **more)))
    file.with_suffix('.new').rename(file)
for part in parts:
    name,_,line = part.partition('=')
    write(name, 'running')
    result = {}
    try: exec(line)
    except ValueError as e:
        write(name, 'failed', error=f'ValueError: {e}')
        continue
    write(name, 'passed', result=result, about=dict(hardware='a GPU'))
"""

PASSES = "result['text'] = 'fine'"
CRASHES = "print('out of memory', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
EXITS = "sys.exit(3)"
FAILS = "raise ValueError('no')"
HANGS = "write(name, 'running', result=dict(rows=[dict(a=1)])); time.sleep(600)"

def make_run(folder, does, minutes=1, **kwargs):
    "A `Run` of parts that do what the dict `does` says, and the list of children it started"
    started = []
    def command(parts, left):
        started.append([part.name for part in parts])
        lines = [f'{part.name}={does[part.name]}' for part in parts]
        return [sys.executable, '-c', CHILD, str(folder/'gpu'), *lines]
    about = dict(device='cuda', reduced=False, date='2026-11-29', code='abc', command='python benchmarks/gpu.py')
    return Run(folder/'gpu.json', about, command, minutes, **kwargs),started

def parts_of(does, seconds=20, **kwargs): return [Part(name, f'about {name}', seconds, **kwargs) for name in does]

def states(folder):
    return {name: entry['status'] for name,entry in read_json(folder/'gpu.json')['parts'].items()}

# ---- one part does not take another with it

@pytest.mark.parametrize('together', [False,True])
def test_crash_error_and_exit_end_only_their_own_part(tmp_path, together):
    does = dict(first=PASSES, crash=CRASHES, fail=FAILS, leave=EXITS, last=PASSES)
    run,started = make_run(tmp_path, does, together=together)
    run.run(parts_of(does))
    assert states(tmp_path)==dict(first='passed', crash='crashed', fail='failed', leave='crashed', last='passed')
    parts = read_json(tmp_path/'gpu.json')['parts']
    assert parts['crash']['error']=='killed by SIGKILL; out of memory'
    assert parts['leave']['error'].startswith('the process ended with 3')
    assert parts['fail']['error']=='ValueError: no' and parts['first']['result']=={'text':'fine'}
    names = list(does)
    assert started==([names, names[2:], names[4:]] if together else [[name] for name in names])
    assert read_json(tmp_path/'gpu.json')['hardware']=='a GPU'

@pytest.mark.parametrize('together', [False,True])
def test_a_part_that_hangs_is_killed_in_time_and_keeps_what_it_noted(tmp_path, together):
    does = dict(hang=HANGS, last=PASSES)
    run,_ = make_run(tmp_path, does, together=together)
    parts = [Part('hang', '', 3), Part('last', '', 20)]
    start = time.monotonic()
    run.run(parts)
    assert time.monotonic()-start<20
    entry = read_json(tmp_path/'gpu.json')['parts']['hang']
    assert entry['status']=='timeout' and entry['error']=='no end after 3 s' and 2.9<entry['seconds']<15
    assert entry['result']=={'rows':[{'a':1}]} and states(tmp_path)['last']=='passed'

def test_what_a_killed_part_started_is_killed_too(tmp_path):
    "A worker of a loader, which would keep the GPU's memory"
    mark = tmp_path/'pid'
    starts = f"import subprocess as s; Path({str(mark)!r}).write_text(str(s.Popen(['sleep','600']).pid)); "
    run,_ = make_run(tmp_path, dict(hang=starts+HANGS))
    run.run([Part('hang', '', 3)])
    pid = int(mark.read_text())
    for _ in range(100):
        state = Path(f'/proc/{pid}/stat')
        if not state.exists() or state.read_text().split()[2]=='Z': break
        time.sleep(.05)
    else: raise AssertionError('the worker still runs')

def test_the_time_of_the_whole_run(tmp_path):
    "What is running then is stopped, and the rest is not begun"
    does = dict(first=PASSES, hang=HANGS, last=PASSES)
    run,_ = make_run(tmp_path, does, minutes=10/60)
    start = time.monotonic()
    run.run(parts_of(does, seconds=600))
    assert time.monotonic()-start<20
    assert states(tmp_path)==dict(first='passed', hang='stopped')

def test_parts_that_are_not_timed_run_beside_each_other(tmp_path):
    "Two that wait for each other, and one that is timed, which runs alone"
    folder = tmp_path/'gpu'
    def waits_for(other):
        return (f"Path({str(folder)!r}, name+'-here').touch()\nfor _ in range(300):\n"
                f"  if Path({str(folder)!r}, '{other}-here').exists(): break\n  time.sleep(.05)\nelse: sys.exit(1)\n")
    alone = (f"others = [o.read_text() for o in Path({str(folder)!r}).glob('*.json') if o.stem!=name]\n"
             "assert not [o for o in others if 'running' in o]")
    does = dict(a=waits_for('b'), b=waits_for('a'), timed=alone, c=PASSES)
    run,_ = make_run(tmp_path, does, jobs=2)
    run.run([Part('a', '', 30, True), Part('b', '', 30, True), Part('timed', '', 30), Part('c', '', 30, True)])
    assert set(states(tmp_path).values())=={'passed'}

# ---- resuming

def test_a_second_run_repeats_only_what_has_not_passed(tmp_path):
    does = dict(first=PASSES, fail=FAILS, last=PASSES)
    parts = parts_of(does)
    run,_ = make_run(tmp_path, does)
    run.run(run.missing(parts)[:2])
    run,started = make_run(tmp_path, {**does, 'fail':PASSES})
    run.run(run.missing(parts))
    assert started==[['fail'],['last']] and set(states(tmp_path).values())=={'passed'}
    run,started = make_run(tmp_path, does)
    assert run.missing(parts)==[] and run.missing(parts, again=parts[:1])==parts[:1]

def test_children_share_the_cores(monkeypatch):
    "Two threads each for four children of eight cores, one at least; what is set stays"
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    assert [gpu.few_threads(jobs)['OMP_NUM_THREADS'] for jobs in (1,4,16)]==['8','2','1']
    monkeypatch.setenv('OMP_NUM_THREADS', '5')
    assert gpu.few_threads(4)['OMP_NUM_THREADS']=='5'

@pytest.mark.parametrize('change,repeated', [({}, []), (dict(code='new'), ['first','last']),
                                             (dict(hardware='another GPU'), ['first','last']),
                                             (dict(hardware='a GPU'), [])])
def test_what_passed_with_other_code_or_elsewhere_is_repeated(tmp_path, change, repeated):
    does = dict(first=PASSES, last=PASSES)
    parts = parts_of(does)
    run,_ = make_run(tmp_path, does)
    run.run(parts)
    again,_ = make_run(tmp_path, does)
    again.about.update(change)
    assert [part.name for part in again.missing(parts)]==repeated
    again.run(again.missing(parts)[:1])
    noted = read_json(tmp_path/'gpu.json')['parts']
    assert {noted[name]['code'] for name in noted}=={'abc', *([change['code']] if 'code' in change else [])}

def test_the_machine_of_each_part_is_shown_where_they_differ():
    parts = [Part('a', '', 1), Part('b', '', 1)]
    entry = dict(status='passed', seconds=1.0, result=dict(text='fine'))
    note = dict(hardware='new', parts=dict(a=dict(entry, hardware='old'), b=dict(entry, hardware='new')))
    for row in ('| a | passed | 1 | old | fine |', '| b | passed | 1 | new |'): assert row in summary(note, parts)
    assert 'machine' not in summary(dict(note, parts=dict(a=dict(entry, hardware='new'), b=entry)), parts)
    assert '| a | not run | 0 |' in summary({}, parts)

def test_a_file_of_something_else(tmp_path):
    (tmp_path/'gpu.json').write_text('[1]')
    with pytest.raises(ValueError, match='is not of this script'): make_run(tmp_path, {})

def test_results_of_another_form_are_refused(tmp_path):
    (tmp_path/'gpu.json').write_text(json.dumps(dict(device='cpu', reduced=True, parts={})))
    with pytest.raises(ValueError, match=r"device: 'cpu' there, 'cuda' now; reduced: True there.*--out"):
        make_run(tmp_path, {})

# ---- parts

def test_the_line_that_an_error_gets():
    "`gpu_parts` imports nothing heavy by itself"
    from gpu_parts import in_a_line
    def error_of(line):
        try: exec(compile(line, __file__, 'exec'))
        except Exception as e: return e
    assert in_a_line(error_of("raise ValueError('first\\n\\nlast \\n')"))=='ValueError: last'
    try: assert 1==2
    except AssertionError as e: error = e
    error.args = () # pytest explains it
    assert in_a_line(error).startswith('AssertionError: try: assert 1==2 (test_gpu_benchmark.py:')

def test_the_real_device_counts_operations_and_waits(monkeypatch):
    "CUDA warns of each operation that waits; other warnings are shown"
    import warnings

    import torch
    monkeypatch.setenv('CASES_DEVICE', 'cpu')
    monkeypatch.syspath_prepend(ROOT/'tests'/'fakegpu')
    import realgpu
    with pytest.warns(UserWarning, match='another'), realgpu.watch() as seen:
        torch.arange(6).view(2,3).float().sort()
        for _ in range(2): warnings.warn('called a synchronizing CUDA operation', UserWarning, stacklevel=1)
        warnings.warn('another', UserWarning, stacklevel=1)
    assert seen.n_waits()==2 and seen.counts['aten::sort']==1 and seen.launches==sum(seen.counts.values())
    assert {where.split(':')[0] for _,_,where,_ in seen.waits}=={'tests/test_gpu_benchmark.py'}

# ---- plan and table

def test_the_plan():
    names = [part.name for part in plan('cuda', False)]
    assert len(names)==len(set(names)) and names[-1]=='market' and names[0].startswith('case:')
    cases = [name for name in names if name.startswith('case:')]
    assert names[:len(cases)]==cases and len(cases)>=13 and 'compile' in names
    assert 'case:waits_of_every_recipe' not in [part.name for part in plan('cpu', False)]
    for device in ('cpu','fakegpu'):
        assert {part.name for part in plan(device, True)}<{part.name for part in plan(device, False)}|{'market'}

def test_parts_by_name():
    parts = plan('cuda', False)
    assert [part.name for part in named(parts, ['step','head'])]==['head','step'] # in the order of the plan
    assert len(named(parts, ['case']))>=13
    with pytest.raises(ValueError, match='stp: no such part.*loader'): named(parts, ['stp'])

def test_the_children_know_every_part():
    "As text: the parts import the library only when they run"
    text = (ROOT/'benchmarks'/'gpu_parts.py').read_text()
    known = text[text.index('PARTS = dict('):]
    for part in plan('cuda', False):
        if not part.name.startswith('case:'): assert f'{part.name}=' in known, part.name

def test_the_table():
    parts = [Part('step', 'a step', 10), Part('paper', 'the paper', 10), Part('market', 'Market', 10)]
    note = dict(command='python benchmarks/gpu.py', hardware='a GPU', date='2026-11-29', torch='2.11', parts=dict(
        step=dict(status='passed', seconds=12.34, result=dict(text='21 ms', rows=[{'precision':'bf16', 'ms':'21.0'}])),
        paper=dict(status='crashed', seconds=3.0, error='killed by SIGKILL; a|b')))
    assert summary(note, parts)=="""python benchmarks/gpu.py · a GPU · 2026-11-29 · 2.11

| part | status | seconds | result |
| --- | --- | --- | --- |
| step | passed | 12 | 21 ms |
| paper | crashed | 3 | killed by SIGKILL; a/b |
| market | not run | 0 |  |

**step**: a step

| precision | ms |
| --- | --- |
| bf16 | 21.0 |"""

# ---- the command

def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu, 'gpu_name', lambda: None)
    assert gpu.main([])==2
    assert 'nvidia-smi' in capsys.readouterr().err

def test_the_list_needs_no_gpu(capsys):
    assert gpu.main(['--list', '--only', 'market'])==0
    assert capsys.readouterr().out.split()[:3]==['market','480','s']

@pytest.mark.parametrize('words,message', [
    (['--device','cpu'], 'add --reduced'), (['--data','nowhere'], 'there is no nowhere'),
    (['--jobs','0'], 'at least 1'), (['--minutes','0'], 'above 0'),
    (['--data',str(ROOT)], 'no folder bounding_box_train'), (['--device','tpu'], 'invalid choice')])
def test_bad_arguments(words, message, capsys):
    with pytest.raises(SystemExit) as e: gpu.main(words)
    assert e.value.code==2 and message in capsys.readouterr().err

def test_an_unknown_part(capsys):
    assert gpu.main(['--only', 'stp'])==2
    assert 'stp: no such part' in capsys.readouterr().err

# ---- the reduced forms

def reduced(folder, device, *words):
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(ROOT)}
    script = ROOT/'benchmarks'/'gpu.py'
    command = [sys.executable, '-W', 'ignore', script, '--device', device, '--reduced', '--out', folder, *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)

def check_reduced(folder, device):
    "All parts pass; a second run has nothing to do"
    res = reduced(folder, device, '--minutes', '12')
    assert res.returncode==0, res.stdout + res.stderr
    note = read_json(folder/'gpu.json')
    assert note['parts'].keys()=={part.name for part in plan(device, True)}
    assert set(states(folder).values())=={'passed'}, res.stdout
    assert all(len(note['parts'][name]['result']['rows'])>=1 for name in ('head','step','loader'))
    assert (folder/'gpu'/'market1501-modern.json').exists() and not list((folder/'gpu').glob('*unfinished.json'))
    again = reduced(folder, device)
    assert again.returncode==0 and read_json(folder/'gpu.json')['parts']==note['parts']

@pytest.mark.slow
def test_reduced_on_a_cpu(tmp_path): check_reduced(tmp_path, 'cpu')

@pytest.mark.slow
def test_reduced_on_a_pretend_gpu(tmp_path):
    if missing(): pytest.skip(f'The pretend GPU cannot be compiled here without {missing()}')
    check_reduced(tmp_path, 'fakegpu')

@pytest.mark.slow
def test_market_goes_on_where_it_stopped(tmp_path):
    "Its time is over after the first of two epochs; the second run trains the second"
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(ROOT)}
    script = ROOT/'benchmarks'/'gpu_parts.py'
    command = [sys.executable, '-W', 'ignore', script, 'market', '--device', 'cpu', '--reduced']
    for seconds,status in (('0','unfinished'), ('400','passed')):
        whole = [*command, '--folder', tmp_path, '--seconds', seconds]
        res = subprocess.run(whole, env=env, capture_output=True, text=True, timeout=600)
        entry = read_json(tmp_path/'market.json')
        assert entry['status']==status, res.stdout + res.stderr
        if status=='unfinished': assert entry['result']['text'].startswith('1 of 2 epochs')
    assert ' 2 epochs' in str(entry['result']['card'])
