"Re-ranking against the published algorithm written plainly on dense matrices, and what must not break it"
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_rerank as plain
from torch.utils._python_dispatch import TorchDispatchMode

from pyramidreid.evaluation import retrieval as evaluation
from pyramidreid.evaluation.reranking import *


def distances(x):
    "Euclidean distances in float64; exact squares for small whole numbers"
    x = np.asarray(x, np.float64)
    return np.sqrt(((x[:,None]-x)**2).sum(-1))

def close(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)

def parts(dist, nq): return dist[:nq,nq:],dist[:nq,:nq],dist[nq:,nq:]

def unit(x): return x/np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)

def people(nq=30, ng=150, n_pids=12, width=24, seed=0):
    rng = np.random.default_rng(seed)
    pid = rng.integers(0, n_pids, nq+ng)
    x = rng.normal(size=(n_pids,width))[pid] + rng.uniform(.3,1.3,(nq+ng,1))*rng.normal(size=(nq+ng,width))
    return x[:nq].astype(np.float32),x[nq:].astype(np.float32)

@st.composite
def problems(draw):
    "Images on a coarse grid: clusters, copies, ties, few of them; and settings"
    nq,ng = draw(st.integers(1,6)),draw(st.integers(1,40))
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    kind = draw(st.sampled_from(['grid','clusters','copies','cosine']))
    if kind=='cosine':
        x = rng.choice([-1.,1.], (nq+ng,4)) # length 2, so that cosines are exact
        x[rng.random(nq+ng)<.1] = 0
    elif kind=='clusters': x = (rng.integers(0, 40, (5,3))[rng.integers(0, 5, nq+ng)] + rng.integers(-3, 4, (nq+ng,3))).astype(float)
    else: x = rng.integers(0, draw(st.sampled_from([1,2,5,30])), (nq+ng,draw(st.integers(1,3)))).astype(float)
    if kind=='copies': x = x[rng.integers(0, 1+(nq+ng)//8, nq+ng)]
    settings = dict(k1=draw(st.integers(1,24)), k2=draw(st.integers(1,9)), lambda_=draw(st.sampled_from([0,.3,.7,1])))
    return kind,x,nq,settings,draw(st.sampled_from([None,1,2,7]))

@settings(max_examples=250, deadline=None)
@given(problems())
def test_equals_plain_version(p):
    kind,x,nq,kw,chunk = p
    ref = plain(distances(unit(x) if kind=='cosine' else x), nq, **kw)
    emb = rerank(x[:nq], x[nq:], distance='cosine' if kind=='cosine' else 'euclidean', chunk=chunk, **kw)
    dense = rerank_distances(*parts(distances(unit(x) if kind=='cosine' else x), nq), chunk=chunk, **kw)
    for r in (emb,dense):
        assert r.shape==ref.shape==r.dense().shape and r.dense().dtype==torch.float32
        np.testing.assert_allclose(r.dense(), ref, atol=1e-5)

@pytest.mark.parametrize('seed', range(3))
def test_realistic_embeddings(seed):
    q,g = people(60, 400, 25, seed=seed)
    x = np.concatenate([q,g])
    for distance,y in (('cosine',unit(x.astype(np.float64))),('euclidean',x)):
        ref = plain(distances(y), len(q))
        np.testing.assert_allclose(rerank_distances(*parts(distances(y), len(q))).dense(), ref, atol=1e-5)
        np.testing.assert_allclose(rerank(q, g, distance=distance).dense(), ref, atol=1e-5)

def test_published_program_reads_columns():
    "A matrix that is not symmetric: image i is ranked by column i"
    q,g = people(5, 40)
    d = distances(np.concatenate([q,g]))
    d = d*np.random.default_rng(0).uniform(.9, 1.1, d.shape)
    qg,qq,gg = parts(d, 5)
    ref = plain(np.block([[qq,qg],[qg.T,gg]]).T, 5, k1=6, k2=3)
    np.testing.assert_allclose(rerank_distances(qg, qq, gg, k1=6, k2=3, chunk=7).dense(), ref, atol=1e-5)

@settings(max_examples=100, deadline=None)
@given(st.integers(0,2**32-1), st.integers(1,30), st.integers(1,8), st.integers(1,40))
def test_nearest_is_a_stable_sort(seed, width, hi, k):
    d = torch.from_numpy(np.random.default_rng(seed).integers(0, hi, (4,width))).float()
    v,p = k_nearest(d, k)
    ref = d.sort(dim=1, stable=True)
    assert torch.equal(v, ref.values[:,:k]) and torch.equal(p, ref.indices[:,:k])

def test_more_copies_than_neighbours():
    "Forty copies of one picture: each stays in its own neighbourhood"
    x = np.concatenate([np.zeros((41,2)), np.arange(20).reshape(10,2)+5.])
    ref = plain(distances(x), 1)
    np.testing.assert_allclose(rerank(x[:1], x[1:], distance='euclidean').dense(), ref, atol=1e-5)
    assert np.isfinite(ref).all() and ref[0,:40].max()<ref[0,40:].min()

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
def test_float_types(dtype):
    q,g = (torch.from_numpy(o).to(dtype) for o in people())
    assert torch.equal(rerank(q, g).dense(), rerank(q.float(), g.float()).dense())
    assert torch.equal(expand_queries(q, g), expand_queries(q.float(), g.float()))
    d = torch.from_numpy(distances(np.concatenate(people()))).to(dtype)
    np.testing.assert_allclose(rerank_distances(*parts(d, 30)).dense(), plain(d.double().numpy(), 30), atol=1e-5)

def test_containers(tmp_path):
    q,g = people()
    ref = rerank(q, g).dense()
    np.save(tmp_path/'g.npy', g)
    mapped = np.load(tmp_path/'g.npy', mmap_mode='c')
    for a,b in ((torch.from_numpy(q).requires_grad_(),torch.from_numpy(g)), (q.tolist(),g.tolist()), (q,mapped), (q[:,::-1][:,::-1],np.asfortranarray(g))):
        got = rerank(a, b).dense()
        assert not got.requires_grad
        close(got, ref)

def test_rows():
    r = rerank(*people())
    d = r.dense()
    assert r.shape==(30,150) and len(r)==30 and 'k1=20' in repr(r)
    assert r.about=={'re-ranking':'k-reciprocal, k1=20, k2=6, λ=0.3'}
    for i in (slice(3,9), slice(0,30,7), [4,1,1,-1], torch.tensor([5,0]), np.array([2,3]), torch.arange(30)%2==0):
        close(r[i], d[i])
    close(r[7], d[7])
    close(r[-1], d[29])
    assert r[[]].shape==(0,150) and r[slice(4,4)].shape==(0,150)
    assert r.distance=='cosine'
    for i in (30, [0,30], torch.tensor([-31])):
        with pytest.raises(IndexError): r[i]

@pytest.mark.parametrize('lambda_', [0,.3,1])
def test_under_autocast_and_chunks(lambda_):
    q,g = people()
    ref = rerank(q, g, lambda_=lambda_).dense()
    with torch.autocast('cpu', dtype=torch.bfloat16): got = rerank(q, g, lambda_=lambda_).dense()
    assert torch.equal(got, ref)
    for chunk in (1,64,1000): close(rerank(q, g, lambda_=lambda_, chunk=chunk).dense(), ref)
    if lambda_==1:
        x = unit(np.concatenate([q,g]).astype(np.float64))
        d = distances(x)**2
        np.testing.assert_allclose(ref, d[:30,30:]/d[:30].max(1, keepdims=True), atol=1e-5)

class Largest(TorchDispatchMode):
    "Keeps the size of the largest tensor that any operation gave"
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        for o in (res if isinstance(res, (tuple,list)) else [res]):
            if isinstance(o, torch.Tensor) and o.layout==torch.strided: self.numel = max(self.numel, o.untyped_storage().nbytes()//o.element_size())
        return res

def test_input_is_left_alone():
    x = distances(np.concatenate(people()))
    for dtype in (np.float32,np.float64):
        d = [np.ascontiguousarray(o, dtype) for o in parts(x, 30)]
        kept = [o.copy() for o in d]
        rerank_distances(*d).dense()
        assert all((a==b).all() for a,b in zip(d, kept))

def test_no_square_matrix():
    q,g = people(200, 1800, 100, width=8)
    with Largest() as largest:
        r = rerank(q, g, chunk=50)
        rows = r[:10]
    assert largest.numel < 2000**2/10
    close(rows, rerank(q, g).dense()[:10])

def test_errors():
    q,g = people()
    bad = g.copy()
    bad[[2,7],0] = np.nan,np.inf
    with pytest.raises(ValueError, match=r'gallery_emb: 2 of 150 rows.*\[2, 7\]'): rerank(q, bad)
    with pytest.raises(ValueError, match='query_emb: 1 of 30'): rerank(np.where(np.arange(30)[:,None]==4, np.nan, q), g)
    with pytest.raises(ValueError, match='widths 23 .* and 24'): rerank(q[:,1:], g)
    with pytest.raises(ValueError, match='shape'): rerank(q[0], g)
    with pytest.raises(ValueError, match='at least one'): rerank(q[:0], g)
    with pytest.raises(ValueError, match="'cosine' or 'euclidean'"): rerank(q, g, distance='manhattan')
    for kw in (dict(k1=0),dict(k2=0),dict(k1=2.5),dict(lambda_=-.1),dict(lambda_=1.1),dict(chunk=0),dict(chunk=1.5),dict(lambda_=float('nan'))):
        with pytest.raises(ValueError, match='whole numbers'): rerank(q, g, **kw)
    for kw in (dict(k=0),dict(alpha=-1)):
        with pytest.raises(ValueError, match='whole number'): expand_queries(q, g, **kw)
    qg,qq,gg = parts(distances(np.concatenate([q,g])), 30)
    with pytest.raises(ValueError, match='30 × 150, so query_query must be 30 × 30'): rerank_distances(qg, gg, gg)
    with pytest.raises(ValueError, match='none may be negative'): rerank_distances(qg, qq, -gg)
    gg = gg.copy()
    gg[3,5] = gg[5,3] = np.nan
    with pytest.raises(ValueError, match=r'queries \[\] .*gallery images \[3, 5\] \(2\)'): rerank_distances(qg, qq, gg)

def plain_expansion(q, g, k, alpha):
    q,g = unit(q.astype(np.float64)),unit(g.astype(np.float64))
    res = []
    for x in q:
        best = np.argsort(-(g@x), kind='stable')[:k]
        res.append(x + sum(max(g[j]@x, 0)**alpha*g[j] for j in best))
    return unit(np.stack(res))

@pytest.mark.parametrize('k,alpha', [(5,3),(1,0),(1000,3),(7,.5)])
def test_query_expansion(k, alpha):
    q,g = people()
    got = expand_queries(q, g, k, alpha)
    assert got.dtype==torch.float32 and got.shape==q.shape
    np.testing.assert_allclose(got, plain_expansion(q, g, k, alpha), atol=1e-5)
    np.testing.assert_allclose(expand_queries(g, g, k, alpha), plain_expansion(g, g, k, alpha), atol=1e-5)

def test_query_expansion_of_nothing():
    "A query without a direction stays one, and a gallery image without one adds nothing"
    q,g = people()
    q[3],g[:50] = 0,0
    got = expand_queries(q, g, 60)
    np.testing.assert_allclose(got, plain_expansion(q, g, 60, 3), atol=1e-5)
    assert (got[3]==0).all() and got.isfinite().all()

@pytest.mark.skipif(not hasattr(evaluation, 'evaluate_distances'), reason='no evaluate_distances')
def test_evaluation_reads_rows():
    q,g = people(40, 200, 30)
    pids = np.arange(40)%30,np.arange(200)%30
    r = rerank(q, g)
    a,b = (evaluation.evaluate_distances(d, *pids, about=r.about) for d in (r,r.dense()))
    assert a.mAP==b.mAP and torch.equal(a.cmc, b.cmc) and 're-ranking' in repr(a)
