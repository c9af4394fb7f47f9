"Synthetic people: same bytes, Market's layout, nothing half-written"
import hashlib
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from pyramidreid.synth import dataset as synth
from pyramidreid.synth.dataset import SH, SW, camera, contact_sheet, detect, scene, synth_persons
from pyramidreid.synth.people import LH, LW, _rng, draw_person, identity

NAME = re.compile(r'(-1|\d{4})_c(\d+)s(\d)_(\d{6})_(\d\d)\.jpg')
SMALL = dict(n_train=3, n_test=2, n_cams=2, per_cam=3, size=(64,32))

def digest(path): return {str(f.relative_to(path)): hashlib.sha1(f.read_bytes()).hexdigest() for f in sorted(path.glob('*/*.jpg'))}
def pids(path, d): return [NAME.fullmatch(f.name)[1] for f in (path/d).iterdir()]

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(synth.Path, 'home', lambda: tmp_path/'home')
    return tmp_path/'home'

def test_same_arguments_same_bytes_and_no_global_state(tmp_path):
    random.seed(1); np.random.seed(1)
    before = random.getstate(),np.random.get_state()[1].tolist(),np.random.get_state()[2]
    a = digest(synth_persons(tmp_path/'a', **SMALL, distractors=2, junk=2))
    camera.cache_clear()
    assert before == (random.getstate(),np.random.get_state()[1].tolist(),np.random.get_state()[2])
    random.seed(2); np.random.seed(2)
    assert a == digest(synth_persons(tmp_path/'b', **SMALL, distractors=2, junk=2))
    assert a != digest(synth_persons(tmp_path/'c', **SMALL, distractors=2, junk=2, seed=1))
    assert len(set(a.values())) == len(a)

def test_people_do_not_depend_on_how_many_there_are(tmp_path):
    a = digest(synth_persons(tmp_path/'a', **SMALL))
    b = digest(synth_persons(tmp_path/'b', **{**SMALL, 'n_train':5, 'n_test':4}, distractors=3, junk=1))
    assert a.items() <= b.items() and len(b) > len(a)

def test_layout_counts_and_disjoint_identities(tmp_path):
    p = synth_persons(tmp_path/'a', n_train=3, n_test=4, n_cams=3, per_cam=2, size=(64,32), distractors=5, junk=4)
    tr,q,g = (pids(p,d) for d in ('bounding_box_train','query','bounding_box_test'))
    assert (len(tr),len(q),len(g)) == (3*3*2, 4*3, 4*3+5+4)
    assert (g.count('0000'),g.count('-1')) == (5,4)
    assert len(set(tr))==3 and len(set(q))==4 and not set(tr) & set(g) and set(g)-{'0000','-1'} == set(q)
    for pid in set(q): assert sorted(NAME.fullmatch(f.name)[2] for f in (p/'query').glob(f'{pid}_*')) == ['1','2','3']
    assert not {f.name for f in (p/'query').iterdir()} & {f.name for f in (p/'bounding_box_test').iterdir()}
    assert {Image.open(f).size for f in p.glob('*/*.jpg')} == {(32,64)}

@pytest.mark.parametrize('pid', [*range(1,30), 'passer-by'])
def test_whole_person_in_the_exact_box(pid):
    who = identity(pid, family=0)
    for k,yaw in enumerate(range(0,360,30)):
        l,t,r,b = draw_person(who, yaw, (-.13,.13)[k%2], .1).getbbox()
        assert 0<l and 0<t and r<LW and b<LH
    for aspect in (.4,.5,1.):
        im,box = scene(who, camera(1), _rng('t',pid))
        got = detect(box, _rng('d',pid), 0., aspect)
        assert got[0]<box[0] and got[1]<box[1] and got[2]>box[2] and got[3]>box[3]
        assert (got[2]-got[0])/(got[3]-got[1]) == pytest.approx(aspect)
    assert im.size == (SW,SH)

def test_misalign_is_graded_and_bounded():
    _,box = scene(identity(1), camera(1), _rng('m'))
    h,lost,small = box[3]-box[1],{},{}
    for m in (0,.25,.5,1):
        got = [detect(box, _rng('m',i), m) for i in range(300)]
        lost[m] = [max(0,t-box[1])/h+max(0,box[3]-b)/h for _,t,_,b in got]
        small[m] = [h/(b-t) for _,t,_,b in got]
    assert max(lost[0])==0 and 0<np.mean(lost[.25])<np.mean(lost[.5])<np.mean(lost[1])
    assert .25<max(lost[1])<.4 and .5<min(small[1])<.65

BAD = [(dict(n_train=1),'n_train=1'), (dict(n_test=0),'n_test=0'), (dict(n_test=5000),'4999'), (dict(n_cams=1),'other cameras'), (dict(per_cam=1),'per_cam=1'),
       (dict(misalign=-.1),'misalign'), (dict(misalign=float('nan')),'misalign'), (dict(occlude=1.1),'occlude'), (dict(distractors=-1),'distractors'),
       (dict(junk=-1),'junk'), (dict(size=(20,64)),'size'), (dict(size=(64,8)),'size'), (dict(size=128),'size')]
@pytest.mark.parametrize('kw,msg', BAD)
def test_bad_input_writes_nothing(tmp_path, home, kw, msg):
    for path in (None, tmp_path/'new'):
        with pytest.raises(ValueError, match=msg): synth_persons(path, **{**SMALL,**kw})
    assert not any(tmp_path.iterdir())

def test_cache_is_reused_and_repaired(home, monkeypatch):
    p = synth_persons(**SMALL)
    assert p.parent == home/'.cache'/'pyramidreid' and p != synth_persons(**{**SMALL,'seed':1})
    want,img = digest(p),synth._image
    monkeypatch.setattr(synth, '_image', lambda *a: pytest.fail('drawn again'))
    assert synth_persons(**SMALL)==p and synth_persons(**{**SMALL,'size':[64,32]})==p
    monkeypatch.setattr(synth, '_image', img)
    next((p/'query').iterdir()).unlink()
    assert digest(synth_persons(**SMALL)) == want

@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_interrupted_is_not_complete(tmp_path, home, monkeypatch, error):
    img,n = synth._image,iter(range(100))
    def stop(*a):
        if next(n)==7: raise error
        return img(*a)
    for path in (None, tmp_path/'set'):
        n = iter(range(100)); monkeypatch.setattr(synth, '_image', stop)
        with pytest.raises(error): synth_persons(path, **SMALL)
        assert not list(tmp_path.rglob('*.jpg')) and not list(tmp_path.rglob('synth.json')) and not (tmp_path/'set').exists()
    monkeypatch.setattr(synth, '_image', img)
    assert len(digest(synth_persons(tmp_path/'set', **SMALL))) == 3*2*3+2*2*3

def test_killed_process_leaves_nothing_under_the_final_name(tmp_path):
    "What SIGKILL leaves: a hidden sibling, which is neither taken for the set nor in the way"
    p = synth_persons(tmp_path/'set', **SMALL)
    p.rename(tmp_path/'.set.0badcafe.tmp')
    assert not p.exists() and len(digest(synth_persons(p, **SMALL))) == 30

def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path/'x').mkdir(); (tmp_path/'x'/'thesis.tex').write_text('mine')
    with pytest.raises(FileExistsError, match='empty or new'): synth_persons(tmp_path/'x', **SMALL)
    assert [o.name for o in tmp_path.rglob('*')] == ['x','thesis.tex']
    (tmp_path/'f').write_text('a file')
    with pytest.raises(FileExistsError): synth_persons(tmp_path/'f', **SMALL)
    p = synth_persons(tmp_path/'set', **SMALL)
    with pytest.raises(FileExistsError): synth_persons(p, **{**SMALL,'seed':3})
    (p/'synth.json').write_text('{"n_train":')
    with pytest.raises(FileExistsError): synth_persons(p, **SMALL)

def test_two_at_once(tmp_path, monkeypatch):
    "A second process finishes the same set first: ours gives way to it"
    img,done = synth._image,[]
    def slow(*a):
        if not done: done.append(1); synth_persons(tmp_path/'set', **SMALL)
        return img(*a)
    monkeypatch.setattr(synth, '_image', slow)
    assert synth_persons(tmp_path/'set', **SMALL) == tmp_path/'set'
    assert [o.name for o in tmp_path.iterdir()] == ['set'] and len(digest(tmp_path/'set')) == 30

def test_empty_folder_and_marker(tmp_path):
    p = synth_persons(str(tmp_path), **SMALL)
    assert p == tmp_path and json.loads((p/'synth.json').read_text())['n_train'] == 3
    assert synth_persons(tmp_path, **SMALL) == tmp_path

def test_contact_sheet(tmp_path):
    import matplotlib.pyplot as plt
    p = synth_persons(tmp_path/'a', **SMALL, distractors=3, junk=2)
    for split,per in (('bounding_box_train',2),('query',1),('bounding_box_test',3)):
        fig = contact_sheet(p, n=5, split=split, per_cam=per)
        assert len(fig.axes) == (3 if 'train' in split else 2)*2*per
        plt.close(fig)
