"The exact search against sorting everything: ties, filters, blocks of all sizes, memory"
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyramidreid.gallery.nearest import Rows, _top, exact


def plain(q, x, k, ok):
    "Similarities and rows, by a stable sort of float64 products of small whole numbers, which are exact"
    s = np.where(ok, q.astype(float)@x.astype(float).T, -np.inf)
    at = np.argsort(-s, 1, kind='stable')[:,:k]
    s = np.take_along_axis(s, at, 1)
    pad = ((0,0),(0,k-at.shape[1]))
    return np.pad(s, pad, constant_values=-np.inf),np.pad(np.where(np.isneginf(s), -1, at), pad, constant_values=-1)

@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_same_as_sorting(data):
    "Rows of few different values, so that equals abound, in any blocks, under any filter, with any k"
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32-1)))
    n,k,d = data.draw(st.integers(1, 60)),data.draw(st.integers(1, 70)),data.draw(st.integers(1, 3))
    x,q = rng.integers(-2, 3, (n,d)).astype(np.float32),rng.integers(-2, 3, (data.draw(st.integers(1, 5)),d)).astype(np.float32)
    cuts = sorted(data.draw(st.sets(st.integers(1, n), max_size=3))|{n})
    rows = Rows([(np.arange(a, b),x[a:b].astype(data.draw(st.sampled_from(['float32','float16'])))) for a,b in zip([0,*cuts], cuts)])
    ok = data.draw(st.none() | st.sampled_from([0,.1,.5,.9,1]))
    ok = None if ok is None else rng.random(n)<ok
    got,want = exact(q, rows, k, ok),plain(q, x, k, np.ones(n, bool) if ok is None else ok)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0], want[0])

@pytest.mark.parametrize('share', [None,.9,.1])
def test_memory_does_not_grow_with_the_gallery(share):
    "100,000 rows in half precision take 4 MB for each 1,000 of the chunk at hand, and no more"
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100_000,64)).astype(np.float16)
    ok = None if share is None else rng.random(len(x))<share
    tracemalloc.start()
    exact(rng.standard_normal((2000,64), dtype=np.float32), Rows([(np.arange(len(x)),x)]), 10, ok)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak<120e6, peak

@pytest.mark.parametrize('n', [640,641,655,1000])
def test_groups_of_columns(n):
    "The largest of many columns, equals among them, whether or not the groups come out even"
    rng = np.random.default_rng(n)
    for few in (True,False):
        s = rng.integers(0, 50, (40,n)).astype(np.float32) if few else rng.standard_normal((40,n), dtype=np.float32)
        np.testing.assert_array_equal(np.sort(_top(s, 10), 1), np.sort(np.argsort(-s, 1, kind='stable')[:,:10], 1))
