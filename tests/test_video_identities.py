"Identities against a plain loop, what is impossible, corrections, and a crash at any time"
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from gallery_toys import calibration_of

pytest.importorskip('pyarrow', reason='needs the extra gallery')

from pyramidreid.gallery.entries import Embeddings
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.gallery.milvus import MilvusGallery
from pyramidreid.video.identities import Identities, cluster_tracklets, conflicts, impossible_pairs

FINGERPRINT = 'directions'

class Model:
    fingerprint = FINGERPRINT
    def embed(self, items): raise NotImplementedError

def seen(rows): return Embeddings(np.atleast_2d(rows), FINGERPRINT)
def make(**kwargs): return Identities(Model(), **{'threshold': .6, **kwargs})

def walks(n, seed=0, people=8, noise=.5):
    "Embeddings, cameras and times of random tracklets"
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(people,16))
    return [dict(person=person, pictures=directions[person]+noise*rng.normal(size=(int(rng.integers(1, 6)),16)),
                 cam=int(rng.integers(1, 4)), start=float(start), end=float(start+rng.uniform(0, 30)))
            for person,start in zip(rng.integers(0, people, n), rng.uniform(0, 400, n))]

class PlainIdentities:
    "A list of tracklets, and every comparison on its own"
    def __init__(self, threshold, travel): self.threshold,self.travel,self.known,self.n = threshold,travel,[],0

    def is_impossible(self, a, b):
        between = max(a['start']-b['end'], b['start']-a['end'])
        if a['cam']==b['cam']: return between<0
        seconds = self.travel.get(frozenset((str(a['cam']),str(b['cam']))), self.travel.get(None))
        return seconds is not None and between<seconds

    def identify(self, walk):
        unit = [row/np.linalg.norm(row) for row in walk['pictures'].astype(np.float32)]
        emb = sum(unit)/np.linalg.norm(sum(unit))
        excluded = {other['pid'] for other in self.known if self.is_impossible(walk, other)}
        best,pid = -math.inf,None
        for other in self.known:
            similarity = float(other['emb']@emb)
            if other['pid'] not in excluded and similarity>best: best,pid = similarity,other['pid']
        if best<self.threshold:
            self.n += 1
            pid = f'person {self.n}'
        self.known.append(dict(walk, emb=emb, pid=pid))
        return pid

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('travel', [None, 0., 5., {(1,2):20., (2,3):0.}])
def test_answers_equal_a_plain_loop(seed, travel):
    ids,plain = make(travel=travel),PlainIdentities(.6, {})
    if isinstance(travel, dict): plain.travel = {frozenset(map(str, pair)): o for pair,o in travel.items()}
    elif travel is not None: plain.travel = {None: travel}
    for walk in walks(60, seed):
        answer = ids.identify(seen(walk['pictures']), walk['cam'], walk['start'], walk['end'])
        assert answer.pid==plain.identify(walk)
    assert len(ids)==len({other['pid'] for other in plain.known}) and len(ids.gallery)==60

def test_what_is_unknown_is_possible():
    table = pd.DataFrame(dict(cam=['a','a','','b'], start=[0.,math.nan,0,0], end=[9.,math.nan,9,9]))
    assert conflicts(table, 'a', 5., 6., {}).tolist()==[True,False,False,False]
    assert conflicts(table, '', 5., 6., {None: 0.}).tolist()==[False]*4
    assert conflicts(table, 'a', math.nan, math.nan, {None: 0.}).tolist()==[False]*4

def test_times_of_any_kind():
    ids,east = make(),np.eye(4)[0]
    first = ids.identify(seen(east), 1, '2026-11-29 08:00', '2026-11-29 08:01')
    same = ids.identify(seen(east), 1, pd.Timestamp('2026-11-29 08:05'))
    other = ids.identify(seen(east), 1, pd.Timestamp('2026-11-29 08:00:30').timestamp())
    assert first.is_new and same.pid==first.pid and other.is_new

@pytest.mark.parametrize('kwargs,said', [
    (dict(start=5, end=4), 'before it begins'), (dict(start='noon-ish'), 'seconds, or a date'),
    (dict(start=math.inf), 'seconds, or a date'), (dict(track='t'), 'exist already'),
    (dict(items=Embeddings(np.eye(4)[:1], 'another')), "Another model's"),
    (dict(items=seen(np.empty((0,4)))), 'at least one picture'), (dict(items=seen(np.zeros(4))), 'zero or not finite'),
    (dict(items=seen(np.eye(5)[0])), '5 dimensions')])
def test_wrong_tracklets_change_nothing(kwargs, said):
    ids = make()
    ids.identify(seen(np.eye(4)[0]), track='t')
    before = ids.table
    with pytest.raises(ValueError, match=said): ids.identify(**{'items': seen(np.eye(4)[0]), **kwargs})
    assert ids.table.equals(before)

@pytest.mark.parametrize('kwargs,said', [
    (dict(threshold=None), 'How similar'), (dict(travel=-1.), 'travel=-1'), (dict(travel={(1,): 3.}), 'camera, camera'),
    (dict(travel={(1,2): 'far'}), 'give seconds'),
    (dict(travel={(1,1): 3.}), 'two cameras'), (dict(travel={'ab': 3.}), 'two cameras'),
    (dict(travel=math.inf), 'travel'), (dict(threshold=math.nan), 'a similarity'),
    (dict(threshold='high'), 'a similarity'), (dict(threshold=5), 'a similarity')])
def test_wrong_settings(kwargs, said):
    with pytest.raises(ValueError, match=said): make(**kwargs)

def test_a_calibration_sets_the_threshold(tmp_path):
    "One of ten strangers may be taken for somebody: those above .8 are"
    calibration = calibration_of(np.linspace(-.1, .8, 10), 100, about={})
    ids = Identities(Model(), far=.1, calibration=calibration)
    assert ids.threshold==pytest.approx(.8)
    ids.save(tmp_path/'ids')
    assert Identities.load(tmp_path/'ids', Model()).threshold==ids.threshold
    with pytest.raises(ValueError, match='out of reach'): Identities(Model(), far=.01, calibration=calibration)

def test_enrolling_is_all_or_nothing():
    ids = make()
    photos = seen(np.stack([np.eye(4)[0], np.zeros(4)]))
    with pytest.raises(ValueError, match='zero or not finite'): ids.enroll('Ann', photos)
    assert len(ids.gallery)==0

def test_people_are_enrolled_and_never_forgotten():
    ids,north,east = make(),np.eye(4)[0],np.eye(4)[1]
    ids.enroll('Ann', seen(np.stack([north,north+.1])))
    assert ids.identify(seen(north), 1, 0, 5).pid=='Ann' and ids.identify(seen(east), 1, 10, 15).is_new
    assert ids.forget(before=7)==1 and ids.forget(before=1e12)==1
    assert set(ids.table.pid)=={'Ann'} and len(ids.gallery)==2
    assert ids.identify(seen(east)).pid=='person 2' # the name of somebody forgotten is not given again

def test_corrections():
    ids,directions = make(),np.eye(4)
    a,b,c = (ids.identify(seen(directions[i])) for i in range(3))
    ids.merge(a.pid, b.pid)
    assert ids.identify(seen(directions[1])).pid==a.pid and len(ids)==2
    assert ids.split([b.track])=='person 4' and ids.split(c.track, 'Cem')=='Cem'
    assert set(ids.table.pid)=={a.pid,'person 4','Cem'}
    with pytest.raises(ValueError, match='no identity'): ids.merge(a.pid, 'nobody')
    with pytest.raises(ValueError, match='not in the gallery'): ids.split('nothing')

def test_all_goes_on_after_a_restart(tmp_path):
    ids,all_walks = make(travel={(1,2): 9., (3,1): 0.}, far=.02),walks(50, 3)
    whole = make(travel={(1,2): 9., (3,1): 0.}, far=.02)
    def feed(ids, walk): return ids.identify(seen(walk['pictures']), walk['cam'], walk['start'], walk['end']).pid
    for walk in all_walks[:25]: assert feed(ids, walk)==feed(whole, walk)
    ids.save(tmp_path/'ids')
    again = Identities.load(tmp_path/'ids', Model())
    assert (again.far,again.fixed_threshold,again.travel)==(.02,.6,ids.travel)
    for walk in all_walks[25:]: assert feed(again, walk)==feed(whole, walk)

def test_a_gallery_in_milvus_is_refused():
    with pytest.raises(TypeError, match='use a Gallery'): Identities(gallery=MilvusGallery.__new__(MilvusGallery))

def test_a_plain_gallery_is_refused(tmp_path):
    Gallery(Model()).add(pd.DataFrame(dict(key=['a'])), embs=seen(np.eye(4)[0])).save(tmp_path/'g')
    with pytest.raises(ValueError, match='without identities'): Identities.load(tmp_path/'g', Model())

LAUNCHER = '''
import os
import sys
sys.path.insert(0, sys.argv[1])
from test_video_identities import make, seen, walks

def work(folder):
    ids = make()
    for i,walk in enumerate(walks(10_000, 5)):
        ids.identify(seen(walk['pictures']), walk['cam'], walk['start'], walk['end'], track=i)
        if i%3==2:
            ids.save(folder)
            print(i+1, flush=True)

for folder in sys.stdin: # each in a process of its own, for which everything is imported already
    pid = os.fork()
    if not pid:
        work(folder.strip())
        os._exit(0)
    print(f'child {pid}', flush=True)
    os.waitpid(pid, 0)
    print('ended', flush=True)
'''

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_nothing_saved_is_lost_by_kill_9(tmp_path):
    rng = np.random.default_rng(0)
    command = [sys.executable, '-c', LAUNCHER, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        for n in range(50):
            folder,saves,pid = tmp_path/f'{n}',[0],None
            print(folder, file=launcher.stdin, flush=True)
            n_saves = int(rng.integers(1, 12))
            while pid is None or len(saves)<=n_saves:
                line = launcher.stdout.readline()
                if line.startswith('child'): pid = int(line.split()[1])
                else: saves.append(int(line))
            time.sleep(rng.uniform(0, .05)) # into the middle of what follows
            os.kill(pid, signal.SIGKILL)
            saves += map(int, iter(launcher.stdout.readline, 'ended\n'))
            again = Identities.load(folder, Model())
            assert len(again.gallery)>=max(saves)>0
            assert again.table.key.tolist()==[str(i) for i in range(len(again.gallery))]
        launcher.stdin.close()

# all at once

def test_clusters_keep_apart_what_is_impossible():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(5,16))
    persons = rng.integers(0, 5, 40)
    embs = directions[persons]+.2*rng.normal(size=(40,16))
    codes = cluster_tracklets(embs, .6)
    assert codes.tolist()==pd.factorize(persons)[0].tolist()
    impossible = rng.random((40,40))<.05
    impossible |= impossible.T
    apart = cluster_tracklets(embs, .6, impossible)
    assert not (impossible & (apart[:,None]==apart[None,:]) & ~np.eye(40, dtype=bool)).any()

@pytest.mark.parametrize('n', [0,1])
def test_clusters_of_few(n): assert cluster_tracklets(np.eye(4)[:n], .5).tolist()==[0]*n

def test_a_wrong_mask():
    with pytest.raises(ValueError, match='for 3 tracklets'): cluster_tracklets(np.eye(3), .5, np.zeros((2,2), bool))

def test_a_new_name():
    ids = make()
    first,other = (ids.identify(seen(np.eye(4)[i])) for i in (0,1))
    ids.rename(first.pid, 'anna')
    assert ids.identify(seen(np.eye(4)[0])).pid=='anna' and first.pid not in set(ids.table.pid)
    with pytest.raises(ValueError, match='another identity'): ids.rename(other.pid, 'anna')
    with pytest.raises(ValueError, match='no identity'): ids.rename('nobody', 'bert')
    assert ids.rename('anna', 'anna') is ids

def test_thresholds_change_later():
    ids = make(threshold=.9)
    with pytest.raises(ValueError, match='calibration'): ids.change(far=.1)
    assert ids.change(threshold=.3).threshold==.3
    ids = make(threshold=.9).change(travel=20)
    ids.identify(seen(np.eye(4)[0]), cam=1, start=0, end=5)
    assert ids.identify(seen(np.eye(4)[0]), cam=2, start=10).is_new

def test_numbers_of_tracks_leave_out_names_that_are_taken():
    ids = make()
    ids.identify(seen(np.eye(4)[0]), track='track 2')
    assert [ids.identify(seen(np.eye(4)[i])).track for i in (1,2)]==['track 3','track 4']
    assert len(ids.gallery)==3

def test_the_guide_is_as_short_as_it_says():
    "Lines of code that a reader sees and would write: no tests, and not the drawing of the result"
    guide = Path(__file__).parents[1]/'nbs'/'guides'/'video_to_identities.ipynb'
    notebook = json.loads(guide.read_text(encoding='utf-8'))
    cells = [''.join(o['source']) for o in notebook['cells'] if o['cell_type']=='code']
    lines = [line.strip() for cell in cells if not cell.startswith('#|') for line in cell.splitlines()]
    code = [line for line in lines if line and not line.startswith(('#','assert','test_eq'))]
    assert 40<len(code)<60

def test_what_is_refused_changes_nothing():
    ids = make(travel=3)
    for kwargs in (dict(far=.1), dict(threshold='high'), dict(threshold=.7, travel=-1), dict(calibration=.7)):
        with pytest.raises((ValueError,TypeError)): ids.change(**kwargs)
    assert (ids.far,ids.threshold,ids.travel)==(.05,.6,{None: 3.}) and ids.gallery.calibration is None
    ids.change(calibration=calibration_of(np.linspace(-.1, .8, 10), 100, about={}), far=.1)
    with pytest.raises(ValueError, match='out of reach'): ids.change(far=.01)
    assert ids.threshold==pytest.approx(.8) and ids.far==.1

def test_a_pair_of_one_camera_that_was_saved_earlier(tmp_path):
    ids = make()
    ids.travel = {frozenset('1'): 3., frozenset('12'): 4.}
    assert Identities.load(ids.save(tmp_path/'ids'), Model()).travel=={frozenset('12'): 4.}

class ThreeColours:
    "The mean colour of a picture"
    fingerprint,size = 'three colours',(8,8)
    def embed(self, items): return np.stack([np.asarray(item, float).mean((0,1)) for item in items])

@pytest.mark.parametrize('kind', ['array','image','file','list'])
def test_one_picture_by_itself(kind, tmp_path):
    from PIL import Image
    red = np.zeros((64,32,3), np.uint8)
    red[...,0] = 200
    picture = dict(array=red, image=Image.fromarray(red), file=tmp_path/'red.png', list=[red])[kind]
    Image.fromarray(red).save(tmp_path/'red.png')
    ids = Identities(ThreeColours(), threshold=.9).enroll('red', picture)
    assert len(ids.gallery)==1 and ids.identify(picture).pid=='red'
    if kind=='file': assert ids.identify(str(picture)).pid=='red'

def test_the_middle_picture_is_remembered(tmp_path):
    from PIL import Image
    files = [tmp_path/f'{i}.png' for i in range(5)]
    for i,file in enumerate(files): Image.new('RGB', (8,16), (200,i,0)).save(file)
    arrays = [np.asarray(Image.open(file)) for file in files]
    ids = Identities(ThreeColours(), threshold=.9)
    ids.identify(arrays)
    assert 'fn' not in ids.table
    ids.identify(files[:3])
    ids.identify([*files[:2], *arrays[2:], str(files[3])])
    embs = Embeddings(np.eye(3)[:1], ThreeColours.fingerprint)
    ids.identify(embs, picture=files[4])
    ids.enroll('red', files[:2]).enroll('green', embs, [files[2]]).enroll('blue', embs)
    expected = [None, files[1], None, files[4], files[0], files[1], files[2], None]
    for people in (ids, Identities.load(ids.save(tmp_path/'ids'), ThreeColours())):
        assert [None if pd.isna(fn) else Path(fn) for fn in people.table.fn]==expected
    with pytest.raises(ValueError, match='2 pictures to show for 1 photos of ann'): ids.enroll('ann', embs, files[:2])
    assert len(ids.gallery)==8
    table = pd.DataFrame(dict(track=['a','b'], cam=['1','2'], start=[0.,1], end=[1.,2], picture=[None,str(files[0])]))
    both = Identities(ThreeColours(), threshold=.9)
    both.identify_together(Embeddings(np.eye(3)[:2], ThreeColours.fingerprint), table)
    assert pd.isna(both.table.fn[0]) and both.table.fn[1]==str(files[0])

def with_gallery(embs, **columns):
    table = pd.DataFrame(dict(key=[f'{i}' for i in range(len(embs))])).assign(**columns)
    return Identities(threshold=.6, gallery=Gallery(Model()).add(table, embs=seen(embs)))

def test_going_on_with_a_gallery():
    people = dict(pid=['ann','bob',None,'cem'], cam=['1',None,'2','2'], start=[0.,1,2,None], end=[5.,6,7,None])
    ids = with_gallery(np.eye(5)[:4], **people)
    assert len(ids)==3
    assert [ids.identify(seen(np.eye(5)[i]), '1', 20).pid for i in range(5)]==['ann','bob','person 1','cem','person 2']
    assert ids.identify(seen(np.eye(5)[0]), '1', 3).is_new # ann was in the picture
    assert ids.forget(before=10)==4 and set(ids.table.pid)=={'ann','bob','person 1','cem','person 2'}

@pytest.mark.parametrize('change,said', [
    (dict(pid=[1,2]), "'pid' of the gallery is number"), (dict(cam=[1,2]), "'cam' of the gallery is number"),
    (dict(start=['a','b']), "'start' of the gallery is text"), (dict(end=None), "'end' of the gallery is missing")])
def test_galleries_that_do_not_fit(change, said):
    people = dict(pid=['ann','bob'], cam=['1','2'], start=[0.,1], end=[5.,6]) | change
    with pytest.raises(ValueError, match=said):
        with_gallery(np.eye(4)[:2], **{name: values for name,values in people.items() if values is not None})

def test_forgetting_needs_a_time():
    for before in (None,math.nan,'soon'):
        with pytest.raises(ValueError, match='before='): make().forget(before)

def test_half_a_mask_is_a_mask():
    apart = np.zeros((3,3), bool)
    apart[2,0] = True
    assert cluster_tracklets(np.ones((3,4)), .5, apart).tolist() in ([0,0,1],[0,1,1])

def test_impossible_pairs_equal_the_plain_rule():
    rng = np.random.default_rng(0)
    table = pd.DataFrame([dict(cam=str(o['cam']), start=o['start'], end=o['end']) for o in walks(30)])
    table.loc[rng.choice(30, 5), 'cam'] = None
    table.loc[rng.choice(30, 5), ['start','end']] = math.nan
    rows = table.to_dict('records')
    for travel,seconds in ((None, {}), (20., {None: 20.}), ({(1,2): 50.}, {frozenset('12'): 50.})):
        plain = PlainIdentities(.6, seconds)
        def apart(a, b, plain=plain):
            return a is not b and isinstance(a['cam'], str) and isinstance(b['cam'], str) and plain.is_impossible(a, b)
        expected = [[bool(apart(a, b)) for b in rows] for a in rows]
        assert impossible_pairs(table, travel).tolist()==expected

def test_together():
    all_walks = walks(40, 2, noise=.2)
    table = pd.DataFrame([dict(track=f't{i}', cam=str(o['cam']), start=o['start'], end=o['end'])
                          for i,o in enumerate(all_walks)])
    embs = seen(np.stack([o['pictures'].mean(0) for o in all_walks]))
    ids = make()
    pids = ids.identify_together(embs, table)
    assert ids.table.pid.tolist()==pids and ids.table.key.tolist()==table.track.tolist()
    unit = embs.values/np.linalg.norm(embs.values, axis=1, keepdims=True)
    codes = cluster_tracklets(unit, .6, impossible_pairs(table))
    assert pids==[f'person {code+1}' for code in codes]
    new = ids.identify(seen(-embs.values[0]))
    assert new.is_new and new.pid==f'person {codes.max()+2}'
    with pytest.raises(ValueError, match='already'): ids.identify_together(embs, table)
    with pytest.raises(ValueError, match='40 embeddings for 3'): make().identify_together(embs, table[:3])
    with pytest.raises(ValueError, match='before it begins'): make().identify_together(embs, table.assign(end=-1.))
    with pytest.raises(ValueError, match="Another model's"):
        make().identify_together(Embeddings(embs.values, 'another'), table)
    with pytest.raises(ValueError, match='zero or not finite'): make().identify_together(seen(0*embs.values), table)
    assert make().identify_together(seen(np.empty((0,4))), table[:0])==[]
