"Galleries of people and tracks: changed entries, one result for each person, several pictures as one query"
import numpy as np
import pandas as pd
import pytest
from gallery_toys import BandModel, embeddings

pytest.importorskip('pyarrow', reason='needs the extra gallery')

from pyramidreid.gallery.entries import Embeddings
from pyramidreid.gallery.gallery import Gallery

N = 60

@pytest.fixture(params=['float32','float16'])
def gallery(request):
    "Some people with a few tracks each; the last four entries have no track"
    rng = np.random.default_rng(3)
    table = pd.DataFrame(dict(key=[f'k{i}' for i in range(N)], pid=rng.integers(0, 9, N), cam=rng.integers(1, 4, N)))
    table['track'] = [f'{pid}-{i%3}' if i<N-4 else None for i,pid in enumerate(table.pid)]
    return Gallery(BandModel(), dtype=request.param).add(table, embs=embeddings(N))

def contents(gallery):
    "Key: (columns, embedding)"
    return {row.key: (row._asdict(), values) for table,embs in gallery.entries()
            for row,values in zip(table.itertuples(index=False), embs.values)}

def test_changed_entries_keep_their_embeddings_and_other_columns(gallery):
    before,keys = contents(gallery),['k3','k50','k7']
    assert gallery.update(keys, pid=[100,101,102]) is gallery
    after = contents(gallery)
    assert set(after)==set(before) and gallery.table.key.tolist()[-3:]==keys
    for key,(columns,values) in after.items():
        expected = before[key][0] | ({'pid': 100+keys.index(key)} if key in keys else {})
        assert columns==expected and np.array_equal(values, before[key][1])

def test_a_key_or_all_of_them(gallery):
    gallery.update('k0', pid=7)
    assert contents(gallery)['k0'][0]['pid']==7
    gallery.update(gallery.table.key.tolist(), pid=5)
    assert set(gallery.table.pid)=={5} and len(gallery)==N

def test_changes_are_saved_and_loaded(gallery, tmp_path):
    gallery.save(tmp_path/'g')
    gallery.update(['k1','k2'], pid=50).save()
    again = Gallery.load(tmp_path/'g')
    assert again.table.pid[again.table.key.isin(['k1','k2'])].tolist()==[50,50] and len(again)==N
    expected = contents(gallery)
    assert all(np.array_equal(values, expected[key][1]) for key,(_,values) in contents(again).items())

@pytest.mark.parametrize('keys,columns,said', [
    (['k1','nobody'], dict(pid=1), 'not in the gallery'), ('k1', dict(key='k2'), 'cannot be changed'),
    (['k1','k2'], dict(pid=[1]), '1 values for 2'), ('k1', dict(pid='anna'), 'pid'),
    ('k1', dict(similarity=1.), 'another name'), ('k1', dict(time='yesterday-ish'), 'dates and times')])
def test_what_does_not_fit_changes_nothing(gallery, keys, columns, said):
    before = contents(gallery)
    with pytest.raises(ValueError, match=said): gallery.update(keys, **columns)
    assert contents(gallery).keys()==before.keys() and gallery.table.key.tolist()==list(before)

def test_a_new_column(gallery):
    gallery.update(['k1','k2'], name=['Ann','Ben'])
    named = gallery.table.dropna(subset='name')
    assert named.name.tolist()==['Ann','Ben'] and len(gallery.table)==N

def plain_groups(gallery, query, k, per, **filters):
    "The best entry of each of the best `k` values of a column, from a search for everything"
    seen,rows = set(),[]
    for row in gallery.search(query, k=len(gallery), **filters).itertuples():
        value = getattr(row, per)
        if per=='track' and not pd.isna(value): value = row.cam,value # a camera's own
        if value in seen and (isinstance(value, tuple) or not pd.isna(value)): continue
        seen.add(value)
        rows.append(row.key)
    return rows[:k]

@pytest.mark.parametrize('per', ['pid','track'])
@pytest.mark.parametrize('k', [1,3,9,40])
@pytest.mark.parametrize('filters', [{}, dict(exclude_cam=2), dict(where='pid>4'), dict(where='pid==1')])
def test_one_result_for_each_person_or_track(gallery, per, k, filters):
    for seed in range(5):
        query = embeddings(1, 100+seed)
        found = gallery.search(query, k=k, per=per, **filters)
        assert found.key.tolist()==plain_groups(gallery, query, k, per, **filters)

def test_several_queries_with_one_result_for_each_person(gallery):
    queries = embeddings(4, 9)
    found = gallery.search(queries, k=3, per='pid')
    for i in range(4): assert found.key[found['query']==i].tolist()==plain_groups(gallery, queries[[i]], 3, 'pid')

def test_an_unknown_column_is_named(gallery):
    with pytest.raises(ValueError, match="no such column; give 'image', or one of 'key', 'pid'"):
        gallery.search(embeddings(1), per='person')

def test_several_pictures_of_one_person_are_one_query(gallery):
    queries = embeddings(3, 5)
    directions = queries.values/np.linalg.norm(queries.values, axis=1, keepdims=True)
    mean = Embeddings(directions.mean(0), 'a model')
    found = gallery.search(queries, k=6, as_one=True)
    expected = gallery.search(mean, k=6)
    assert 'query' not in found and found.key.tolist()==expected.key.tolist()
    assert np.allclose(found.similarity, expected.similarity, atol=1e-6)

def test_a_threshold_holds_for_people(gallery):
    found = gallery.search(embeddings(1, 2), k=9, per='pid')
    middle = found.similarity.median()
    assert gallery.search(embeddings(1, 2), k=9, per='pid', threshold=middle).key.tolist()==(
        found.key[found.similarity>=middle].tolist())

def test_tracks_are_numbered_by_each_camera():
    table = pd.DataFrame(dict(key=list('abcd'), pid=['ann','bob','cem','ann'], cam=[1,2,3,1], track=[1,1,1,1]))
    gallery = Gallery(BandModel()).add(table, embs=embeddings(4))
    found = gallery.search(embeddings(1), k=4, per='track')
    assert sorted(found.cam)==[1,2,3] and len(found)==3

@pytest.mark.parametrize('saved', [False,True])
@pytest.mark.parametrize('moment', ['_append_rows','remove'])
def test_an_interrupted_update_changes_nothing(tmp_path, monkeypatch, saved, moment):
    gallery = Gallery(BandModel()).add(pd.DataFrame(dict(key=list('abc'))), embs=embeddings(3))
    if saved: gallery.save(tmp_path/'g')
    before,kinds = gallery.table,dict(gallery.store.kinds)
    original,calls = getattr(gallery.store, moment),[]
    def interrupted(ids, *args):
        calls.append(ids)
        original(ids[:1] if moment=='remove' and len(calls)==1 else ids, *args)
        if len(calls)==1: raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(gallery.store, moment, interrupted)
        with pytest.raises(KeyboardInterrupt): gallery.update(['a','b'], pid='x')
    assert gallery.table[list(before)].equals(before) and gallery.store.kinds==kinds and len(gallery)==3
    assert gallery.update('a', pid='x').table.key.tolist()==['b','c','a']
    gallery.save(tmp_path/'g')
    assert Gallery.load(tmp_path/'g').table.key.tolist()==['b','c','a']
