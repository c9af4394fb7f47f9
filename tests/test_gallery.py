"The gallery: searches against brute force, filters, whose embedding, and what the errors say"
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

faiss = pytest.importorskip('faiss', reason='needs the extra gallery')
pytest.importorskip('pyarrow', reason='needs the extra gallery')
from PIL import Image

from pyramidreid.evaluation.openset import Calibration
from pyramidreid.gallery.entries import Embeddings, allowed
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.gallery.nearest import Rows, build_index, exact, nearest, normalize_rows


class Model:
    "Mean colour of three bands: not much of a model, but quick"
    def __init__(self, name='a model', dim=9): self.fingerprint,self.dim,self.seen = name,dim,0
    def embed(self, images):
        self.seen += len(images)
        return np.stack([np.asarray(o.resize((1,3)), np.float32).ravel()[:self.dim]+1 for o in images])

def pictures(n, seed=0): return list(np.random.default_rng(seed).integers(0, 255, (n,6,3,3), np.uint8))

@pytest.fixture
def files(tmp_path):
    "Six pictures of two people by two cameras, an hour between each"
    res = []
    for i,o in enumerate(pictures(6)):
        res.append(tmp_path/f'{i}.png')
        Image.fromarray(o).save(res[-1])
    return pd.DataFrame(dict(fn=res, pid=[1,1,1,2,2,2], cam=['door','hall']*3, time=pd.date_range('2026-11-23 08:00', periods=6, freq='h')))

@pytest.fixture
def gallery(files): return Gallery.from_learner(Model(), files)

def cosines(q, g): return normalize_rows(q)@normalize_rows(g).T

# Searching

def test_against_brute_force(gallery, files):
    model = Model()
    q,g = model.embed([Image.fromarray(o) for o in pictures(3, 7)]),model.embed([Image.open(o) for o in files.fn])
    found,sims = gallery.search(pictures(3, 7), k=6),cosines(q, g)
    for i in range(3):
        rows = found[found['query']==i]
        order = np.argsort(-sims[i], kind='stable')
        assert rows.key.tolist()==[str(files.fn[o]) for o in order] and np.allclose(rows.similarity, sims[i,order], atol=1e-6)
        assert rows.pid.tolist()==files.pid[order].tolist() and rows.time.tolist()==files.time[order].tolist()
    one = gallery.search(pictures(3, 7)[1], k=6)
    assert 'query' not in one and one.key.tolist()==found.key[found['query']==1].tolist()

def test_kinds_of_queries(gallery, files):
    f = files.fn[2]
    for o in (f, str(f), Image.open(f), np.asarray(Image.open(f)), gallery.embed([f])):
        found = gallery.search(o, k=2)
        assert found.key[0]==str(f) and found.similarity[0]>.999999 and 'query' not in found
    assert gallery.search([f], k=1)['query'].tolist()==[0] and gallery.search(gallery.embed([f,f]), k=1)['query'].tolist()==[0,1]

def test_filters(gallery, files):
    q = files.fn[0]
    assert set(gallery.search(q, 6, exclude_cam='door').cam)=={'hall'}
    assert gallery.search(q, 6, exclude_cam=['door','hall']).empty
    assert set(gallery.search(q, 6, since='2026-11-23 11:00').pid)=={2}
    assert gallery.search(q, 6, since=pd.Timestamp('2026-11-23 12:00'), exclude_cam='hall').key.tolist()==[str(files.fn[4])]
    assert len(gallery.search(q, 6, where='pid==2 and cam!="door"'))==2
    assert len(gallery.search(q, 6, where=lambda t: t.pid==1))==3
    assert len(gallery.search(q, 6, threshold=.9999))==1
    assert len(gallery.search([q,q], 2, where='pid==2'))==4

@pytest.mark.parametrize('args,why', [(dict(k=7),'k=7: the gallery has 6 entries'),(dict(k=0),'k=0'),(dict(where='dor=="x"'),'dor'),(dict(where='pid'),'True or False'),(dict(where='pid==1 and time != "2026-11-23 08:00"'),'say >= and <'),(dict(where=lambda t: [True]),'each of the 6'),
    (dict(where=lambda t: t.nobody),'AttributeError'),(dict(exclude_cam=1),'excludes nothing'),(dict(since='noon or so'),"since='noon or so'"),(dict(since='2026-11-23 08:00+01:00'),'time zone'),(dict(far=.01),'needs a calibration')])
def test_search_errors(gallery, files, args, why):
    with pytest.raises(ValueError, match=why): gallery.search(files.fn[0], **{'k':3, **args})

def test_columns_that_are_not_there(files):
    g = Gallery.from_learner(Model(), files[['fn']])
    for args in (dict(exclude_cam='door'),dict(since='2026-11-23')):
        with pytest.raises(ValueError, match="needs a column"): g.search(files.fn[0], k=1, **args)

def test_gaps(files):
    g = Gallery.from_learner(Model(), files.assign(cam=['door']+[None]*5, time=[pd.NaT]+files.time[1:].tolist()))
    assert len(g.search(files.fn[0], 6, exclude_cam='door'))==5 and len(g.search(files.fn[0], 6, since='2000-01-01'))==5
    g.add(pictures(1, 3), keys='x')
    assert g.search(pictures(1, 3)[0], 7, where='pid==1').pid.tolist()==[1,1,1]

def calibrated(n_gallery=6, **about):
    "Ten strangers' best similarities, by hand"
    return Calibration(np.arange(10)/10, range(10), [.95], [1], [], n_gallery, 5, 'absent', False, 'cosine', .1, about=about)

def test_calibration(gallery, files, tmp_path):
    c = calibrated(model=gallery.fingerprint)
    gallery.calibration = c
    gallery.save(tmp_path/'g')
    again = Gallery.load(tmp_path/'g', Model())
    assert again.calibration.to_json()==c.to_json() and again.threshold(.1)==.9 and again.threshold(.2)==.8
    for far in (.1,.5):
        everyone = again.search(files.fn[0], 6)
        assert again.search(files.fn[0], 6, far=far).key.tolist()==everyone[everyone.similarity>=1-far].key.tolist()
    with pytest.raises(ValueError, match='out of reach of 10 impostor searches'): again.search(files.fn[0], 6, far=.01)
    again.calibration = None
    again.save()
    with pytest.raises(ValueError, match='this gallery has none'): Gallery.load(tmp_path/'g', Model()).search(files.fn[0], 6, far=.1)

def test_calibration_of_something_else(gallery):
    gallery.calibration = before = calibrated()
    for bad,error,why in (({.01:.9},TypeError,'no calibration'),([.1,.2],TypeError,'no calibration'),(calibrated(model='another'),ValueError,"calibrate the gallery's own"),
                          (Calibration(**{**vars(before), 'distance':'euclidean'}),ValueError,'by cosine')):
        with pytest.raises(error, match=why): gallery.calibration = bad
        assert gallery.calibration is before

def test_gallery_that_outgrew_its_calibration(gallery):
    gallery.calibration = calibrated(n_gallery=3)
    assert gallery.threshold(.1)==.9
    gallery.add(pictures(2, 5), keys=['x','y'])
    with pytest.warns(UserWarning, match='searched 3 images, and this gallery has 8'): gallery.threshold(.1)

def test_calibrated_by_the_learner_itself(trained, tmp_path):
    "A search by `far` is the ranking of `evaluate`, cut at the calibration's threshold: as often wrong as the calibration says"
    import pyramidreid.training.calibration
    items = trained.dls.valid.items
    there,asked = items[items.split=='gallery'],items[items.split=='query']
    gallery = Gallery.from_learner(trained, there[['fn','pid','cam']])
    gallery.calibration = c = trained.calibrate(far=.2)
    wrong = n = 0
    for o in asked.itertuples():
        found = gallery.search(o.fn, len(gallery), where=f'pid!={o.pid}', far=.2)
        wrong,n = wrong+bool(len(found)),n+1
    assert n==len(c.impostor) and wrong/n==pytest.approx(c.far_at(c.threshold())[0])

def test_threshold_and_far_at_once(gallery, files):
    gallery.calibration = calibrated()
    with pytest.raises(ValueError, match='both set the threshold'): gallery.search(files.fn[0], 3, threshold=.5, far=.1)

# Adding and removing

def test_columns_are_looked_at_before_anything_is_embedded(files):
    model = Model()
    g = Gallery.from_learner(model, files)
    seen = model.seen
    for bad,why in ((dict(pid='ann'),'pid'),(dict(time='morning'),'dates and times'),(dict(time='01.02.2026'),'dates and times'),(dict(time=1700000000),'numbers'),(dict(time=[17.5]*2),'numbers'),
                    (dict(query='x'),'Call yours otherwise'),(dict(similarity=1.),'Call yours otherwise')):
        with pytest.raises(ValueError, match=why): g.add(pictures(2, 7), keys=['x','y'], **bad)
    with pytest.raises(ValueError, match="no column 'fn'"): g.add(pd.DataFrame(dict(key=['x'])))
    with pytest.raises(ValueError, match="called 'cam'"): g.add(pd.DataFrame([['x','a','b']], columns=['key','cam','cam']))
    assert model.seen==seen and len(g)==6
    for bad in (1893456000,'01.02.2026'):
        with pytest.raises(ValueError, match='since='): g.search(files.fn[0], 3, since=bad)

def test_keys_of_other_kinds(gallery):
    gallery.add(pictures(3, 8), keys=[1,Path('k0'),'z'])
    assert 1 in gallery and Path('k0') in gallery and '1' in gallery
    assert 1 not in gallery.remove(1) and Path('k0') not in gallery.remove(Path('k0')) and 'z' in gallery

def test_an_emptied_gallery_takes_new_kinds(gallery, files):
    gallery.remove(files.fn)
    gallery.add(pictures(1, 8), keys='x', pid='ann', cam=3)
    assert gallery.table.cam.tolist()==[3] and gallery.search(pictures(1, 8)[0], 1, exclude_cam=4).pid.tolist()==['ann']

def test_entries_whose_person_is_unknown_are_shown(gallery):
    gallery.add(pictures(1, 8), keys='x')
    shown = gallery.show(pictures(1, 8)[0], k=7, pid=1)
    assert len(shown.axes)==8

def test_an_index_that_cannot_be_built(gallery, files, tmp_path):
    "The gallery stays as it was, and can be saved"
    big = Gallery(Model(dim=9))
    n = 20_001
    big.add(pd.DataFrame(dict(key=[str(i) for i in range(n)])), embs=Embeddings(np.random.default_rng(0).standard_normal((n,9)), 'a model')).build_index('ivf')
    before = big.index
    with pytest.raises(ValueError): big.build_index('hsnw')
    assert big.index is before and Gallery.load(big.save(tmp_path/'g')).index.kind=='ivf'
    big.build_index('exact').save()
    assert Gallery.load(tmp_path/'g').index is None

def test_a_learner_whose_input_changed(trained, files):
    "By other loaders, by another norm, without a step of training"
    from pyramidreid.data.loaders import ReIDDataLoaders
    g = Gallery.from_learner(trained, files[['fn']])
    dls,norm = trained.dls,trained.model.norm
    try:
        trained.model.norm = 'whole'
        with pytest.raises(ValueError, match='Another model'): g.search(files.fn[0], 1)
        trained.model.norm = norm
        assert g.search(files.fn[0], 1).similarity[0]>.99
        h,w = dls.one_batch()[0].shape[-2:]
        trained.dls = ReIDDataLoaders.from_table(dls.train.items[['fn','pid','cam','split']], p=4, k=2, size=(2*h,w), valid_pct=.5, num_workers=0)
        with pytest.raises(ValueError, match='Another model'): g.add(pictures(1, 8), keys='x')
    finally: trained.dls,trained.model.norm = dls,norm
    assert len(g)==6

# Adding and removing, in general

def test_add_and_remove(gallery, files):
    gallery.remove(files.fn[1])
    assert len(gallery)==5 and str(files.fn[1]) not in gallery and str(files.fn[1]) not in gallery.search(files.fn[1], 5).key.tolist()
    gallery.add(files.iloc[1:2], note='again')
    assert gallery.search(files.fn[1], 1).note[0]=='again'
    assert len(gallery.add(pictures(2, 5), keys=['x','y'], cam='yard', pid=[7,8]))==8
    assert gallery.table.set_index('key').loc[['x','y']].pid.tolist()==[7,8]
    gallery.remove(['x','y','x'])
    assert len(gallery)==6

def test_all_or_none(gallery, files, tmp_path):
    (tmp_path/'text.png').write_text('no picture')
    (tmp_path/'cut.png').write_bytes(files.fn[0].read_bytes()[:60])
    new = tmp_path/'new.png'
    Image.fromarray(pictures(1, 9)[0]).save(new)
    for bad,error,why in ((tmp_path/'text.png',OSError,'text.png is no image'),(tmp_path/'cut.png',OSError,'cut.png is no image or is cut off'),
                          (tmp_path/'gone.png',FileNotFoundError,'no image file .*gone.png'),(tmp_path,OSError,'no image file'),(files.fn[0],ValueError,'0.png.* the first: remove it before')):
        with pytest.raises(error, match=why): gallery.add([new,bad])
        with pytest.raises(ValueError if bad==files.fn[0] else error): gallery.add([new,bad] if bad!=files.fn[0] else [new,new])
        assert len(gallery)==6 and str(new) not in gallery
    with pytest.raises(ValueError, match="1 of 2 keys are not in the gallery, 'nobody' the first"): gallery.remove([files.fn[0],'nobody'])
    assert len(gallery)==6

@pytest.mark.parametrize('bad,error,why', [('text',FileNotFoundError,'no image file text'),(np.zeros((4,3), np.float32),ValueError,'wrap embeddings'),(3,ValueError,'of type int: give the path'),(None,ValueError,'NoneType'),
    ([Embeddings(np.ones(9), 'a model')],TypeError,'one `Embeddings` of all')])
def test_what_is_no_query(gallery, bad, error, why):
    with pytest.raises(error, match=why): gallery.search(bad, k=1)

def test_add_errors(gallery, files):
    with pytest.raises(ValueError, match='keys='): gallery.add(pictures(1))
    with pytest.raises(ValueError, match='dates and times'): gallery.add(pictures(1), keys='x', time='soon')
    with pytest.raises(ValueError, match="'pid' held number"): gallery.add(pictures(1), keys='x', pid='ann')
    with pytest.raises(ValueError, match='have no key'): gallery.add(pictures(2), keys=['x',None])
    with pytest.raises(ValueError, match='1 embeddings for 2'): gallery.add(pd.DataFrame(dict(key=['x','y'])), embs=gallery.embed(files.fn[:1].tolist()))
    assert len(gallery)==6 and 'x' not in gallery
    assert len(gallery.add([]))==6

def test_embeddings_that_are_there_already(gallery, files):
    embs = gallery.embed(files.fn.tolist())
    g = Gallery(Model()).add(files.assign(key=[f'k{i}' for i in range(6)]), embs=embs)
    seen = g.embedder.seen
    assert g.search(embs[3], 1).key.tolist()==['k3'] and g.embedder.seen==seen==0

def test_bad_embeddings(gallery):
    for x in (np.zeros(9),np.full(9, np.nan),np.r_[np.inf,np.ones(8)]):
        with pytest.raises(ValueError, match='zero or not finite'): gallery.search(Embeddings(x, 'a model'), k=1)
    with pytest.raises(ValueError, match="of 5 numbers, and this gallery's have 9"): gallery.search(Embeddings(np.ones(5), 'a model'), k=1)

def test_an_empty_gallery(files, tmp_path):
    g = Gallery(Model())
    assert len(g)==0 and 'of 0 entries' in repr(g) and len(g.table)==0
    for f in (g.search,g.show):
        with pytest.raises(ValueError, match='gallery is empty'): f(files.fn[0])
    with pytest.raises(ValueError, match='gallery is empty'): g.build_index()
    g.save(tmp_path/'g')
    again = Gallery.load(tmp_path/'g', Model())
    assert len(again)==0 and len(again.add(files))==6
    again.remove(list(again.keys))
    with pytest.raises(ValueError, match='gallery is empty'): again.search(files.fn[0])

# Whose embedding

def test_another_model(gallery, files, tmp_path):
    gallery.save(tmp_path/'g')
    for f in (lambda: gallery.search(Embeddings(np.ones(9), 'b model'), k=1), lambda: gallery.add(pd.DataFrame(dict(key=['x'])), embs=Embeddings(np.ones(9), 'b model')), lambda: Gallery.load(tmp_path/'g', Model('b model'))):
        with pytest.raises(ValueError, match="this gallery is of model a model, and this is b model"): f()
    gallery.embedder.fingerprint = 'trained on'
    for f in (lambda: gallery.search(files.fn[0], k=1), lambda: gallery.add(pictures(1), keys='x')):
        with pytest.raises(ValueError, match="Another model's embedding"): f()
    assert len(gallery)==6

def test_without_a_model(gallery, files, tmp_path):
    gallery.save(tmp_path/'g')
    g = Gallery.load(tmp_path/'g')
    assert g.search(gallery.embed([files.fn[4]]), 1).key.tolist()==[str(files.fn[4])]
    with pytest.raises(ValueError, match='loaded without its model'): g.search(files.fn[4], 1)
    with pytest.raises(ValueError, match='needs a model'): Gallery()
    with pytest.raises(TypeError, match='cannot embed'): Gallery('resnet50')

def test_a_learner(trained, people, tmp_path):
    "Embeddings are the learner's own, and its fingerprint follows its weights"
    import torch

    from pyramidreid.models.fingerprints import learner_fingerprint
    files = sorted((people/'bounding_box_test').glob('*.jpg'))[:5]
    g = Gallery.from_learner(trained, files)
    dl = trained.dls.test_dl(files)
    assert np.allclose(g.store.segments[0].embs, normalize_rows(trained.embed(dl).numpy()), atol=1e-6) and g.fingerprint==learner_fingerprint(trained)
    assert g.search(files[3], k=1).key.tolist()==[str(files[3])]
    g.save(tmp_path/'g')
    assert len(Gallery.load(tmp_path/'g', trained))==5
    w = next(trained.model.parameters())
    with torch.no_grad(): w.add_(1e-3)
    try:
        with pytest.raises(ValueError, match="Another model's"): g.search(files[0], k=1)
    finally:
        with torch.no_grad(): w.sub_(1e-3)

def test_a_saved_model_asks_the_learners_gallery(trained, people, tmp_path):
    "What the learner filled, its copy on disk may ask: same fingerprint, same ranking"
    from pyramidreid.export.files import load_embedder
    files = sorted((people/'bounding_box_test').glob('*.jpg'))[:8]
    Gallery.from_learner(trained, files).save(tmp_path/'g')
    g = Gallery.load(tmp_path/'g', load_embedder(trained.save_model(tmp_path/'m')))
    assert g.search(files[2], k=1).key.tolist()==[str(files[2])] and g.search(files[2], k=1).similarity[0]>.9999
    assert len(g.add(files[0], keys='twin'))==9

# Keeping

def test_saved_and_loaded(gallery, files, tmp_path):
    gallery.remove(files.fn[5])
    gallery.save(tmp_path/'g')
    again = Gallery.load(tmp_path/'g', Model())
    pd.testing.assert_frame_equal(again.search(pictures(2, 8), k=5), gallery.search(pictures(2, 8), k=5))
    again.add(files.iloc[5:])
    again.save()
    assert len(Gallery.load(tmp_path/'g'))==6

@pytest.mark.parametrize('harm', [lambda b: b[:-5], lambda b: b'', lambda b: b[:-1]+bytes([b[-1]^1])])
def test_damage(gallery, tmp_path, harm):
    gallery.save(tmp_path/'g')
    for f in sorted((tmp_path/'g').iterdir()):
        whole = f.read_bytes()
        f.write_bytes(harm(whole))
        with pytest.raises(ValueError, match=f'{f.name} is damaged'): Gallery.load(tmp_path/'g')
        f.write_bytes(whole)
    assert len(Gallery.load(tmp_path/'g'))==6

def test_show(gallery, files):
    files.fn[1].unlink()
    fig = gallery.show(files.fn[0], k=9, pid=1, exclude_cam='yard')
    text = [ax.get_title() for ax in fig.axes]
    assert len(text)==7 and text[0]=='query\npid 1' and 'pid 1 · cam door' in text[1]
    assert [t.get_text() for ax in fig.axes for t in ax.texts]==['no picture']
    with pytest.raises(FileNotFoundError, match='no image file .*1.png'): gallery.show(files.fn[1])
    shown = gallery.show(gallery.embed([files.fn[0]]), k=2)
    assert [t.get_text() for t in shown.axes[0].texts]==['no picture']

@pytest.mark.parametrize('k,there', [(1,'pid 1'),(30,'pid 1')])
def test_show_of_one_and_of_many(gallery, files, k, there):
    "Rows of twelve at most, no place without a picture"
    gallery.add(pictures(24, 9), keys=[f'n{i}' for i in range(24)])
    fig = gallery.show(files.fn[0], k=k)
    assert len(fig.axes)==k+1 and there in fig.axes[1].get_title() and {len(o.images) for o in fig.axes[:7]}<={0,1}
    assert fig.get_size_inches()[0]<13 and fig.axes[0].get_gridspec().ncols==min(12, k+1)

def test_show_of_nobody(gallery, files):
    fig = gallery.show(files.fn[0], threshold=1.1)
    assert len(fig.axes)==2 and [t.get_text() for t in fig.axes[1].texts]==['nobody found']

def test_show_with_long_names(gallery, files):
    "What is wider than a picture goes into a line of its own, and is cut"
    g = Gallery(Model()).add(files.fn.tolist(), pid=['Ann-Marie van der Meer']*6, cam='the yard behind the house')
    assert g.show(files.fn[0], k=2).axes[1].get_title().split('\n')==['1.00','pid Ann-Marie v…','cam the yard be…']

def test_show_of_several(gallery, files):
    for o in (files.fn.tolist(),files.fn,gallery.embed(files.fn)):
        with pytest.raises(ValueError, match='6 queries: a strip shows one'): gallery.show(o)

# Against a gallery as one would write it without a library

class Plain:
    "A list of dicts; a missing value is None"
    def __init__(self): self.rows = []
    def add(self, rows): self.rows += rows
    def remove(self, keys): self.rows = [r for r in self.rows if r['key'] not in keys]
    def search(self, q, k, exclude_cam=None, since=None, where=None, threshold=None):
        q,res = q/np.linalg.norm(q),[]
        for r in self.rows:
            if exclude_cam is not None and r.get('cam') is not None and r.get('cam') in (exclude_cam if isinstance(exclude_cam, list) else [exclude_cam]): continue
            if since is not None and (r.get('time') is None or r['time']<since): continue
            if where is not None and not where(r): continue
            sim = float(r['emb']@q/np.linalg.norm(r['emb']))
            if threshold is None or sim>=threshold: res.append((-sim,len(res),r['key']))
        res.sort(key=lambda o: (round(o[0], 5),o[1]))
        return [(k,-s) for s,_,k in res[:k]]

def known(r, c): return r.get(c) is not None
WHERES = [(None,None), ('pid==1', lambda r: r.get('pid')==1), ('pid!=1', lambda r: known(r, 'pid') and r['pid']!=1), ('not (pid>1)', lambda r: known(r, 'pid') and r['pid']<=1),
          ('score<0.5', lambda r: known(r, 'score') and r['score']<.5), ('score!=0.25', lambda r: known(r, 'score') and r['score']!=.25), ('cam!="hall"', lambda r: r.get('cam')!='hall'),
          ('ok==True', lambda r: r.get('ok') is True), ('ok!=True', lambda r: r.get('ok') is False), ('time<"2026-11-23 08:30"', lambda r: known(r, 'time') and r['time']<pd.Timestamp('2026-11-23 08:30')),
          ('pid in [0,2] or score>0.6', lambda r: r.get('pid') in (0,2) or known(r, 'score') and r['score']>.6), ('pid==1 and not (cam=="door")', lambda r: r.get('pid')==1 and r.get('cam')!='door')]
VALUES = dict(pid=[0,1,2,None], cam=['door','hall','Hof','日本',None], score=[0.,.25,.5,1.,None], ok=[True,False,None], time=[pd.Timestamp('2026-11-23 08:00')+pd.Timedelta(minutes=15*i) for i in range(5)]+[None])
KEYS = ['a','b','ü','日本','O\'Brien "x"','k%20','a\nb',' ']+[f'k{i}' for i in range(40)]

def random_rows(rng, keys):
    "Rows with some of the columns, which may be empty throughout"
    columns = rng.sample(sorted(VALUES), rng.randint(0, 5))
    npr = np.random.default_rng(rng.randrange(1<<30))
    return [dict(key=k, emb=npr.standard_normal(9).astype(np.float32), **{c:rng.choice(VALUES[c]) for c in columns}) for k in keys]

def put(gallery, rows):
    frame = pd.DataFrame([{c:v for c,v in r.items() if c!='emb'} for r in rows])
    gallery.add(frame, embs=Embeddings(np.stack([r['emb'] for r in rows]), 'a model'))

def random_filters(rng):
    text,fn = rng.choice(WHERES)
    return (dict(exclude_cam=rng.choice([None,'door',['hall','日本'],[],[None,'door']]), since=rng.choice([None,VALUES['time'][2]]), where=text, threshold=rng.choice([None,0.,.3])),
            dict(where=fn))

def compare(gallery, plain, rng):
    q = np.random.default_rng(rng.randrange(1<<30)).standard_normal(9).astype(np.float32)
    filters,instead = random_filters(rng)
    columns = {c for r in plain.rows for c in r if r[c] is not None}
    there = set(gallery.table)
    if filters['exclude_cam'] is not None and 'cam' not in there or filters['since'] is not None and 'time' not in columns: return
    if filters['where'] and not {c for c in VALUES if c in filters['where']}<=columns: return
    k = rng.randint(1, len(plain.rows))
    found,want = gallery.search(Embeddings(q, 'a model'), k, **filters),plain.search(q, k, **{**filters, **instead})
    assert found.key.tolist()==[o for o,_ in want], filters
    assert np.allclose(found.similarity, [o for _,o in want], atol=2e-3 if gallery.store.dtype=='float16' else 1e-5)
    rows = {r['key']:r for r in plain.rows}
    for c in set(VALUES)&set(found): assert [None if pd.isna(o) else o for o in found[c]]==[rows[k].get(c) for k in found.key], c

@given(st.integers(0, 1<<30))
@settings(max_examples=60, deadline=None)
def test_a_random_life_against_the_plain_one(tmp_path_factory, seed):
    "Add, remove, add again under the same key, save and load, columns that come later, gaps everywhere; after each step the same answers"
    rng = random.Random(seed)
    gallery,plain,path = Gallery(Model()),Plain(),tmp_path_factory.mktemp('life')/'g'
    for _ in range(rng.randint(2, 9)):
        free,there = [k for k in KEYS if k not in gallery],[r['key'] for r in plain.rows]
        what = rng.choice(['add','add','remove','save','load'])
        if what=='add' and free:
            rows = random_rows(rng, rng.sample(free, min(len(free), rng.randint(1, 8))))
            put(gallery, rows)
            plain.add(rows)
        elif what=='remove' and there:
            gone = rng.sample(there, rng.randint(1, len(there)))
            gallery.remove(gone)
            plain.remove(gone)
        elif what=='save': gallery.save(path)
        elif what=='load' and (path/'gallery.json').exists():
            gallery.save()
            gallery = Gallery.load(path, Model())
        assert len(gallery)==len(plain.rows) and gallery.table.key.tolist()==[r['key'] for r in plain.rows] and all(r['key'] in gallery for r in plain.rows)
        for _ in range(3*bool(plain.rows)): compare(gallery, plain, rng)

def test_half_precision_against_full():
    x = Embeddings(np.random.default_rng(0).standard_normal((500,300)), 'a model')
    frame = pd.DataFrame(dict(key=[str(i) for i in range(500)]))
    full,half = (Gallery(Model(), dtype=o).add(frame, embs=x).search(x[:50], 500) for o in ('float32','float16'))
    a,b = (o.sort_values(['query','key']).similarity.to_numpy() for o in (full,half))
    assert 0<abs(a-b).max()<1e-3

# What does not fit

def test_names_of_other_kinds(gallery):
    gallery.add(pictures(1, 8)[0], keys=5).add(pictures(1, 9)[0], keys=Path('p')).add(pictures(2, 10), keys=np.array([7,8]))
    assert {'5','p','7','8'}<=set(gallery.table.key)
    for bad,error,why in ((dict(keys=['x']),ValueError,'keys has 1 values for 2 entries'),(dict(keys=['x','y'], pid=[1,2,3]),ValueError,'pid has 3 values for 2 entries'),
                          (dict(keys=['x','a\udcff']),ValueError,'not Unicode'),(dict(keys=['x','y'], pid=[2**70,1]),ValueError,'more than 64 bits')):
        with pytest.raises(error, match=why): gallery.add(pictures(2, 11), **bad)
    assert len(gallery)==10 and 'x' not in gallery

def test_columns_that_become_one():
    with pytest.raises(ValueError, match="Two columns are called '1'"): Gallery(Model()).add(pd.DataFrame({'key':['x'], 1:[1], '1':[2]}), embs=Embeddings(np.ones(9), 'a model'))

def test_time_zones(files):
    "The hour that comes twice in autumn; entries and question each in a zone of its own"
    g = Gallery(Model()).add(files[:2][['fn']], time=['2026-10-25 02:30+02:00','2026-10-25 02:30+01:00'])
    g.add(files[2:3][['fn']], time=pd.Timestamp('2026-10-25 12:00', tz='Asia/Tokyo'))
    assert [str(o) for o in g.table.time]==['2026-10-25 00:30:00+00:00','2026-10-25 01:30:00+00:00','2026-10-25 03:00:00+00:00']
    assert g.search(files.fn[0], 3, since='2026-10-25 02:45+02:00').key.tolist()!=[] and len(g.search(files.fn[0], 3, since='2026-10-24 20:45-04:00'))==2
    for bad in (['2026-10-25 02:30+02:00','2026-10-25 02:30'],[pd.Timestamp('2026-10-25', tz='UTC'),pd.Timestamp('2026-10-25')]):
        with pytest.raises(ValueError, match="'time' is not all dates and times: some have a time zone and some have none"): g.add(files[3:5][['fn']], time=bad)
    with pytest.raises(ValueError, match="'seen' is not all .* some have a time zone"): g.add(files[3:5][['fn']], seen=pd.Series([pd.Timestamp('2026-10-25', tz='UTC'),pd.Timestamp('2026-10-25')], dtype=object))
    assert len(g)==3

def test_cameras_that_are_unknown(gallery, files):
    "They exclude nothing; and several may come in anything that holds several"
    for o in (None,float('nan'),pd.NA):
        assert len(gallery.search(files.fn[0], 6, exclude_cam=[o]))==6 and set(gallery.search(files.fn[0], 6, exclude_cam=[o,'door']).cam)=={'hall'}
    for o in (pd.Index(['door']),pd.Series(['door']),{'door':1},np.array(['door']),(o for o in ['door'])): assert set(gallery.search(files.fn[0], 6, exclude_cam=o).cam)=={'hall'}

@pytest.mark.parametrize('args,error,why', [(dict(k=2.5),TypeError,'whole number'),(dict(k='3'),TypeError,'whole number'),(dict(k=None),TypeError,'whole number'),(dict(threshold=float('nan')),ValueError,'a similarity is needed'),
    (dict(threshold='high'),ValueError,'a similarity is needed'),(dict(since=pd.NaT),ValueError,'one date and time is needed'),(dict(since=['2026-11-23']),ValueError,'one date and time'),(dict(where='pid=1'),ValueError,'True or False .* as cam==1'),
    (dict(where='"2026-11-23 08:00"==time'),ValueError,'say >= and <'),(dict(where='time in ["2026-11-23 08:00"]'),ValueError,'say >= and <'),(dict(where='pid==1 and time not in ["2026-11-23"]'),ValueError,'say >= and <')])
def test_more_search_errors(gallery, files, args, error, why):
    with pytest.raises(error, match=why): gallery.search(files.fn[0], **{'k':3, **args})

def test_a_function_cannot_change_the_gallery(gallery, files):
    def greedy(t):
        t['cam'] = 'nowhere'
        return t.pop('pid')==1
    before = gallery.table
    assert len(gallery.search(files.fn[0], 6, where=greedy))==3
    pd.testing.assert_frame_equal(gallery.table, before)

def test_queries_in_a_column(gallery, files):
    pd.testing.assert_frame_equal(gallery.search(files.fn, 2), gallery.search(files.fn.tolist(), 2))
    assert len(gallery.embed(files.fn[2:]))==4

def test_embeddings_of_nobody(gallery):
    for f in (lambda: gallery.add(pd.DataFrame(dict(key=['x'])), embs=np.ones((1,9))),):
        with pytest.raises(TypeError, match='do not say which model'): f()
    with pytest.raises(ValueError, match=r'shape \(2, 3, 9\)'): Embeddings(np.ones((2,3,9)), 'a model')

def test_no_warnings(files, tmp_path, recwarn):
    "Not of pandas either, about what it will do otherwise one day"
    import warnings
    warnings.simplefilter('always')
    g = Gallery.from_learner(Model(), files.assign(score=[.5,None]*3, ok=[True,None,False]*2))
    g.add(pictures(2, 8), keys=['x','y'], score=1, note=['a',None])
    g.save(tmp_path/'g')
    Gallery.load(tmp_path/'g', Model()).search(files.fn[0], 8, exclude_cam='door', since='2026-11-23', where='ok!=True or score>0.1')
    assert not [o for o in recwarn if 'pandas' in str(o.category) or issubclass(o.category, (FutureWarning,DeprecationWarning))]

def test_weights_changed_behind_pytorchs_back(make_learner):
    "By `.data`, through NumPy, by a fused optimizer, in batch norm's statistics, or a stride"
    import torch
    learn = make_learner()
    g,item,weight = Gallery(learn),pictures(1),next(learn.model.parameters())
    def fused():
        for o in learn.model.parameters(): o.grad = torch.ones_like(o)
        torch.optim.AdamW(learn.model.parameters(), fused=True).step()
    def statistics():
        for m in learn.model.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.data.add_(1)
    def one(): weight.data.view(-1)[:1].mul_(1+1e-6)
    for change in (lambda: weight.data.mul_(1.01), lambda: weight.detach().numpy().__imul__(1.01), one, fused, statistics):
        kept = {k:v.clone() for k,v in learn.model.state_dict().items()}
        before = g.embedder.fingerprint
        change()
        assert g.embedder.fingerprint!=before
        with pytest.raises(ValueError, match="Another model's"): g.embed(item)
        learn.model.load_state_dict(kept)
        assert g.embedder.fingerprint==before
    conv = next(m for m in learn.model.modules() if isinstance(m, torch.nn.Conv2d) and m.stride==(2,2))
    conv.stride = (1,1)
    with pytest.raises(ValueError, match="Another model's"): g.embed(item)

# Large galleries

@pytest.fixture(scope='module')
def crowd():
    "12,000 rows around 200 centres, in three blocks of which one is half precision; every tenth id is missing"
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200,24))
    x = normalize_rows(centres[rng.integers(0, 200, 12000)]+.5*rng.standard_normal((12000,24)))
    ids = np.array([i for i in range(14000) if i%10])[:12000]
    return Rows([(ids[:5000],x[:5000]),(ids[5000:5001],x[5000:5001]),(ids[5001:],x[5001:].astype(np.float16))]),normalize_rows(centres[:30])

def brute(q, rows, k, ok=None):
    sims = q@np.concatenate([np.asarray(o, np.float32) for _,o in rows.blocks]).T
    if ok is not None: sims[:,~ok] = -np.inf
    order = np.argsort(-sims, 1, kind='stable')[:,:k]
    sims = np.take_along_axis(sims, order, 1)
    return sims,np.where(np.isfinite(sims), order, -1)

@pytest.mark.parametrize('share', [None,1.,.5,.01,.0005,0.])
def test_exact_under_filters(crowd, share):
    rows,q = crowd
    ok = None if share is None else np.random.default_rng(1).random(len(rows))<share
    got,want = exact(q, rows, 10, ok),brute(q, rows, 10, ok)
    assert np.allclose(got[0], want[0], atol=1e-6) and (got[1]==want[1]).mean()>.999

def test_equals_keep_their_order():
    x = np.tile(normalize_rows(np.ones((1,4))), (7,1))
    rows = Rows([(np.arange(3),x[:3]),(np.arange(3,7),x[3:])])
    assert exact(x[:1], rows, 5)[1].tolist()==[[0,1,2,3,4]]

@pytest.mark.parametrize('kind', ['ivf','hnsw'])
def test_index(crowd, kind, capsys):
    "Under every filter: only what is allowed, no gaps, similarities as they are; recall as promised"
    rows,q = crowd
    index = build_index(rows, kind, few=100)
    out = capsys.readouterr().out
    assert f"recall@10 {index.note['recall']:.3f}" in out and 'ms a query' in out and index.note['recall']>=.95
    assert abs(index.note['bytes']/len(faiss.serialize_index(index.index))-1)<.15
    rng = np.random.default_rng(2)
    for share in (None,.9,.3,.1,.02,.004,.0002):
        ok = None if share is None else rng.random(len(rows))<share
        sims,found = nearest(q, rows, 10, ok, index, few=100)
        want = brute(q, rows, 10, ok)
        assert ((found>=0).sum(1)==min(10, len(rows) if ok is None else ok.sum())).all() and (ok is None or ok[found[found>=0]].all())
        for o,s,f in zip(q, sims, found): assert np.allclose(s[f>=0], rows.gather(f[f>=0])@o, atol=1e-6)
        assert np.mean([len(set(a)&set(b))/len(set(b)) for a,b in zip(found, want[1])])>=.93, share

def test_index_of_the_gallery(tmp_path, capsys):
    "Built, saved, loaded; entries that came later and entries that went are respected"
    rng = np.random.default_rng(0)
    x = Embeddings(normalize_rows(rng.standard_normal((25000,8))), 'a model')
    frame = pd.DataFrame(dict(key=np.arange(25000).astype(str), cam=np.arange(25000)%5))
    g = Gallery(Model(dim=8)).add(frame, embs=x)
    g.build_index('ivf')
    assert g.index.note['recall']>=.95 and 'IVF of 25,000 rows' in repr(g)
    g.add(pd.DataFrame(dict(key=['late'], cam=[9])), embs=x[7])
    g.remove('7')
    g.save(tmp_path/'g')
    for h in (g,Gallery.load(tmp_path/'g')):
        assert '1 entries came later' in repr(h)
        assert h.search(x[7], 3).key[0]=='late' and '7' not in h.search(x[7], 50).key.tolist()
        assert h.search(x[8], 1).key.tolist()==['8'] and h.search(x[8], 5, exclude_cam=[0,1,2,3,4]).key.tolist()==['late']
        assert set(h.search(x[8], 20, exclude_cam=3).cam)<={0,1,2,4,9}
    h.build_index('exact').save()
    assert not list((tmp_path/'g').glob('*.faiss')) and Gallery.load(tmp_path/'g').index is None
    with pytest.raises(ValueError, match="kind='lsh'"): h.build_index('lsh')

def test_small_galleries_need_no_index(gallery):
    with pytest.raises(ValueError, match='6 entries need no index'): gallery.build_index()

# Packaging

def test_light():
    "Neither torch, fastai nor faiss is imported with the gallery, and not faiss with all"
    code = "import sys,pyramidreid.gallery.gallery,pyramidreid.gallery.milvus; assert not {'torch','fastai','faiss','pyarrow.parquet','pymilvus'} & set(sys.modules), set(sys.modules) & {'torch','fastai','faiss','pyarrow.parquet','pymilvus'}"
    subprocess.run([sys.executable,'-c',code], check=True, capture_output=True)

def test_in_all():
    import pyramidreid.all as lib
    assert lib.Gallery is Gallery and lib.Embeddings is Embeddings

def test_without_the_extra(gallery, files, crowd, monkeypatch, tmp_path):
    "An exact search needs no more than NumPy; an index and a file name the extra that brings what they need"
    for o in ('faiss','pyarrow','pyarrow.parquet'): monkeypatch.setitem(sys.modules, o, None)
    assert len(gallery.search(files.fn[0], k=1))==1
    with pytest.raises(ImportError, match=r'faiss is not installed.*pyramidreid\[gallery\]'): build_index(crowd[0], few=100)
    with pytest.raises(ImportError, match=r'pyarrow.*pyramidreid\[gallery\]'): gallery.save(tmp_path/'g')
