"The gallery on Milvus, tested against Milvus Lite and against the gallery in a folder"
import os
import random
import sys

import numpy as np
import pandas as pd
import pytest

pytest.importorskip('pymilvus', reason='needs the extra milvus')
pytest.importorskip('milvus_lite', reason='needs milvus-lite, which the extra milvus brings')
pytest.importorskip('faiss', reason='compared with the gallery in a folder, which needs the extra gallery')
from test_gallery import KEYS, VALUES, Model, pictures, put, random_filters, random_rows

from pyramidreid.evaluation.openset import Calibration
from pyramidreid.gallery.entries import Embeddings
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.gallery.milvus import MilvusGallery, milvus_filter

N = 300

def seen(**columns):
    "Entries with gaps in every column, and keys that want quoting"
    i = np.arange(N)
    return pd.DataFrame(dict(key=[f'k{j}' if j%50 else f'"Jürgen\'s {j}\\' for j in i], pid=pd.array(i%7, dtype='Int64'), cam=[('door','hall','yard',None)[j%4] for j in i],
        time=[pd.NaT if j%11==0 else pd.Timestamp('2026-11-23 08:00')+pd.Timedelta(minutes=int(j)) for j in i], score=np.where(i%5==0, np.nan, i/N), ok=pd.array([None if j%13==0 else bool(j%2) for j in i], dtype='boolean')) | columns)

embs = Embeddings(np.random.default_rng(0).standard_normal((N,9)), 'a model')

@pytest.fixture(scope='module')
def both(tmp_path_factory):
    far = MilvusGallery(tmp_path_factory.mktemp('milvus')/'people.db', Model()).add(seen(), embs=embs)
    yield far,Gallery(Model()).add(seen(), embs=embs)
    far.close()

def same(a, b):
    assert a.columns.tolist()==b.columns.tolist() and len(a)==len(b) and np.allclose(a.similarity, b.similarity, atol=1e-5)
    for c in set(a)-{'similarity'}: assert [None if pd.isna(o) else o for o in a[c]]==[None if pd.isna(o) else o for o in b[c]], c

@pytest.mark.parametrize('filters', [{},dict(exclude_cam='door'),dict(exclude_cam=['door','yard']),dict(since='2026-11-23 10:00'),dict(where='pid==3'),dict(where='pid in [1,2] and cam=="hall"'),dict(where='not (pid<5) or score>0.9'),
    dict(where='ok==True'),dict(exclude_cam='hall', since=pd.Timestamp('2026-11-23 09:30:30'), where='pid<6'),dict(threshold=.6),dict(where='pid==99')])
def test_as_in_a_folder(both, filters):
    far,near = both
    for q,k in ((embs[17],N),(embs[17],5),(embs[:4],7)): same(far.search(q, k, **filters), near.search(q, k, **filters))

def test_pictures(both):
    far,near = both
    same(far.search(pictures(2, 3), 9), near.search(pictures(2, 3), 9))

def test_table(both):
    far,near = both
    a,b = (o.table.sort_values('key').reset_index(drop=True) for o in both)
    same(a.assign(similarity=0), b.assign(similarity=0))
    assert len(far)==N and '"Jürgen\'s 50\\' in far and 'nobody' not in far and '300 entries, 9-d' in repr(far)

def test_errors(both):
    far,_ = both
    for f,why in ((lambda: far.search(embs[0], N+1), 'k is between 1 and 300'),(lambda: far.search(embs[0], 3, where='pid=='), 'Milvus refuses'),(lambda: far.search(embs[0], 3, where=lambda t: t.pid==1), 'cannot be sent'),
                  (lambda: far.search(embs[0], 3, exclude_cam=1), 'excludes nothing'),(lambda: far.search(embs[0], 3, since='soon'), "since='soon'"),(lambda: far.search(embs[0], 3, since='2026-11-23 08:00Z'), 'time zone'),
                  (lambda: far.add(seen()[:2], embs=embs[:2]), 'there already'),(lambda: far.add(pictures(1), keys='x', pid='ann'), "'pid' held number"),(lambda: far.remove(['k1','nobody']), "'nobody' the first"),
                  (lambda: far.search(Embeddings(np.ones(9), 'b model'), 3), "Another model's"),(lambda: far.search(Embeddings(np.ones(4), 'a model'), 3), "of 4 numbers"),(far.build_index, 'builds its index itself')):
        with pytest.raises(ValueError, match=why): f()
    assert len(far)==N and 'k1' in far

def test_a_life(tmp_path):
    "Made, closed, opened, changed, calibrated; another model is refused; two collections in one file"
    uri = tmp_path/'people.db'
    g = MilvusGallery(uri, Model())
    assert len(g)==0 and len(g.table)==0 and 'x' not in g
    with pytest.raises(ValueError, match='gallery is empty'): g.search(pictures(1)[0])
    g.add(pictures(3), keys=list('abc'), cam='door').add(pictures(2, 1), keys=['d','e'], pid=[1,2])
    g.remove('b')
    g.calibration = Calibration(np.linspace(-1, .9999, 20_000), range(20_000), [], [], [], 5, 5, 'absent', False, 'cosine', about={'model':g.fingerprint})
    g.save()
    g.calibration = Calibration([.9999]*200, range(200), [], [], [], 5, 5, 'absent', False, 'cosine')
    g.save()
    g.close()
    with pytest.raises(ValueError, match="Another model's embedding"): MilvusGallery.load(uri, Model('b model'))
    g = MilvusGallery.load(uri, Model())
    assert len(g)==4 and sorted(g.table.key)==['a','c','d','e'] and g.search(pictures(1)[0], 4, far=.01).key.tolist()==['a']
    assert g.add(pictures(3)[1], keys='b').search(pictures(3)[1], 1).key.tolist()==['b']
    with pytest.raises(ValueError, match="holds no gallery 'others'"): MilvusGallery(uri, name='others')
    assert g.show(pictures(1)[0], k=2).axes[0].get_title()=='query'
    g.close()

def test_keys_that_look_like_code(tmp_path):
    "Each is removed itself, and nobody else"
    keys = ["x','k1",'k1','k2',"O'Brien.jpg",'C:\\x\\n.jpg','a\nb','100 %25','"quoted"']
    g = MilvusGallery(tmp_path/'p.db', Model())
    g.add(pictures(len(keys)), keys=keys)
    for i,k in enumerate(keys):
        assert k in g and k not in g.remove(k)
        assert sorted(g.table.key)==sorted(keys[i+1:])
    g.close()

def test_what_milvus_cannot_keep(tmp_path):
    "Is refused before anything is sent"
    g = MilvusGallery(tmp_path/'p.db', Model())
    for args,why in ((dict(keys='a', embedding='x'),"Column 'embedding'"),(dict(keys='ü'*2049),'4,096 bytes')):
        with pytest.raises(ValueError, match=why): g.add(pictures(1), **args)
    assert len(g)==0
    g.close()

def test_expressions():
    kinds = dict(cam='number', pid='number', time='time with zone')
    assert milvus_filter(kinds)==''
    assert milvus_filter(kinds, np.int64(3), '1970-01-01 01:00:00.000005+01:00', 'pid>1')=='(not exists cam or cam not in [3]) and time >= 5 and (pid>1)'
    for args in (dict(exclude_cam=1),dict(since='2026-11-23')):
        with pytest.raises(ValueError, match='needs a column'): milvus_filter({}, **args)

def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pymilvus', None)
    with pytest.raises(ImportError, match=r'pyramidreid\[milvus\]'): MilvusGallery(tmp_path/'x.db', Model())

def test_moving_house(both, tmp_path):
    "The lines of the page on when to change over: there, and back into a folder"
    _,near = both
    near.remove('k1')
    near.calibration = Calibration(np.linspace(-1, .9999, 200), range(200), [], [], [], 300, 5, 'absent', False, 'cosine', about={'model':near.fingerprint})
    far = MilvusGallery(tmp_path/'new.db', Model())
    for table,vectors in near.entries(70): far.add(table, embs=vectors)
    far.calibration = near.calibration
    far.save()
    same(far.search(embs[5], 20), near.search(embs[5], 20))
    back = Gallery(Model())
    for table,vectors in far.entries(70): back.add(table, embs=vectors)
    back.calibration = far.calibration
    again = Gallery.load(back.save(tmp_path/'g'), Model())
    same(again.search(embs[5], 299), near.search(embs[5], 299))
    same(*(o.table.sort_values('key').assign(similarity=0) for o in (again,near)))
    assert again.threshold(.1)==near.threshold(.1)
    near.add(seen()[1:2], embs=embs[1])
    near.calibration = None
    far.close()

def test_times_in_where(both):
    "Written as in a folder; Milvus alone would find nobody"
    far,near = both
    for where in ('time>="2026-11-23 10:00"',"time < '2026-11-23T09:00' and pid!=2",'time>="2026-11-23 09:00" and time<"2026-11-23 09:30" or cam=="hall"'):
        found = far.search(embs[3], N, where=where)
        same(found, near.search(embs[3], N, where=where))
        assert 0<len(found)<N
    assert far.search(embs[3], N, where='"2026-11-23 10:00"<=time').key.tolist()==near.search(embs[3], N, since='2026-11-23 10:00').key.tolist()
    assert far.search(embs[3], N, where='time=="2026-11-23 08:07"').key.tolist()==['k7'] and far.search(embs[3], N, where='cam=="time>=\\"2026\\""').empty
    for where,why in (('time>="soon"','is no date and time'),('time>="2026-11-23 08:00Z"','time zone'),('door==1',"no entry has a column 'door'; there are key"),('pid==1 and nam=="x"',"no entry has a column 'nam'")):
        with pytest.raises(ValueError, match=why): far.search(embs[3], N, where=where)
    assert milvus_filter(dict(time='time with zone'), where='time>"1970-01-01 01:00+01:00"')=='(time>0)'
    assert milvus_filter(dict(pid='number'), where='PID is not null or exists pid and $meta["x"]>1e3'.replace('PID', 'pid'))=='(pid is not null or exists pid and $meta["x"]>1e3)'

def test_cameras_that_are_unknown(both):
    far,near = both
    for o in (None,float('nan'),pd.NA): assert len(far.search(embs[3], N, exclude_cam=[o]))==N
    same(far.search(embs[3], N, exclude_cam=pd.Index(['door',None])), near.search(embs[3], N, exclude_cam='door'))

LIVES = int(os.environ.get('LIVES', 4))

@pytest.mark.parametrize('seed', range(LIVES))
def test_a_random_life_in_both_places(tmp_path, seed):
    "Entries with gaps come and go, and every answer is that of the folder; a text that is empty passes no `!=` here"
    rng,far,near = random.Random(seed),MilvusGallery(tmp_path/'p.db', Model()),Gallery(Model())
    first = random_rows(rng, ['first'])[0] | {c:v[0] for c,v in VALUES.items()} # every column is known from the start
    for step in range(6):
        free = [k for k in KEYS if k not in near]
        rows = ([first] if not step else []) + random_rows(rng, rng.sample(free, min(len(free), rng.randint(1, 8))))
        for g in (far,near): put(g, rows)
        if step%2:
            gone = rng.sample([k for k in near.keys if k!='first'], min(len(near)-1, 3))
            for g in (far,near): g.remove(gone)
        assert len(far)==len(near) and sorted(far.table.key)==sorted(near.table.key)
        for _ in range(6):
            filters,_ = random_filters(rng)
            if 'cam' in (filters['where'] or ''): filters['where'] = 'cam=="hall"'
            q,k = Embeddings(np.random.default_rng(rng.randrange(1<<30)).standard_normal(9), 'a model'),rng.randint(1, len(near))
            a,b = (g.search(q, k, **filters) for g in (far,near))
            assert a.key.tolist()==b.key.tolist(), filters
            shared = [c for c in b if c in a]
            same(a[shared], b[shared])
    far.close()
