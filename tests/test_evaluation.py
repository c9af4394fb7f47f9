"`evaluate` against plain scores written for reading, its memory, and the metrics in fastai's training loop"
import json
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_scores
from torch import nn, tensor
from torch.utils.data import TensorDataset

from pyramidreid.core import Role
from pyramidreid.evaluation.card import *
from pyramidreid.evaluation.ranking import *
from pyramidreid.evaluation.retrieval import *
from pyramidreid.training.metrics import *


def check(res, ref, ranks=50):
    valid = [r for r in ref if r]
    mean = lambda k: np.mean([r[k] for r in valid])
    np.testing.assert_allclose([res.mAP,res.mAP_trapezoid,res.mINP], [mean('ap'),mean('trapezoid'),mean('inp')], atol=1e-12)
    np.testing.assert_allclose(res.ap, [r['ap'] if r else np.nan for r in ref], atol=1e-12)
    assert res.first_rank.tolist() == [r['first'] if r else 0 for r in ref]
    np.testing.assert_allclose(res.cmc, [np.mean([r['first']<=k for r in valid]) for k in range(1,ranks+1)], atol=1e-7)
    assert (res.n_query,res.n_query_valid) == (len(ref),len(valid))

def same(a, b):
    "Places and counts are equal, and means to rounding, whose last bit may depend on how wide a chunk's table of matches is"
    assert a.first_rank.tolist()==b.first_rank.tolist() and a.n_tied==b.n_tied and a.card().equals(b.card())
    for x,y in zip((a.ap,a.inp,a.cmc), (b.ap,b.inp,b.cmc)): torch.testing.assert_close(x, y, rtol=0, atol=1e-13, equal_nan=True)

def exact_dist(q, g, distance):
    "Distances of small whole numbers without rounding, in float64"
    q,g = np.asarray(q, np.float64),np.asarray(g, np.float64)
    if distance=='euclidean': return ((q[:,None]-g[None])**2).sum(-1)
    return -(q@g.T)/np.linalg.norm(g, axis=1).clip(1e-12)

@st.composite
def problems(draw, distance='euclidean'):
    "Whole-number embeddings: many ties, few people, few cameras, junk and distractors"
    n_q,n_g,width = draw(st.integers(1,6)),draw(st.integers(1,30)),draw(st.integers(1,4))
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    hi = draw(st.integers(1,4))
    # entries of +-1 with four per row have length 2, so that cosines are exact too
    make = (lambda n: rng.integers(0, hi, (n,width))) if distance=='euclidean' else (lambda n: rng.choice([-1,1], (n,4)))
    q,g = make(n_q),make(n_g)
    if draw(st.booleans()): g[:] = g[rng.integers(0, n_g, n_g)]
    n_pid,n_cam = draw(st.integers(1,5)),draw(st.integers(1,4))
    q_pids,g_pids = rng.integers(1, n_pid+1, n_q),rng.integers(-1, n_pid+2, n_g)
    cams = (rng.integers(0, n_cam, n_q),rng.integers(0, n_cam, n_g)) if draw(st.booleans()) else ()
    return q,g,q_pids,g_pids,cams,draw(st.integers(1,7))

def check_problem(p, distance):
    q,g,q_pids,g_pids,cams,chunk = p
    ref = plain_scores(exact_dist(q, g, distance), q_pids, g_pids, *cams)
    f = lambda **kw: evaluate(q.astype(np.float32), g.astype(np.float32), q_pids, g_pids, *cams, distance=distance, **kw)
    if not any(ref):
        with pytest.raises(NoMatchError): f()
        return
    res = f()
    check(res, ref)
    same(f(chunk=chunk), res)
    assert res.n_junk==(g_pids==-1).sum() and res.n_gallery==len(g)-res.n_junk and res.cameras==bool(cams)
    assert res.n_distractor==sum(p!=-1 and p not in q_pids for p in g_pids)

@settings(max_examples=200, deadline=None)
@given(problems())
def test_euclidean_ties(p): check_problem(p, 'euclidean')

@settings(max_examples=150, deadline=None)
@given(problems('cosine'))
def test_cosine_ties(p): check_problem(p, 'cosine')

def clustered(n_q=60, n_g=700, n_pid=12, width=16, noise=1., seed=0):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(n_pid+2,width))
    q_pids,g_pids = rng.integers(1, n_pid+1, n_q),rng.integers(-1, n_pid+1, n_g)
    emb = lambda p: (centre[p]+noise*rng.normal(size=(len(p),width))).astype(np.float32)
    return emb(q_pids),emb(g_pids),q_pids,g_pids,rng.integers(0,4,n_q),rng.integers(0,4,n_g)

@pytest.mark.parametrize('noise', [.3,1.,5.])
@pytest.mark.parametrize('distance', ['cosine','euclidean'])
def test_continuous(noise, distance):
    q,g,*ids = clustered(noise=noise)
    q64,g64 = q.astype(np.float64),g.astype(np.float64)
    d = ((q64[:,None]-g64[None])**2).sum(-1) if distance=='euclidean' else exact_dist(q, g, 'cosine')
    check(evaluate(q, g, *ids, distance=distance), plain_scores(d, *ids))

@pytest.mark.parametrize('spread', ['normal','heavy','two scales','few values','level','infinite'])
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64,torch.float16])
def test_match_ranks(spread, dtype):
    "The places alone, for distances that fall badly into buckets"
    torch.manual_seed(0)
    n_q,n_g = 30,3000
    d = torch.randn(n_q,n_g)
    if spread=='heavy': d = d**9
    if spread=='two scales': d = torch.where(torch.rand_like(d)<.5, d*1e-3, 1e4+d)
    if spread=='few values': d = (d*3).round()
    if spread=='level': d = torch.zeros_like(d)
    d = d.to(dtype).clamp(-6e4,6e4)
    q_pid,g_pid,q_cam,g_cam = torch.randint(40,(n_q,)),torch.randint(40,(n_g,)),torch.randint(3,(n_q,)),torch.randint(3,(n_g,))
    same,match = MatchIndex(q_pid, g_pid, q_cam, g_cam)[torch.arange(n_q)]
    if spread=='infinite': d[:,(torch.rand(n_g)<.3) & (g_pid>20)] = torch.inf
    ok = d.gather(1, same.clamp(min=0)).isfinite().logical_or(~match).all(1) & match.any(1)
    d,same,match,q_pid,q_cam = d[ok],same[ok],match[ok],q_pid[ok],q_cam[ok]
    before = d.clone()
    ranks,n_tied = match_ranks(d, same, match)
    assert torch.equal(d, before)
    ties = 0
    for i in range(len(d)):
        keep = np.array([j for j in range(n_g) if not (g_pid[j]==q_pid[i] and g_cam[j]==q_cam[i])])
        row = d[i].double().numpy()[keep]
        order = keep[np.argsort(row, kind='stable')]
        places = np.nonzero((g_pid[order]==q_pid[i]).numpy())[0]
        assert ranks[i][ranks[i]>=0].tolist() == places.tolist()
        ties += sum((row==d[i,order[p]].item()).sum()>1 for p in places)
    assert n_tied==ties

def test_match_ranks_refuses():
    same,match = tensor([[0,1]]),tensor([[True,False]])
    for bad in (tensor([[torch.nan,1,2]]),tensor([[1,torch.nan,2]]),tensor([[1,2,torch.nan]]),tensor([[torch.inf,1,2]]),tensor([[1,-torch.inf,2.]])):
        with pytest.raises(ValueError, match='finite'): match_ranks(bad, same, match)
    with pytest.raises(ValueError, match='a match for each row'): match_ranks(torch.rand(1,3), same, tensor([[False,False]]))

def test_chunks_agree():
    q,g,*ids = clustered()
    for c in (2,3,16,59,60,1000): same(evaluate(q, g, *ids, chunk=c), evaluate(q, g, *ids))
    assert evaluate(q, g, *ids, chunk=1).mAP == pytest.approx(evaluate(q, g, *ids).mAP, abs=1e-6)

def test_sklearn():
    ap = pytest.importorskip('sklearn.metrics').average_precision_score
    q,g,qp,gp,qc,gc = clustered(noise=2.)
    res = evaluate(q, g, qp, gp, qc, gc, distance='euclidean')
    for i in range(0,60,7):
        keep = (gp!=-1) & ~((gp==qp[i]) & (gc==qc[i]))
        assert ap(gp[keep]==qp[i], -((q[i]-g[keep])**2).sum(1)) == pytest.approx(res.ap[i].item(), abs=1e-6)

def test_kinds_of_input():
    "The same ids as lists, strings, series, tensors and floats; the same embeddings as arrays, in any float type"
    q,g,qp,gp,qc,gc = clustered()
    q,g = np.round(q*4)/4,np.round(g*4)/4
    want = evaluate(q, g, qp, gp, qc, gc)
    text = lambda x: [f'{o:04d}' for o in x]
    for f in (list, tensor, pd.Series, lambda x: x.astype(float), lambda x: [tensor(o) for o in x], lambda x: x.astype(object), lambda x: pd.Series(x).astype('category')):
        assert evaluate(q, g, *map(f, (qp,gp,qc,gc))).to_json()==want.to_json()
    s = evaluate(q, g, text(qp), [str(o) if o==-1 else f'{o:04d}' for o in gp], pd.Series(text(qc)), text(gc))
    assert s.to_json()==want.to_json()
    for f in (tensor, lambda x: tensor(x).half(), lambda x: tensor(x).bfloat16(), lambda x: x.astype(np.float16), lambda x: x.tolist(),
              lambda x: tensor(x).double(), lambda x: nn.Parameter(tensor(x)), lambda x: tensor(x).T.contiguous().T, lambda x: x[::-1].copy()[::-1]):
        assert evaluate(f(q), f(g), qp, gp, qc, gc).mAP == pytest.approx(want.mAP, abs=1e-9)
    with torch.autocast('cpu', torch.bfloat16): assert evaluate(q, g, qp, gp, qc, gc).to_json()==want.to_json()
    assert evaluate(np.round(q*4).astype(int), np.round(g*4).astype(int), qp, gp, qc, gc).n_query_valid==want.n_query_valid

def test_zero_vectors_and_scale():
    q,g,*ids = clustered()
    g[::5],q[3] = 0,0
    check(evaluate(q, g, *ids), plain_scores(exact_dist(q, g, 'cosine'), *ids))
    assert evaluate(q*1e-15, g*1e15, *ids).mAP == pytest.approx(evaluate(q, g, *ids).mAP, abs=1e-6)
    level = evaluate(np.zeros_like(q), np.zeros_like(g), *ids)
    check(level, plain_scores(np.zeros((len(q),len(g))), *ids))

def test_junk_pid():
    q,g,qp,gp,*cams = clustered()
    assert evaluate(q, g, qp, gp, *cams, junk_pid=None).n_junk==0
    renamed = evaluate(q, g, qp, np.where(gp==-1, 99, gp), *cams, junk_pid=99)
    assert renamed.to_json()==evaluate(q, g, qp, gp, *cams).to_json()
    with pytest.raises(NoMatchError, match='junk'): evaluate(q, g, qp, np.full(len(g), -1))
    with pytest.raises(NoMatchError): evaluate(q, g, np.full(len(q), -1), gp)

@pytest.mark.parametrize('change,says', [
    (dict(q=torch.zeros(2)), 'one embedding per row'), (dict(q=torch.zeros(0,3)), 'at least one'), (dict(g=torch.zeros(3,0)), 'at least one'),
    (dict(q=torch.zeros(2,4)), 'widths 4 .query. and 3'), (dict(qp=[1]), 'query_pids has 1 entries for 2'), (dict(gc=[1,2]), 'gallery_cams has 2'),
    (dict(gc=None), 'or neither'), (dict(qc=None), 'or neither'), (dict(gp=['1','2','3']), 'two kinds'), (dict(gp=[1,'2',3]), 'two kinds|mixes'),
    (dict(gp=[1,2,None]), 'missing'), (dict(qp=[1.,1.5]), 'fractional'), (dict(qp=[[1],[2]]), 'one dimension'),
    (dict(g=tensor([[1.,2,3],[torch.inf,0,0],[0,torch.nan,0]])), r'gallery_emb: 2 of 3 rows .* first at \[1, 2\]'),
    (dict(q=tensor([[1e30,0,0],[0,0,0]])), 'query_emb: 1 of 2'), (dict(distance='l1'), "'l1'"), (dict(ranks=0), 'from 1'), (dict(chunk=0), 'from 1')])
def test_errors(change, says):
    a = {**dict(q=torch.rand(2,3), g=torch.rand(3,3), qp=[1,2], gp=[1,2,3], qc=[1,1], gc=[2,2,2]), **change}
    with pytest.raises(ValueError, match=says): evaluate(*[a.pop(k) for k in ('q','g','qp','gp','qc','gc')], **a)

def test_result_round_trip(tmp_path):
    q,g,qp,gp,*cams = clustered()
    qp[4] = 77
    res = evaluate(q, g, qp, gp, *cams, about={'data set':'märket', 'flip':'none', 'size':(384,128)})
    json.loads(res.to_json(tmp_path/'r.json'), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))
    for src in (tmp_path/'r.json', str(tmp_path/'r.json'), res.to_json()):
        back = ReIDResult.from_json(src)
        assert back.to_json()==res.to_json() and back.ap.dtype==res.ap.dtype and back.ap[4].isnan()
    for s in ('märket','positions 4','59 of 60','left out','gallery order','cosine',f'{100*res.mAP:.2f} %'): assert s in repr(res)
    assert '<table' in res._repr_html_() and repr(pickle.loads(pickle.dumps(res)))==repr(res)
    assert res.rank10 == pytest.approx(res.cmc[9].item()) and evaluate(q, g, qp, gp, *cams, ranks=3).rank10==res.rank10

# whatever distances and ids come in

class Rows:
    "Nothing but `shape` and rows"
    def __init__(self, d): self.d,self.shape = d,d.shape
    def __getitem__(self, i): return self.d[i]

floats = {'float32':lambda d: torch.tensor(d).float(), 'float64':torch.tensor, 'float16':lambda d: torch.tensor(d).half(),
    'bfloat16':lambda d: torch.tensor(d).bfloat16(), 'parameter':lambda d: nn.Parameter(torch.tensor(d)),
    'strided':lambda d: torch.tensor(d).repeat_interleave(2, 1)[:,::2], 'transposed':lambda d: torch.tensor(d.T.copy()).T,
    'array':lambda d: d.astype(np.float32), 'half array':lambda d: d.astype(np.float16), 'big-endian':lambda d: d.astype('>f4'),
    'Fortran':np.asfortranarray, 'reversed':lambda d: d[::-1].copy()[::-1], 'lists':lambda d: d.tolist(), 'frame':pd.DataFrame,
    'rows':lambda d: Rows(torch.tensor(d)), 'rows of an array':Rows}
whole = {'int64':lambda d: torch.tensor(d).long(), 'int8':lambda d: torch.tensor(d).to(torch.int8), 'int array':lambda d: d.astype(np.int32)}
ids_as = {'numbers':lambda x: x, 'strings':lambda x: [str(o) for o in x], 'floats':lambda x: x.astype(float), 'tensor':tensor,
    'negative':lambda x: np.where(x==-1, -1, -2-x), 'huge':lambda x: np.where(x==-1, -1, 2**62+x)}

@st.composite
def matrices(draw):
    "Distances of all kinds, of whole values with ties up to all equal, with images out of reach, and junk of any distance"
    n_q,n_g = draw(st.sampled_from([1,2,5])),draw(st.sampled_from([1,2,9,30]))
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    kind,hi = draw(st.sampled_from([*floats,*whole])),draw(st.sampled_from([0,1,100]))
    n_pid,n_cam = draw(st.integers(1,4)),draw(st.integers(1,3))
    d,q,g = rng.integers(-hi, hi+1, (n_q,n_g)).astype(float),rng.integers(0, n_pid, n_q),rng.integers(draw(st.sampled_from([-1,0])), n_pid+1, n_g)
    if kind in floats:
        d[(rng.random(d.shape)<.2) & (q[:,None]!=g)] = np.inf
        d[:,g==-1] = rng.choice([np.nan,-np.inf,0])
    cams = (rng.integers(0, n_cam, n_q),rng.integers(0, n_cam, n_g)) if draw(st.booleans()) else ()
    return d,q,g,cams,kind,draw(st.sampled_from([*ids_as])),draw(st.integers(1,4))

@settings(max_examples=400, deadline=None)
@given(matrices())
def test_any_distances(p):
    d,q,g,cams,kind,ids,chunk = p
    ref,dist,f = plain_scores(d, q, g, *cams),{**floats,**whole}[kind](d),ids_as[ids]
    before,pids = pickle.dumps(dist),(f(q),f(g))
    run = lambda **kw: evaluate_distances(dist, *pids, *cams, **kw)
    if not any(ref):
        with pytest.raises(NoMatchError): run()
        return
    res = run()
    check(res, ref)
    assert pickle.dumps(dist)==before and res.n_junk==(g==-1).sum() and res.distance=='as given'
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        same(run(chunk=chunk), res)
    finally: torch.set_num_threads(n)

@pytest.mark.parametrize('bad', [np.nan,np.inf,-np.inf])
@pytest.mark.parametrize('at', [0,1])
def test_distances_that_are_none(bad, at):
    "A match must be within reach; others may be out of reach, and nothing is nearer than near"
    d = np.array([[1.,2,3]])
    d[0,at] = bad
    if at==1 and bad==np.inf: assert evaluate_distances(d, [1], [1,2,3]).mAP==1
    else:
        with pytest.raises(ValueError, match='finite'): evaluate_distances(d, [1], [1,2,3])

@pytest.mark.parametrize('shape', [(3,),(0,3),(2,0),(1,2,3)])
def test_a_matrix_is_wanted(shape):
    with pytest.raises(ValueError, match='a row per query'): evaluate_distances(np.zeros(shape), [1], [1])

def test_whole_numbers_are_not_rounded():
    for kind in (tensor,np.array): assert evaluate_distances(kind([[2**24+1,2**24]]), [1], [1,2]).mAP==.5

@pytest.mark.parametrize('ids', [np.array([2**64-1,5], np.uint64), np.array([1e300,2]), np.array([2**53,2**53+1], object), [2**70,2**70+1], np.array([1+2j,1+3j])])
def test_ids_too_large_are_kept_apart_or_refused(ids):
    try: q,_,uniq = id_codes(ids, ids)
    except ValueError: return
    assert q[0]!=q[1] and uniq[q].tolist()==list(ids)

def test_missing_ids():
    for missing in ([1,None],[1.,np.nan],['1',None],pd.Series([1,None], dtype='Int64'),pd.Series(['a',None])):
        for what in ('query_pids','query_cams'):
            with pytest.raises(ValueError, match=what): evaluate_distances(np.zeros((2,2)), **{**dict(query_pids=[1,2], gallery_pids=[1,2], query_cams=[1,2], gallery_cams=[3,4]), what:missing})

def test_a_gallery_of_one_person():
    "As many matches as images"
    d,cam = torch.randn(3,20_000),torch.arange(20_000)%4
    assert evaluate_distances(d, [7]*3, [7]*20_000, [0]*3, cam).mAP==1
    res = evaluate_distances(torch.zeros(3,20_000), [7]*3, [7]*20_000, [0]*3, cam)
    assert res.mAP==1 and res.n_tied==3*15_000 and res.first_rank.tolist()==[1]*3

def test_a_wide_gallery():
    "100,000 images, of which half are of the one person asked for"
    torch.manual_seed(0)
    d,pid = torch.randn(2,100_000).round(decimals=3),torch.arange(100_000)%2
    res = evaluate_distances(d, [1,1], pid)
    for i in range(2):
        hit = pid[d[i].argsort(stable=True)]==1
        assert res.ap[i].item()==pytest.approx((hit.cumsum(0)/torch.arange(1,100_001).double())[hit].mean().item(), abs=1e-9)

@pytest.mark.parametrize('dtype', ['<f4','>f4','<f2'])
@pytest.mark.parametrize('layout', ['rows','every other','Fortran'])
def test_mapped_files(tmp_path, dtype, layout):
    q,g,*ids = clustered(n_g=90)
    g,d = np.round(g*4).astype(dtype),np.round(((q[:,None]-g)**2).sum(-1)).clip(0,6e4).astype(dtype)
    def mapped(x, name):
        if layout=='every other': x = np.repeat(x, 2, axis=0)
        np.save(tmp_path/name, np.asfortranarray(x) if layout=='Fortran' else x)
        return np.load(tmp_path/name, mmap_mode='r')[::2 if layout=='every other' else 1]
    m = mapped(d, 'd.npy')
    assert isinstance(m, np.memmap) and not m.flags.writeable
    check(evaluate_distances(m, *ids, chunk=7), plain_scores(d.astype(float), *ids))
    assert evaluate(np.round(q*4), mapped(g, 'g.npy'), *ids, distance='euclidean').to_json()==evaluate(np.round(q*4), g.astype(np.float32), *ids, distance='euclidean').to_json()

def test_embeddings_are_left_alone():
    q,g,*ids = (torch.from_numpy(o) for o in clustered())
    before = q.clone(),g.clone(),[o.clone() for o in ids]
    for distance in ('cosine','euclidean'): evaluate(q, g, *ids, distance=distance)
    assert torch.equal(q, before[0]) and torch.equal(g, before[1]) and all(map(torch.equal, ids, before[2]))

bounded = """
import sys,threading,numpy as np,torch
from pyramidreid.evaluation.retrieval import Distances,evaluate,evaluate_distances
from pyramidreid.evaluation.protocols import evaluate_cameras,evaluate_single_shot
assert 'fastai' not in sys.modules and not torch.cuda.is_initialized()
def rss(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))/1024
def grown(f):
    "Peak of anonymous memory during `f`, MB beyond what there was"
    start,peak,done = rss(),[0],threading.Event()
    def watch():
        while not done.wait(.002): peak[0] = max(peak[0], rss())
    t = threading.Thread(target=watch); t.start()
    res = f()
    done.set(); t.join()
    return round(peak[0]-start),res
g,pid = np.load(sys.argv[1], mmap_mode='r'),np.arange(60_000)%1500
q = np.array(g[:30])
f = lambda e: evaluate(q, e, pid[:30], pid[:len(e)], distance='euclidean')
f(g[:100])
a,res = grown(lambda: f(g))
assert res.rank1==1
cloud = np.random.default_rng(0).standard_normal((100_000,8))
d = Distances(cloud[:24], cloud, 'euclidean')
evaluate_distances(Distances(cloud[:3], cloud[:9], 'euclidean'), [1]*3, [1]*9)
b,res = grown(lambda: evaluate_distances(d, [1]*24, np.ones(100_000, int)))
assert res.mAP==1
print(a,b,torch.cuda.is_initialized())
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads RssAnon')
def test_bounded_memory(tmp_path):
    """A mapped gallery of 123 MB, 246 in float32, takes a block of 32 MB and its squares; and where 24 queries have
    100,000 matches each, the tables of matches, 19 MB apiece for all queries and some twenty of them, are never there at once"""
    g = np.lib.format.open_memmap(tmp_path/'g.npy', 'w+', np.float16, (60_000,1024))
    g[:] = np.tile(np.random.default_rng(0).standard_normal((1500,1024), np.float32), (40,1))
    g.flush()
    out = subprocess.run([sys.executable, '-c', bounded, tmp_path/'g.npy'], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'})
    assert out.returncode==0, out.stderr
    mapped,matches,cuda = out.stdout.split()
    assert int(mapped)<150 and int(matches)<200 and cuda=='False', out.stdout

# in training

class Embed(nn.Module):
    "A pair in training, the embedding in evaluation, as the pyramid does"
    def __init__(self): super().__init__(); self.lin = nn.Linear(6,4)
    def forward(self, x): return (self.lin(x),x) if self.training else self.lin(x)

def zero_loss(pred, targ): return (pred[0] if isinstance(pred, tuple) else pred).square().mean()

class Points(TensorDataset):
    def new_empty(self): return Points(*[t[:0] for t in self.tensors])

def tiny(n=60, bs=16, cams=True, junk=False, metrics=(mAP,rank1,rank5), **kwargs):
    torch.manual_seed(0)
    label,cam,role = torch.arange(n)%6,torch.randint(3,(n,)) if cams else torch.full((n,),-1),torch.where(torch.arange(n)<n//3, Role.QUERY, Role.GALLERY)
    if junk: label[-5:] = -1
    x,y = torch.randn(6,6)[label]+.8*torch.randn(n,6),torch.stack([label,cam,role], 1)
    dls = DataLoaders(DataLoader(Points(x,y), bs=bs, shuffle=True), DataLoader(Points(x,y), bs=bs))
    return Learner(dls, Embed(), loss_func=zero_loss, metrics=list(metrics), **kwargs),x,y

def direct(learn, x, y):
    learn.model.eval()
    with torch.no_grad(): e = learn.model(x)
    q,g = y[:,2]==Role.QUERY,y[:,2]==Role.GALLERY
    cams = (y[q,1],y[g,1]) if (y[:,1]>=0).any() else ()
    return evaluate(e[q], e[g], y[q,0], y[g,0], *cams)

@pytest.mark.parametrize('bs', [16,60,64])
@pytest.mark.parametrize('cams,junk', [(True,False),(False,True)])
def test_metrics(bs, cams, junk, monkeypatch):
    import pyramidreid.training.metrics as ev
    runs = []
    monkeypatch.setattr(ev, 'evaluate', lambda *a,**k: runs.append(k) or evaluate(*a,**k))
    learn,x,y = tiny(bs=bs, cams=cams, junk=junk)
    with learn.no_logging():
        for i in range(3):
            got,want = learn.validate()[1:],direct(learn, x, y)
            assert list(got) == [want.mAP,want.rank1,want.rank5] and len(runs)==i+1
            learn.model.lin.weight.data.copy_(torch.randn(4,6))
        learn.fit(2)
        assert len(runs)==5
        want = direct(learn, x, y)
        assert list(learn.recorder.values[-1][2:]) == [want.mAP,want.rank1,want.rank5]
    p = ev._passes[learn]['cosine']
    assert not p.emb and p.last is None

def test_save_model(tmp_path):
    learn,x,y = tiny(path=tmp_path)
    with learn.no_logging(): learn.fit(3, .1, cbs=SaveModelCallback(monitor='mAP', fname='best'))
    best = max(v[2] for v in learn.recorder.values)
    assert direct(learn.load('best'), x, y).mAP == pytest.approx(best)

def test_partial_validation():
    learn,x,y = tiny()
    with learn.no_logging():
        learn.fit(1, cbs=ShortEpochCallback(pct=.1))
        _,a,b,c = learn.validate(dl=DataLoader(TensorDataset(x[:10],y[:10]), bs=4))
        assert all(map(math.isnan, (a,b,c)))
        alone = y.clone(); alone[:,0] = torch.arange(len(y))
        assert math.isnan(learn.validate(dl=DataLoader(TensorDataset(x,alone), bs=4))[1])
        assert learn.validate()[1] == direct(learn, x, y).mAP
        learn.model.lin.weight.data.fill_(torch.nan)
        with pytest.warns(UserWarning, match='NaN'): assert math.isnan(learn.validate()[1])
    assert math.isnan(mAP().value)

def test_two_distances_and_train_metrics():
    learn,x,y = tiny(metrics=[mAP, mAP('euclidean')])
    with learn.no_logging():
        _,a,b = learn.validate()
        assert a==direct(learn, x, y).mAP and a!=b
        learn.recorder.train_metrics = True
        learn.fit(1)
        assert math.isnan(learn.recorder.values[-1][1])

def test_export(tmp_path):
    learn,x,y = tiny(path=tmp_path)
    with learn.no_logging(): learn.fit(1)
    learn.export('a.pkl')
    back = load_learner(tmp_path/'a.pkl')
    assert [m.name for m in back.metrics]==['mAP','rank1','rank5']
    assert b'targ' not in pickle.dumps(learn.metrics[0]) and set(learn.metrics[0].__getstate__())=={'distance'}
