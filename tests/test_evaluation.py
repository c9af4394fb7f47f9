"`evaluate` against a reference written for reading, and the metrics in fastai's training loop"
import json,math,pickle
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from torch.utils.data import TensorDataset
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from pyramidreid.core import Role
from pyramidreid.card import *
from pyramidreid.evaluation import *
from pyramidreid.metrics import *
from pyramidreid.ranking import *

def reference(dist, q_pids, g_pids, q_cams=None, g_cams=None, junk_pid=-1):
    "Per query a dict of the four scores, or None without a match: sort, walk down, count"
    res = []
    for i,row in enumerate(dist):
        hits = []
        for j in np.argsort(row, kind='stable'):
            if g_pids[j]==junk_pid: continue
            same = g_pids[j]==q_pids[i]
            if same and q_cams is not None and g_cams[j]==q_cams[i]: continue
            hits.append(bool(same))
        if not any(hits): res.append(None); continue
        n_match,found,ap,trapezoid,before = sum(hits),0,0.,0.,1.
        for place,hit in enumerate(hits, 1):
            found += hit
            precision = found/place
            if hit:
                ap += precision/n_match
                trapezoid += (before+precision)/2/n_match
                last = place
            before = precision
        res.append(dict(ap=ap, trapezoid=trapezoid, inp=n_match/last, first=hits.index(True)+1))
    return res

def check(res, ref, ranks=50):
    valid = [r for r in ref if r]
    mean = lambda k: np.mean([r[k] for r in valid])
    np.testing.assert_allclose([res.mAP,res.mAP_trapezoid,res.mINP], [mean('ap'),mean('trapezoid'),mean('inp')], atol=1e-12)
    np.testing.assert_allclose(res.ap, [r['ap'] if r else np.nan for r in ref], atol=1e-12)
    assert res.first_rank.tolist() == [r['first'] if r else 0 for r in ref]
    np.testing.assert_allclose(res.cmc, [np.mean([r['first']<=k for r in valid]) for k in range(1,ranks+1)], atol=1e-7)
    assert (res.n_query,res.n_query_valid) == (len(ref),len(valid))

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
    ref = reference(exact_dist(q, g, distance), q_pids, g_pids, *cams)
    f = lambda **kw: evaluate(q.astype(np.float32), g.astype(np.float32), q_pids, g_pids, *cams, distance=distance, **kw)
    if not any(ref):
        with pytest.raises(NoMatchError): f()
        return
    res = f()
    check(res, ref)
    assert res.to_json()==f(chunk=chunk).to_json()
    assert res.n_junk==(g_pids==-1).sum() and res.n_gallery==len(g)-res.n_junk and res.cameras==bool(cams)
    assert res.n_distractor==sum(p!=-1 and p not in q_pids for p in g_pids)

@settings(max_examples=300, deadline=None)
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
    check(evaluate(q, g, *ids, distance=distance), reference(d, *ids))

@pytest.mark.parametrize('spread', ['normal','heavy','two scales','few values','level','infinite'])
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64,torch.float16])
def test_match_ranks(spread, dtype):
    "The places alone, for distances that fall badly into buckets"
    torch.manual_seed(0)
    n_q,n_g = 50,3000
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
    assert len({evaluate(q, g, *ids, chunk=c).to_json() for c in (2,3,16,59,60,1000,None)})==1
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
    check(evaluate(q, g, *ids), reference(exact_dist(q, g, 'cosine'), *ids))
    assert evaluate(q*1e-15, g*1e15, *ids).mAP == pytest.approx(evaluate(q, g, *ids).mAP, abs=1e-6)
    level = evaluate(np.zeros_like(q), np.zeros_like(g), *ids)
    check(level, reference(np.zeros((len(q),len(g))), *ids))

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
    import pyramidreid.metrics as ev
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
