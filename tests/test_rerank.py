"Re-ranking against the published algorithm written plainly on dense matrices, and what must not break it"
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_rerank
from torch.utils._python_dispatch import TorchDispatchMode

from pyramidreid.evaluation.reranking import *
from pyramidreid.evaluation.retrieval import evaluate_distances


def distances(x):
    "Euclidean distances in float64; exact squares for small whole numbers"
    x = np.asarray(x, np.float64)
    return np.sqrt(((x[:,None]-x)**2).sum(-1))

def blocks(dist, n_query):
    "Query-gallery, query-query and gallery-gallery distances, of a matrix of all"
    return dist[:n_query,n_query:],dist[:n_query,:n_query],dist[n_query:,n_query:]

def normalised(x): return x/np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)

def assert_close(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)

def embeddings(n_query=30, n_gallery=150, n_pids=12, width=24, seed=0):
    "Queries and gallery around the centres of some people, some of them far off"
    rng = np.random.default_rng(seed)
    n = n_query+n_gallery
    pid = rng.integers(0, n_pids, n)
    x = rng.normal(size=(n_pids,width))[pid] + rng.uniform(.3, 1.3, (n,1))*rng.normal(size=(n,width))
    return x[:n_query].astype(np.float32),x[n_query:].astype(np.float32)

# against the plain version

def grid(rng, n, size, width): return rng.integers(0, size, (n,width)).astype(float)

def clusters(rng, n):
    centres = rng.integers(0, 40, (5,3))[rng.integers(0, 5, n)]
    return (centres + rng.integers(-3, 4, (n,3))).astype(float)

def signs(rng, n):
    "Entries of ±1 with four to a row have length 2, so that cosines are exact; some rows are zero"
    x = rng.choice([-1.,1.], (n,4))
    x[rng.random(n)<.1] = 0
    return x

@st.composite
def problems(draw):
    "Images on a coarse grid: clusters, copies, ties, few of them; and settings"
    n_query,n_gallery = draw(st.integers(1,6)),draw(st.integers(1,40))
    n = n_query+n_gallery
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    kind = draw(st.sampled_from(['grid','clusters','copies','cosine']))
    if kind=='cosine': x = signs(rng, n)
    elif kind=='clusters': x = clusters(rng, n)
    else: x = grid(rng, n, draw(st.sampled_from([1,2,5,30])), draw(st.integers(1,3)))
    if kind=='copies': x = x[rng.integers(0, 1+n//8, n)]
    settings = dict(k1=draw(st.integers(1,24)), k2=draw(st.integers(1,9)), lambda_=draw(st.sampled_from([0,.3,.7,1])))
    return kind,x,n_query,settings,draw(st.sampled_from([None,1,2,7]))

@settings(max_examples=250, deadline=None)
@given(problems())
def test_equals_plain_version(problem):
    kind,x,n_query,options,chunk = problem
    distance = 'cosine' if kind=='cosine' else 'euclidean'
    dist = distances(normalised(x) if kind=='cosine' else x)
    want = plain_rerank(dist, n_query, **options)
    from_embeddings = rerank(x[:n_query], x[n_query:], distance=distance, chunk=chunk, **options)
    from_distances = rerank_distances(*blocks(dist, n_query), chunk=chunk, **options)
    for r in (from_embeddings,from_distances):
        assert r.shape==want.shape==r.dense().shape
        assert r.dense().dtype==torch.float32
        np.testing.assert_allclose(r.dense(), want, atol=1e-5)

@pytest.mark.parametrize('seed', range(3))
def test_realistic_embeddings(seed):
    q,g = embeddings(60, 400, 25, seed=seed)
    x = np.concatenate([q,g])
    for distance,y in (('cosine',normalised(x.astype(np.float64))),('euclidean',x)):
        want = plain_rerank(distances(y), len(q))
        np.testing.assert_allclose(rerank_distances(*blocks(distances(y), len(q))).dense(), want, atol=1e-5)
        np.testing.assert_allclose(rerank(q, g, distance=distance).dense(), want, atol=1e-5)

def test_published_program_reads_columns():
    "A matrix that is not symmetric: image i is ranked by column i"
    dist = distances(np.concatenate(embeddings(5, 40)))
    dist = dist*np.random.default_rng(0).uniform(.9, 1.1, dist.shape)
    qg,qq,gg = blocks(dist, 5)
    want = plain_rerank(np.block([[qq,qg],[qg.T,gg]]).T, 5, k1=6, k2=3)
    np.testing.assert_allclose(rerank_distances(qg, qq, gg, k1=6, k2=3, chunk=7).dense(), want, atol=1e-5)

@settings(max_examples=100, deadline=None)
@given(st.integers(0,2**32-1), st.integers(1,30), st.integers(1,8), st.integers(1,40))
def test_nearest_is_a_stable_sort(seed, width, n_values, k):
    d = torch.from_numpy(np.random.default_rng(seed).integers(0, n_values, (4,width))).float()
    values,positions = k_nearest(d, k)
    want = d.sort(dim=1, stable=True)
    assert torch.equal(values, want.values[:,:k]) and torch.equal(positions, want.indices[:,:k])

def test_more_copies_than_neighbours():
    "Forty copies of one image: each stays in its own neighbourhood"
    x = np.concatenate([np.zeros((41,2)), np.arange(20).reshape(10,2)+5.])
    want = plain_rerank(distances(x), 1)
    np.testing.assert_allclose(rerank(x[:1], x[1:], distance='euclidean').dense(), want, atol=1e-5)
    assert np.isfinite(want).all() and want[0,:40].max()<want[0,40:].min()

# kinds of input, and rows on demand

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
def test_float_types(dtype):
    q,g = (torch.from_numpy(o).to(dtype) for o in embeddings())
    assert torch.equal(rerank(q, g).dense(), rerank(q.float(), g.float()).dense())
    assert torch.equal(expand_queries(q, g), expand_queries(q.float(), g.float()))
    dist = torch.from_numpy(distances(np.concatenate(embeddings()))).to(dtype)
    want = plain_rerank(dist.double().numpy(), 30)
    np.testing.assert_allclose(rerank_distances(*blocks(dist, 30)).dense(), want, atol=1e-5)

def test_containers(tmp_path):
    q,g = embeddings()
    want = rerank(q, g).dense()
    np.save(tmp_path/'g.npy', g)
    pairs = {'tensors': (torch.from_numpy(q).requires_grad_(),torch.from_numpy(g)), 'lists': (q.tolist(),g.tolist()),
             'mapped file': (q,np.load(tmp_path/'g.npy', mmap_mode='c')),
             'strides': (q[:,::-1][:,::-1],np.asfortranarray(g))}
    for a,b in pairs.values():
        got = rerank(a, b).dense()
        assert not got.requires_grad
        assert_close(got, want)

def test_rows():
    r = rerank(*embeddings())
    d = r.dense()
    assert r.shape==(30,150) and len(r)==30 and 'k1=20' in repr(r)
    assert r.about=={'re-ranking':'k-reciprocal, k1=20, k2=6, λ=0.3'} and r.distance=='cosine'
    several = [slice(3,9), slice(0,30,7), [4,1,1,-1], torch.tensor([5,0]), np.array([2,3]), torch.arange(30)%2==0]
    for rows in several: assert_close(r[rows], d[rows])
    assert_close(r[7], d[7])
    assert_close(r[-1], d[29])
    assert r[[]].shape==(0,150) and r[slice(4,4)].shape==(0,150)
    for rows in (30, [0,30], torch.tensor([-31])):
        with pytest.raises(IndexError): r[rows]

@pytest.mark.parametrize('lambda_', [0,.3,1])
def test_under_autocast_and_chunks(lambda_):
    q,g = embeddings()
    want = rerank(q, g, lambda_=lambda_).dense()
    with torch.autocast('cpu', dtype=torch.bfloat16): got = rerank(q, g, lambda_=lambda_).dense()
    assert torch.equal(got, want)
    for chunk in (1,64,1000): assert_close(rerank(q, g, lambda_=lambda_, chunk=chunk).dense(), want)

def test_lambda_of_one_is_the_original_distance():
    q,g = embeddings()
    sq = distances(normalised(np.concatenate([q,g]).astype(np.float64)))**2
    want = sq[:30,30:]/sq[:30].max(1, keepdims=True)
    np.testing.assert_allclose(rerank(q, g, lambda_=1).dense(), want, atol=1e-5)

def test_input_is_left_alone():
    dist = distances(np.concatenate(embeddings()))
    for dtype in (np.float32,np.float64):
        given = [np.ascontiguousarray(o, dtype) for o in blocks(dist, 30)]
        before = [o.copy() for o in given]
        rerank_distances(*given).dense()
        assert all((a==b).all() for a,b in zip(given, before))

class LargestTensor(TorchDispatchMode):
    "Keeps the size of the largest tensor that any operation returned"
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        for o in (res if isinstance(res, (tuple,list)) else [res]):
            if isinstance(o, torch.Tensor) and o.layout==torch.strided:
                self.numel = max(self.numel, o.untyped_storage().nbytes()//o.element_size())
        return res

def test_no_square_matrix():
    q,g = embeddings(200, 1800, 100, width=8)
    with LargestTensor() as largest:
        r = rerank(q, g, chunk=50)
        rows = r[:10]
    assert 0 < largest.numel < 2000**2/10
    assert_close(rows, rerank(q, g).dense()[:10])

def test_evaluation_reads_rows():
    q,g = embeddings(40, 200, 30)
    pids = np.arange(40)%30,np.arange(200)%30
    r = rerank(q, g)
    by_rows,by_matrix = evaluate_distances(r, *pids, chunk=7),evaluate_distances(r.dense(), *pids)
    assert by_rows.mAP==pytest.approx(by_matrix.mAP, abs=1e-12) and torch.equal(by_rows.cmc, by_matrix.cmc)
    assert by_rows.about==r.about and (by_rows.distance,by_matrix.distance)==('cosine','as given')

# errors

def test_embedding_errors():
    q,g = embeddings()
    bad = g.copy()
    bad[[2,7],0] = np.nan,np.inf
    with pytest.raises(ValueError, match=r'gallery_emb: 2 of 150 rows.*\[2, 7\]'): rerank(q, bad)
    bad_query = np.where(np.arange(30)[:,None]==4, np.nan, q)
    with pytest.raises(ValueError, match='query_emb: 1 of 30'): rerank(bad_query, g)
    with pytest.raises(ValueError, match='widths 23 .* and 24'): rerank(q[:,1:], g)
    with pytest.raises(ValueError, match='shape'): rerank(q[0], g)
    with pytest.raises(ValueError, match='at least one'): rerank(q[:0], g)
    with pytest.raises(ValueError, match="'cosine' or 'euclidean'"): rerank(q, g, distance='manhattan')

@pytest.mark.parametrize('options', [dict(k1=0), dict(k2=0), dict(k1=2.5), dict(lambda_=-.1), dict(lambda_=1.1),
                                     dict(chunk=0), dict(chunk=1.5), dict(lambda_=float('nan'))])
def test_setting_errors(options):
    with pytest.raises(ValueError, match='whole numbers'): rerank(*embeddings(), **options)

@pytest.mark.parametrize('options', [dict(k=0), dict(alpha=-1)])
def test_query_expansion_errors(options):
    with pytest.raises(ValueError, match='whole number'): expand_queries(*embeddings(), **options)

def test_distance_errors():
    qg,qq,gg = blocks(distances(np.concatenate(embeddings())), 30)
    with pytest.raises(ValueError, match='30 × 150, so query_query must be 30 × 30'): rerank_distances(qg, gg, gg)
    with pytest.raises(ValueError, match='none may be negative'): rerank_distances(qg, qq, -gg)
    gg = gg.copy()
    gg[3,5] = gg[5,3] = np.nan
    with pytest.raises(ValueError, match=r'queries \[\] .*gallery images \[3, 5\] \(2 in total\)'):
        rerank_distances(qg, qq, gg)

# query expansion

def plain_expansion(q, g, k, alpha):
    q,g = normalised(q.astype(np.float64)),normalised(g.astype(np.float64))
    res = []
    for x in q:
        nearest = np.argsort(-(g@x), kind='stable')[:k]
        res.append(x + sum(max(g[j]@x, 0)**alpha*g[j] for j in nearest))
    return normalised(np.stack(res))

@pytest.mark.parametrize('k,alpha', [(5,3),(1,0),(1000,3),(7,.5)])
def test_query_expansion(k, alpha):
    q,g = embeddings()
    got = expand_queries(q, g, k, alpha)
    assert got.dtype==torch.float32 and got.shape==q.shape
    np.testing.assert_allclose(got, plain_expansion(q, g, k, alpha), atol=1e-5)
    np.testing.assert_allclose(expand_queries(g, g, k, alpha), plain_expansion(g, g, k, alpha), atol=1e-5)

def test_query_expansion_with_zero_vectors():
    "A zero query stays zero, and a zero gallery image adds nothing"
    q,g = embeddings()
    q[3],g[:50] = 0,0
    got = expand_queries(q, g, 60)
    np.testing.assert_allclose(got, plain_expansion(q, g, 60, 3), atol=1e-5)
    assert (got[3]==0).all() and got.isfinite().all()

# other projects

notebooks = Path(__file__).resolve().parent.parent/'nbs'

def markdown_of(notebook):
    cells = json.loads((notebooks/notebook).read_text(encoding='utf-8'))['cells']
    return '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type']=='markdown')

def test_squared_distances_give_what_projects_do_that_square_twice():
    "torchreid and layumi's baseline: weights and last step of the 4th power of the Euclidean distance"
    q,g = embeddings()
    dist = distances(normalised(np.concatenate([q,g]).astype(np.float64)))
    want = plain_rerank(dist**2, 30)
    np.testing.assert_allclose(rerank_distances(*blocks(dist**2, 30)).dense(), want, atol=1e-5)
    cosine = 1-dist**2/2
    np.testing.assert_allclose(rerank_distances(*blocks(2-2*cosine, 30)).dense(), want, atol=1e-5)
    np.testing.assert_allclose(rerank_distances(*blocks(1-cosine, 30)).dense(), want, atol=1e-5) # torchreid's 'cosine'
    assert np.abs(want-rerank(q, g).dense().numpy()).max()>.02

def average_with_self(q, g, qe_k, alpha):
    "A query averaged with its nearest among itself and the gallery, itself among the `qe_k`, as fast-reid counts them"
    q,g = normalised(q.astype(np.float64)),normalised(g.astype(np.float64))
    res = []
    for x in q:
        own = np.concatenate([x[None],g])
        nearest = np.argsort(-(own@x), kind='stable')[:qe_k]
        res.append(((own[nearest]@x)**alpha)@own[nearest])
    return normalised(np.stack(res))

def test_a_count_that_includes_the_query_is_one_more_than_k():
    q,g = embeddings()
    np.testing.assert_allclose(expand_queries(q, g, k=4), average_with_self(q, g, 5, 3), atol=1e-5)
    assert np.abs(expand_queries(q, g, k=5).numpy()-average_with_self(q, g, 5, 3)).max()>.005

def test_the_page_on_other_projects():
    "It exists, the page on re-ranking leads to it, and neither says that QE_K = 5 is k = 5"
    page,variants = markdown_of('evaluation/06_reranking.ipynb'),markdown_of('guides/reranking_variants.ipynb')
    assert 'guides/reranking_variants.ipynb' in page and 'as if k were 4' in page
    assert 'k = 5 with α = 3 is the default of fast-reid' not in page
    for name in ('torchreid','layumi','fast-reid','Zhong'): assert name in variants
