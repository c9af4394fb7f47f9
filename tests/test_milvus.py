"The gallery on Milvus: tested on Milvus Lite, against the gallery in a folder"
import os
import random
import sys

import numpy as np
import pandas as pd
import pytest

pytest.importorskip('pymilvus', reason='needs the extra milvus')
pytest.importorskip('milvus_lite', reason='needs milvus-lite, which the extra milvus brings')
pytest.importorskip('pyarrow', reason='compared with the gallery in a folder, which needs the extra gallery')
from gallery_toys import (
    KEYS,
    VALUES,
    BandModel,
    add_rows,
    calibration_of,
    embeddings,
    pictures,
    random_filters,
    random_rows,
    without_gaps,
)

from pyramidreid.gallery.entries import Embeddings
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.gallery.milvus import MilvusGallery, milvus_filter

N = 300
embs = embeddings(N)

def entries():
    "Entries with gaps in every column, and some keys that need quoting"
    def key(i): return f'k{i}' if i%50 else f'"Jürgen\'s {i}\\'
    def time(i): return pd.NaT if i%11==0 else pd.Timestamp('2026-11-23 08:00')+pd.Timedelta(minutes=i)
    i = np.arange(N)
    ok = pd.array([None if j%13==0 else bool(j%2) for j in range(N)], dtype='boolean')
    return pd.DataFrame(dict(
        key=[key(j) for j in range(N)], pid=pd.array(i%7, dtype='Int64'), cam=['door','hall','yard',None]*(N//4),
        time=[time(j) for j in range(N)], score=np.where(i%5==0, np.nan, i/N), ok=ok))

@pytest.fixture(scope='module')
def galleries(tmp_path_factory):
    "The same entries on Milvus and in a folder; a test that changes them changes them back"
    remote = MilvusGallery(tmp_path_factory.mktemp('milvus')/'people.db', BandModel()).add(entries(), embs=embs)
    yield remote,Gallery(BandModel()).add(entries(), embs=embs)
    remote.close()

@pytest.fixture
def empty(tmp_path):
    g = MilvusGallery(tmp_path/'p.db', BandModel())
    yield g
    g.close()

def check_same_values(a, b):
    assert a.columns.tolist()==b.columns.tolist()
    assert len(a)==len(b)
    for c in set(a)-{'similarity'}: assert without_gaps(a[c])==without_gaps(b[c]), c

def check_same(a, b):
    "Are two search results equal?"
    check_same_values(a, b)
    assert np.allclose(a.similarity, b.similarity, atol=1e-5)

def sorted_table(gallery): return gallery.table.sort_values('key')

# Searching

@pytest.mark.parametrize('filters', [
    {},
    dict(exclude_cam='door'),
    dict(exclude_cam=['door','yard']),
    dict(since='2026-11-23 10:00'),
    dict(where='pid==3'),
    dict(where='pid in [1,2] and cam=="hall"'),
    dict(where='not (pid<5) or score>0.9'),
    dict(where='ok==True'),
    dict(where='cam.isna() or pid.between(2,4)'),
    dict(where='key in ["k1","k2"] & pid.notna()'),
    dict(where='1<pid<=3 | pid==[6,0]'),
    dict(exclude_cam='hall', since=pd.Timestamp('2026-11-23 09:30:30'), where='pid<6'),
    dict(threshold=.6),
    dict(where='pid==99')])
def test_as_in_a_folder(galleries, filters):
    remote,local = galleries
    for query,k in ((embs[17],N),(embs[17],5),(embs[:4],7)):
        check_same(remote.search(query, k, **filters), local.search(query, k, **filters))

def test_pictures(galleries):
    remote,local = galleries
    check_same(remote.search(pictures(2, 3), 9), local.search(pictures(2, 3), 9))

def test_table(galleries):
    remote,local = galleries
    check_same_values(sorted_table(remote), sorted_table(local))
    assert len(remote)==N
    assert '"Jürgen\'s 50\\' in remote
    assert 'nobody' not in remote
    assert '300 entries, 9-d' in repr(remote)

@pytest.mark.parametrize('args,message', [
    (dict(k=0), 'k must be at least 1'),
    (dict(where='pid=='), 'not a valid expression'),
    (dict(where=lambda t: t.pid==1), 'cannot be sent'),
    (dict(where='time>="soon"'), 'is not a date and time'),
    (dict(where='time>="2026-11-23 08:00Z"'), 'time zone'),
    (dict(where='door==1'), "'door' is not a column; the columns are key"),
    (dict(where='pid==1 and nam=="x"'), "'nam' is not a column"),
    (dict(exclude_cam=1), 'excludes nothing'),
    (dict(since='soon'), "since='soon'"),
    (dict(since='2026-11-23 08:00Z'), 'time zone')])
def test_search_errors(galleries, args, message):
    remote,_ = galleries
    with pytest.raises(ValueError, match=message): remote.search(embs[0], **{'k':3, **args})

def test_errors_change_nothing(galleries):
    remote,_ = galleries
    with pytest.raises(ValueError, match='exist already'): remote.add(entries()[:2], embs=embs[:2])
    with pytest.raises(ValueError, match="'pid' held numbers"): remote.add(pictures(1), keys='x', pid='ann')
    with pytest.raises(ValueError, match="first is 'nobody'"): remote.remove(['k1','nobody'])
    with pytest.raises(ValueError, match="Another model's"): remote.search(Embeddings(np.ones(9), 'b model'), 3)
    with pytest.raises(ValueError, match="4 dimensions"): remote.search(embeddings(1, dim=4), 3)
    with pytest.raises(ValueError, match='builds its index itself'): remote.build_index()
    assert len(remote)==N
    assert 'k1' in remote

@pytest.mark.parametrize('where', [
    'time>="2026-11-23 10:00"',
    "time < '2026-11-23T09:00' and pid!=2",
    'time>="2026-11-23 09:00" and time<"2026-11-23 09:30" or cam=="hall"'])
def test_times_in_where(galleries, where):
    "Written as in a folder; Milvus alone would find nobody"
    remote,local = galleries
    found = remote.search(embs[3], N, where=where)
    check_same(found, local.search(embs[3], N, where=where))
    assert 0<len(found)<N

def test_more_times_in_where(galleries):
    "A time on the left, equal times, and a text that only looks like a comparison"
    remote,local = galleries
    def keys(where): return remote.search(embs[3], N, where=where).key.tolist()
    since = local.search(embs[3], N, since='2026-11-23 10:00')
    assert keys('"2026-11-23 10:00"<=time')==since.key.tolist()
    assert keys('time=="2026-11-23 08:07"')==['k7']
    assert keys('cam=="time>=\\"2026\\""')==[]

def test_unknown_cameras(galleries):
    remote,local = galleries
    for unknown in (None,float('nan'),pd.NA): assert len(remote.search(embs[3], N, exclude_cam=[unknown]))==N
    found = remote.search(embs[3], N, exclude_cam=pd.Index(['door',None]))
    check_same(found, local.search(embs[3], N, exclude_cam='door'))

def test_expressions():
    kinds = dict(cam='number', pid='number', time='time with zone')
    assert milvus_filter(kinds)==''
    all_three = milvus_filter(kinds, np.int64(3), '1970-01-01 01:00:00.000005+01:00', 'pid>1')
    assert all_three=='(not exists cam or cam not in [3]) and time >= 5 and (pid>1)'
    zoned = milvus_filter(dict(time='time with zone'), where='time>"1970-01-01 01:00+01:00"')
    assert zoned=='(time>0)'
    for args in (dict(exclude_cam=1),dict(since='2026-11-23')):
        with pytest.raises(ValueError, match='needs a column'): milvus_filter({}, **args)

# Adding, removing, saving

def test_created_closed_and_opened(tmp_path):
    uri = tmp_path/'people.db'
    g = MilvusGallery(uri, BandModel())
    assert len(g)==len(g.table)==0
    assert 'x' not in g
    with pytest.raises(ValueError, match='gallery is empty'): g.search(pictures(1)[0])
    g.add(pictures(3), keys=list('abc'), cam='door').add(pictures(2, 1), keys=['d','e'], pid=[1,2])
    g.remove('b')
    long = calibration_of(np.linspace(-1, .9999, 20_000), n_gallery=5, about={'model':g.fingerprint})
    short = calibration_of([.9999]*200, n_gallery=5)
    for calibration in (long,short):
        g.calibration = calibration
        g.save()
    g.close()
    with pytest.raises(ValueError, match="Another model's embedding"): MilvusGallery.load(uri, BandModel('b model'))
    g = MilvusGallery.load(uri, BandModel())
    assert sorted(g.table.key)==['a','c','d','e']
    assert len(g)==4
    assert g.search(pictures(1)[0], 4, far=.01).key.tolist()==['a']
    assert g.add(pictures(3)[1], keys='b').search(pictures(3)[1], 1).key.tolist()==['b']
    with pytest.raises(ValueError, match="holds no gallery 'others'"): MilvusGallery(uri, name='others')
    assert g.show(pictures(1)[0], k=2).axes[0].get_title()=='query'
    g.close()

def test_keys_that_look_like_code(empty):
    "Removing one removes that one only"
    keys = ["x','k1",'k1','k2',"O'Brien.jpg",'C:\\x\\n.jpg','a\nb','100 %25','"quoted"']
    empty.add(pictures(len(keys)), keys=keys)
    for i,key in enumerate(keys):
        assert key in empty
        assert key not in empty.remove(key)
        assert sorted(empty.table.key)==sorted(keys[i+1:])

def test_what_milvus_cannot_store(empty):
    "Is refused before anything is sent"
    with pytest.raises(ValueError, match="Column 'embedding'"): empty.add(pictures(1), keys='a', embedding='x')
    with pytest.raises(ValueError, match='4,096 bytes'): empty.add(pictures(1), keys='ü'*2049)
    assert len(empty)==0

def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pymilvus', None)
    with pytest.raises(ImportError, match=r'pyramidreid\[milvus\]'): MilvusGallery(tmp_path/'x.db', BandModel())

def test_moving_to_milvus_and_back(empty, tmp_path):
    "With the lines of the guide"
    local = Gallery(BandModel()).add(entries(), embs=embs)
    local.remove('k1')
    scores = np.linspace(-1, .9999, 200)
    local.calibration = calibration_of(scores, n_gallery=300, about={'model':local.fingerprint})
    for table,vectors in local.entries(70): empty.add(table, embs=vectors)
    empty.calibration = local.calibration
    empty.save()
    check_same(empty.search(embs[5], 20), local.search(embs[5], 20))

    back = Gallery(BandModel())
    for table,vectors in empty.entries(70): back.add(table, embs=vectors)
    back.calibration = empty.calibration
    again = Gallery.load(back.save(tmp_path/'g'), BandModel())
    check_same(again.search(embs[5], 299), local.search(embs[5], 299))
    check_same_values(sorted_table(again), sorted_table(local))
    assert again.threshold(.1)==local.threshold(.1)

# Random lives

def compare(remote, local, rng):
    "Does a random search find the same in both?"
    filters,_ = random_filters(rng)
    if 'cam' in (filters['where'] or ''): filters['where'] = 'cam=="hall"' # Missing text passes != only in a folder
    query = embeddings(1, seed=rng.randrange(1<<30))
    k = rng.randint(1, len(local))
    found,expected = (g.search(query, k, **filters) for g in (remote,local))
    assert found.key.tolist()==expected.key.tolist(), filters
    columns = [c for c in expected if c in found]
    check_same(found[columns], expected[columns])

@pytest.mark.parametrize('seed', range(int(os.environ.get('LIVES', 4))))
def test_a_random_life(empty, seed):
    "Entries with gaps come and go, and every search finds the same as in a folder"
    rng,local = random.Random(seed),Gallery(BandModel())
    first = random_rows(rng, ['first'])[0] | {c:values[0] for c,values in VALUES.items()} # Fills every column
    for step in range(6):
        free = [k for k in KEYS if k not in local]
        rows = random_rows(rng, rng.sample(free, min(len(free), rng.randint(1, 8))))
        if step==0: rows.insert(0, first)
        for g in (empty,local): add_rows(g, rows)
        if step%2:
            removed = rng.sample([k for k in local.keys if k!='first'], min(len(local)-1, 3))
            for g in (empty,local): g.remove(removed)
        assert len(empty)==len(local)
        assert sorted(empty.table.key)==sorted(local.table.key)
        for _ in range(6): compare(empty, local, rng)
