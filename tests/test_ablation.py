"The grid of ablations: what is in it, that a killed script resumes, and that runs of other configurations never mix"
import json
import subprocess
import sys

import ablation
import common
import pandas as pd
import pytest
import torch

from pyramidreid.models.pyramid import PyramidHead

TINY = '--size 48 24 --n-parts 3 --batch 8 8 --steps 1 --seeds 1'.split()
BASE = dict(n_parts=6)

def full(seeds=1, n=6, rows=6): return ablation.grid(ablation.questions(n, rows), seeds, BASE)

def test_every_configuration_once():
    configs = full(seeds=2)
    plain = [json.dumps({k:v for k,v in c.items() if k!='name'}, sort_keys=True) for c in configs]
    assert len(set(plain))==len(plain)==len({(c['name'],c['seed']) for c in configs})
    assert [c['name'] for c in configs].count('default')==2
    assert configs[0]==dict(BASE, name='default', seed=0)

def test_what_is_asked():
    asked = ablation.questions(6, 6)
    assert list(asked)==list(ablation.titles)
    levels = [d['levels'] for d in asked['levels'].values() if d]
    without_one = [[2,3,4,5,6], [1,3,4,5,6], [1,2,4,5,6], [1,2,3,5,6], [1,2,3,4,6], [1,2,3,4,5]]
    assert sorted(levels)==sorted([*without_one, [1,2,3], [4,5,6], [1], [6]])
    assert [sum(not d for d in o.values()) for o in asked.values()]==[1]*5 # the default is in every question
    assert list(asked['parts'])==['1','2','3','6']
    assert list(ablation.questions(6, 24)['parts'])==['1','2','3','4','6','8']
    assert list(asked['width'])==['32','64','128','256']
    assert len(full())==24

@pytest.mark.parametrize('n', range(2,9))
def test_no_empty_pyramid(n): assert all(c.get('levels', [1]) for c in full(n=n, rows=n))

def test_triplet_alone_never_on_random_batches():
    alone = [c for c in full() if c.get('only')=='triplet']
    assert alone and all(c.get('mode','pk')=='pk' and c['dynamic'] is False for c in alone)
    with pytest.raises(ValueError, match='P×K'):
        common.train('x', 0, None, only='triplet', mode='random', dynamic=False)
    with pytest.raises(ValueError, match='dynamic=False'): common.train('x', 0, None, only='triplet')

def test_one_part_is_the_whole():
    "So the two share a run"
    heads = []
    for kwargs in (dict(n_parts=1),dict(n_parts=6, levels=[6])):
        torch.manual_seed(0)
        heads.append(PyramidHead(16, 5, emb_sz=8, drop=0., **kwargs))
    fmap = torch.randn(4,16,6,2)
    for a,b in zip(*(h(fmap) for h in heads)): torch.testing.assert_close(a, b)

def test_differences_by_hand():
    rows = [('default',0,.5), ('default',1,.6), ('shift=1000',0,.53), ('shift=2000',0,.48), ('shift=1000',1,.6),
            ('emb_sz=32',1,.4)]
    runs = pd.DataFrame(rows, columns=['name','seed','mAP'])
    assert ablation.against_default(runs)['emb_sz=32'].dropna().round(6).to_dict()=={1:-.2}
    assert sorted(ablation.by_chance(runs).round(6))==[-.02,0,.03]

def configs(n): return [dict(name=str(i), seed=0, mAP=i/10, seconds=0.) for i in range(n)]

@pytest.mark.parametrize('jobs', (1,2))
def test_goes_on(tmp_path, jobs):
    f,settings = tmp_path/'grid.json',dict(size=[96,32])
    common.run_grid(f, configs(2), jobs, dict, settings)
    note = json.loads(f.read_text())
    note['runs'][0]['mAP'] = 99.
    f.write_text(json.dumps(note))
    runs = common.run_grid(f, configs(4), jobs, dict, settings)
    assert sorted(runs.name)==['0','1','2','3'] and (runs.mAP==99).sum()==1
    assert json.loads(f.read_text())['runs']==runs.to_dict('records')
    assert [o.name for o in tmp_path.iterdir()]==['grid.json']

def test_stops_in_time(tmp_path, capsys):
    assert common.run_grid(tmp_path/'grid.json', configs(3), 1, dict, {}, minutes=0).empty
    assert '3 runs left' in capsys.readouterr().out

def test_a_failed_run_stops_no_other(tmp_path):
    f = tmp_path/'grid.json'
    bad = dict(name='bad', seed=0, dynamic=True, df=None, only='id')
    with pytest.raises(RuntimeError, match='1 of 3 runs failed.*bad, seed 0: TypeError'):
        common.run_grid(f, [configs(1)[0],dict(bad, unheard_of=1),configs(2)[1]], 1, strict, {})
    assert [o['name'] for o in json.loads(f.read_text())['runs']]==['0','1']

def strict(name, seed, mAP, seconds): return dict(name=name, seed=seed, mAP=mAP, seconds=seconds)

@pytest.mark.parametrize('other', [
    dict(size=[96,48], epochs=4), dict(size=[96,32], epochs=5), dict(size=[96,32]),
    dict(size=[96,32], epochs=4, data='Market-1501'), {}])
def test_never_mixed(tmp_path, other):
    f = tmp_path/'grid.json'
    common.run_grid(f, configs(1), 1, dict, dict(size=[96,32], epochs=4))
    was = f.read_text()
    with pytest.raises(ValueError, match='another configuration'): common.run_grid(f, configs(2), 1, dict, other)
    assert f.read_text()==was

@pytest.mark.slow
def test_command_line(tmp_path, people):
    "One-step runs by the real command; then it goes on from a half-done file, and refuses other settings"
    files = ['--data', str(people), '--cache', str(tmp_path/'images.safetensors'), '--out', str(tmp_path/'tiny')]
    args = [*files[:4], *TINY, '--questions', 'parts', *files[4:]]
    res = subprocess.run([sys.executable, '-W', 'ignore', ablation.__file__, *args], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    note = json.loads((tmp_path/'tiny.json').read_text())
    first = {o['name']:o for o in note['runs']}
    assert list(first)==['default','shift=1000','shift=2000','levels=[3]']
    assert first['default']['steps']==1
    assert len(first['default']['code'])==7
    assert note['settings']['hold_out']==.2
    assert note['settings']['images']==dict(train=144, query=24, gallery=54)
    assert note['hardware']
    command = 'python benchmarks/ablation.py --data people --cache images.safetensors --size 48 24'
    assert note['command'].startswith(command)
    table = (tmp_path/'tiny.md').read_text()
    for text in ('20% of the training identities held out', '## Basic parts', '**3** (default)'): assert text in table
    assert '## Which loss' not in table
    assert (tmp_path/'tiny.png').read_bytes().startswith(b'\x89PNG')

    note['runs'] = [dict(first['default'], mAP=.125),first['shift=2000'],first['levels=[3]']]
    (tmp_path/'tiny.json').write_text(json.dumps(note))
    ablation.main([*args, '--questions', 'dynamic'])
    second = {o['name']:o for o in json.loads((tmp_path/'tiny.json').read_text())['runs']}
    assert second['default']['mAP']==.125 # noted, not run again
    assert second['shift=1000']['mAP']==first['shift=1000']['mAP'] # run again: the same seed, the same figure
    changes = ['dynamic=normalized', 'dynamic=paper', 'dynamic=False']
    assert list(second)==['default','shift=2000','levels=[3]','shift=1000', *changes]
    commands = json.loads((tmp_path/'tiny.json').read_text())['command'].split(' && ')
    assert commands[0].split()[-3:]==['parts','--out','tiny']
    assert str(tmp_path) not in (tmp_path/'tiny.md').read_text()+(tmp_path/'tiny.json').read_text()

    was = (tmp_path/'tiny.json').read_bytes()
    words = r'tiny.json contains 7 runs of another configuration \(steps: 1 there, 9 now\).*--out'
    with pytest.raises(SystemExit, match=words): ablation.main([*args, '--steps', '9'])
    with pytest.raises(SystemExit, match='hold_out: 0.2 there, None now'): ablation.main([*args, '--test'])
    assert (tmp_path/'tiny.json').read_bytes()==was

@pytest.mark.slow
def test_drawn_people(tmp_path, monkeypatch, capsys):
    "Without --data, and without time: nothing to compare, nothing written; then all of it"
    for home in ('HOME','USERPROFILE'): monkeypatch.setenv(home, str(tmp_path/'home'))
    args = [*TINY, '--people', '8', '4', '--questions', 'loss', '--out', str(tmp_path/'tiny')]
    ablation.main([*args, '--minutes', '0'])
    assert 'nothing to compare' in capsys.readouterr().out and not list(tmp_path.iterdir())
    ablation.main(args)
    note = json.loads((tmp_path/'tiny.json').read_text())
    changes = [*ablation.AGAIN.values(), *ablation.questions(3, 3)['loss'].values()]
    assert {run['name'] for run in note['runs']}=={ablation.name(change) for change in changes}
    assert (note['settings']['n_train'],note['settings']['n_test'],note['settings']['misalign'])==(8,4,.5)
    assert all(o['embedding']==6*128 for o in note['runs'])

@pytest.mark.parametrize('wrong', [
    '--test', '--data x --test --hold-out .2', '--cache x', '--recipe paper --lr 1', '--n-parts 1'])
def test_wrong_arguments(wrong):
    with pytest.raises(SystemExit): ablation.parse(wrong.split())
