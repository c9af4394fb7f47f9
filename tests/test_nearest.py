"Exact and approximate search against sorting everything: ties, filters, blocks of all sizes, memory"
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyramidreid.gallery.nearest import (
    RowBlocks,
    _top_columns,
    exact_search,
    nearest_rows,
    normalize_rows,
    train_index,
)


def sorted_search(q, x, k, allowed):
    "Similarities and rows by a stable sort of float64 products, which are exact for small integers"
    sims = np.where(allowed, q.astype(float)@x.astype(float).T, -np.inf)
    order = np.argsort(-sims, 1, kind='stable')[:,:k]
    sims = np.take_along_axis(sims, order, 1)
    found = np.where(np.isneginf(sims), -1, order)
    padding = ((0,0),(0,k-order.shape[1]))
    return np.pad(sims, padding, constant_values=-np.inf),np.pad(found, padding, constant_values=-1)

@st.composite
def searches(draw):
    "Queries, rows with few different values so that ties abound, in any blocks, any k, and any filter"
    rng = np.random.default_rng(draw(st.integers(0, 2**32-1)))
    n,k,dim = draw(st.integers(1, 60)),draw(st.integers(1, 70)),draw(st.integers(1, 3))
    x = rng.integers(-2, 3, (n,dim)).astype(np.float32)
    q = rng.integers(-2, 3, (draw(st.integers(1, 5)),dim)).astype(np.float32)
    ends = sorted(draw(st.sets(st.integers(1, n), max_size=3)) | {n})
    blocks = []
    for start,end in zip([0,*ends], ends):
        dtype = draw(st.sampled_from(['float32','float16']))
        blocks.append((np.arange(start, end),x[start:end].astype(dtype)))
    fraction = draw(st.none() | st.sampled_from([0,.1,.5,.9,1]))
    allowed = None if fraction is None else rng.random(n)<fraction
    return q,x,RowBlocks(blocks),k,allowed

@settings(max_examples=200, deadline=None)
@given(searches())
def test_the_same_as_sorting(search):
    q,x,rows,k,allowed = search
    sims,found = exact_search(q, rows, k, allowed)
    expected_sims,expected = sorted_search(q, x, k, np.ones(len(x), bool) if allowed is None else allowed)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(sims, expected_sims)

@pytest.mark.parametrize('fraction', [None,.9,.1])
def test_memory_does_not_grow_with_the_gallery(fraction):
    "100,000 rows in half precision take 4 MB for each 1,000 rows of the present chunk, and no more"
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100_000,64)).astype(np.float16)
    allowed = None if fraction is None else rng.random(len(x))<fraction
    q = rng.standard_normal((2000,64), dtype=np.float32)
    tracemalloc.start()
    exact_search(q, RowBlocks([(np.arange(len(x)),x)]), 10, allowed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak<120e6

@pytest.mark.parametrize('n', [640,641,655,1000])
@pytest.mark.parametrize('ties', [True,False])
def test_groups_of_columns(n, ties):
    "The largest of many columns, whether or not the number of columns is a multiple of the groups"
    rng = np.random.default_rng(n)
    if ties: sims = rng.integers(0, 50, (40,n)).astype(np.float32)
    else: sims = rng.standard_normal((40,n), dtype=np.float32)
    expected = np.argsort(-sims, 1, kind='stable')[:,:10]
    np.testing.assert_array_equal(np.sort(_top_columns(sims, 10), 1), np.sort(expected, 1))

def test_ties_keep_their_order():
    x = np.tile(normalize_rows(np.ones((1,4))), (7,1))
    rows = RowBlocks([(np.arange(3),x[:3]),(np.arange(3,7),x[3:])])
    assert exact_search(x[:1], rows, 5)[1].tolist()==[[0,1,2,3,4]]

# Twelve thousand rows

@pytest.fixture(scope='module')
def crowd():
    "12,000 rows around 200 centres in three blocks, one of half precision; every tenth id is missing. And 30 queries"
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200,24))
    x = normalize_rows(centres[rng.integers(0, 200, 12000)]+.5*rng.standard_normal((12000,24)))
    ids = np.array([i for i in range(14000) if i%10])[:12000]
    rows = RowBlocks([(ids[:5000],x[:5000]),(ids[5000:5001],x[5000:5001]),(ids[5001:],x[5001:].astype(np.float16))])
    return rows,normalize_rows(centres[:30])

def brute_force(q, rows, k, allowed=None):
    sims = q@np.concatenate([np.asarray(embs, np.float32) for _,embs in rows.blocks]).T
    if allowed is not None: sims[:,~allowed] = -np.inf
    order = np.argsort(-sims, 1, kind='stable')[:,:k]
    sims = np.take_along_axis(sims, order, 1)
    return sims,np.where(np.isfinite(sims), order, -1)

@pytest.mark.parametrize('fraction', [None,1.,.5,.01,.0005,0.])
def test_exact_under_filters(crowd, fraction):
    rows,q = crowd
    allowed = None if fraction is None else np.random.default_rng(1).random(len(rows))<fraction
    sims,found = exact_search(q, rows, 10, allowed)
    expected_sims,expected = brute_force(q, rows, 10, allowed)
    assert np.allclose(sims, expected_sims, atol=1e-6)
    assert (found==expected).mean()>.999

@pytest.mark.parametrize('kind', ['ivf','hnsw'])
def test_index(crowd, kind, capsys):
    "The printed recall is reached, and the size is near the estimate"
    faiss = pytest.importorskip('faiss', reason='needs the extra gallery')
    rows,q = crowd
    index = train_index(rows, kind, few=100)
    out = capsys.readouterr().out
    assert f"recall@10 {index.note['recall']:.3f}" in out
    assert 'ms per query' in out
    assert index.note['recall']>=.95
    assert abs(index.note['bytes']/len(faiss.serialize_index(index.index))-1)<.15

    rng = np.random.default_rng(2)
    for fraction in (None,.9,.3,.1,.02,.004,.0002):
        allowed = None if fraction is None else rng.random(len(rows))<fraction
        check_search_through(index, rows, q, allowed)

def check_search_through(index, rows, q, allowed):
    "Only allowed rows, no gaps, exact similarities, and nearly the rows of brute force"
    sims,found = nearest_rows(q, rows, 10, allowed, index, few=100)
    n_allowed = len(rows) if allowed is None else allowed.sum()
    assert ((found>=0).sum(1)==min(10, n_allowed)).all()
    if allowed is not None: assert allowed[found[found>=0]].all()
    for query,s,f in zip(q, sims, found): assert np.allclose(s[f>=0], rows.gather(f[f>=0])@query, atol=1e-6)
    expected = brute_force(q, rows, 10, allowed)[1]
    assert np.mean([len(set(a) & set(b))/len(set(b)) for a,b in zip(found, expected)])>=.93, n_allowed
