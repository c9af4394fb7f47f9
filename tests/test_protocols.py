"Pairs of cameras against `plain_scores` of each part, and single gallery shots against every gallery that could be drawn"
import itertools
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_scores
from torch import tensor

from pyramidreid.evaluation.protocols import *
from pyramidreid.evaluation.retrieval import *


@st.composite
def rankings(draw, max_g=25):
    "Distances with ties, few people, few cameras, junk and distractors"
    n_q,n_g = draw(st.integers(1,6)),draw(st.integers(1,max_g))
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    n_pid,n_cam,hi = draw(st.integers(1,4)),draw(st.integers(1,4)),draw(st.sampled_from([1,5,100]))
    return (rng.integers(0, hi, (n_q,n_g)).astype(np.float32), rng.integers(0, n_pid, n_q), rng.integers(-1, n_pid+1, n_g),
            rng.integers(0, n_cam, n_q), rng.integers(0, n_cam, n_g))

# pairs of cameras

def plain_cameras(d, qp, gp, qc, gc):
    res = {}
    for a,b in itertools.product(sorted({*qc}), sorted({*gc})):
        q,g = np.nonzero(qc==a)[0],np.nonzero(gc==b)[0]
        found = [r for r in plain_scores(d[q][:,g], qp[q], gp[g], qc[q], gc[g]) if r]
        if found: res[a,b] = (len(found), 100*np.mean([r['ap'] for r in found]), 100*np.mean([r['first']==1 for r in found]))
    return res

@settings(max_examples=150, deadline=None)
@given(rankings(), st.sampled_from(['numbers','strings','tensors','floats']), st.integers(1,4))
def test_every_cell(p, kind, chunk):
    d,qp,gp,qc,gc = p
    f = {'numbers':lambda x: x, 'strings':lambda x: np.array([f'c{o}' for o in x]), 'tensors':tensor, 'floats':lambda x: x.astype(float)}[kind]
    want = plain_cameras(d, qp, gp, qc, gc)
    if not want:
        with pytest.raises(NoMatchError): evaluate_cameras(d, qp, gp, f(qc), f(gc))
        return
    before = d.copy()
    res = evaluate_cameras(d, qp, gp, f(qc), f(gc))
    assert res.equals(evaluate_cameras(torch.from_numpy(d), qp, gp, f(qc), f(gc), chunk=chunk)) and np.array_equal(d, before)
    got = {((r.query_cam,r.gallery_cam) if kind!='strings' else (int(r.query_cam[1:]),int(r.gallery_cam[1:]))):(r.queries,r.mAP,r['rank-1']) for _,r in res.iterrows()}
    assert got.keys()==want.keys()
    for k in want: assert got[k]==pytest.approx(want[k], abs=.0051)

def test_cells_are_those_of_evaluate():
    torch.manual_seed(0)
    q,g = torch.randn(40,8),torch.randn(300,8)
    qp,gp,qc,gc = torch.randint(9,(40,)),torch.randint(-1,12,(300,)),torch.randint(3,(40,)),torch.randint(4,(300,))
    res = evaluate_cameras(Distances(q, g), qp, gp, qc, gc)
    assert [*zip(res.query_cam, res.gallery_cam)]==[(a,b) for a in range(3) for b in range(4) if a!=b]
    for r in res.itertuples():
        a,b = qc==r.query_cam,gc==r.gallery_cam
        card = evaluate(q[a], g[b], qp[a], gp[b], qc[a], gc[b])
        assert (r.queries,r.mAP)==(card.n_query_valid,pytest.approx(100*card.mAP, abs=.0051))

def test_cameras_of_every_size():
    "A camera with one image, one without a query, one without a match, and one of junk alone"
    d,gp,gc = np.array([[.1,.2,.3,.4,.5]]*2),[1,2,1,9,-1],['hall','roof','roof','yard','lift']
    res = evaluate_cameras(d, [1,2], gp, ['door','door'], gc)
    assert res.values.tolist()==[['door','hall',1,100.,100.],['door','roof',2,75.,50.]]
    assert evaluate_cameras(d[:,:1], [1,2], [1], [0,0], [1]).values.tolist()==[[0,1,1,100,100]]
    assert evaluate_cameras(d.tolist(), pd.Series([1,2]), gp, pd.Series(['door']*2).astype('category'), gc).equals(res)

def test_camera_errors():
    d,ids = np.zeros((2,2)),([1,2],[1,2])
    with pytest.raises(ValueError, match='need query_cams'): evaluate_cameras(d, *ids, None, None)
    with pytest.raises(ValueError, match='or neither'): evaluate_cameras(d, *ids, [1,2], None)
    with pytest.raises(ValueError, match='query_cams mixes'): evaluate_cameras(d, *ids, ['a',None], ['a','b'])
    with pytest.raises(ValueError, match='query_cams holds missing'): evaluate_cameras(d, *ids, [1,None], [1,2])
    with pytest.raises(NoMatchError, match="own camera"): evaluate_cameras(d, *ids, [1,1], [1,1])
    with pytest.raises(ValueError, match='finite'): evaluate_cameras(d*np.nan, *ids, [1,1], [2,2])
    with pytest.raises(ValueError, match='a row per query'): evaluate_cameras(d[0], *ids, [1,1], [2,2])

# a single gallery shot

def plain_single_shot(d, qp, gp, qc=None, gc=None):
    "Per query the share of each place, 0 = first, over all galleries of one image per person that could be drawn; None without a match"
    res = []
    for i in range(len(d)):
        shots = {}
        for j in range(len(gp)):
            if gp[j]!=-1 and (qc is None or gc[j]!=qc[i]): shots.setdefault(gp[j], []).append(j)
        if qp[i] not in shots: res.append(None); continue
        places,draws = Counter(),[*itertools.product(*shots.values())]
        for draw in draws:
            right = next(j for j in draw if gp[j]==qp[i])
            places[sum((d[i][j],j)<(d[i][right],right) for j in draw)] += 1/len(draws)
        res.append(places)
    return res

@settings(max_examples=40, deadline=None)
@given(rankings(max_g=9), st.booleans())
def test_single_shot_is_the_mean_over_all_draws(p, cameras):
    d,qp,gp,*cams = p
    cams = cams if cameras else ()
    want = plain_single_shot(d, qp, gp, *cams)
    found = [p for p in want if p]
    if not found:
        with pytest.raises(NoMatchError): evaluate_single_shot(d, qp, gp, *cams)
        return
    before = d.copy()
    res = evaluate_single_shot(d, qp, gp, *cams, trials=2000, ranks=4)
    assert np.array_equal(d, before) and (res.n_query_valid,res.cameras)==(len(found),cameras)
    assert res.n_ids==len({*gp}-{-1})
    np.testing.assert_allclose(res.cmc, [np.mean([sum(v for r,v in p.items() if r<=k) for p in found]) for k in range(4)], atol=.06)
    assert res.mAP==pytest.approx(np.mean([sum(v/(r+1) for r,v in p.items()) for p in found]), abs=.06)
    sure = [k for k in range(4) if all(any(abs(sum(v for r,v in p.items() if r<=k)-o)<1e-9 for o in (0,1)) for p in found)]
    assert (res.std[sure]==0).all()

def test_single_shot_without_a_choice_is_the_whole_gallery():
    "One image of each person"
    torch.manual_seed(0)
    d,q = torch.randn(50,80).round(decimals=1),torch.randint(80,(50,))
    one,whole = evaluate_single_shot(d, q, torch.arange(80), trials=3),evaluate_distances(d, q, torch.arange(80))
    assert torch.allclose(one.cmc, whole.cmc) and one.mAP==pytest.approx(whole.mAP) and not one.std.any()

def test_draws_are_even():
    "Each of a person's images is drawn as often as another"
    d = torch.arange(12.)[None]
    res = evaluate_single_shot(d, [0], [1]*6+[0]+[1]*5, trials=20_000)
    assert res.cmc[0].item()==pytest.approx(5/11, abs=.02) and res.std[0].item()==pytest.approx((5*6)**.5/11, abs=.01)

def test_one_s_own_camera_is_not_drawn_from():
    d = [[.1,.2,.3,.9]]
    res = evaluate_single_shot(d, ['a'], ['a','b','b','a'], ['x'], ['x','x','y','y'], trials=1)
    assert (res.rank1,res.mAP,res.trials,res.std[0])==(0,.5,1,0)
    assert evaluate_single_shot(d, ['a'], ['a','b','b','a'], ['x'], ['x','x','x','y'], trials=20).rank1==1
    with pytest.raises(NoMatchError, match='own camera'): evaluate_single_shot(d, ['a'], ['a','b','b','a'], ['x'], ['x','y','y','x'])
    two = evaluate_single_shot(d*2, ['a','b'], ['a','b','b','c'], ['x','x'], ['x','x','y','y'])
    assert (two.n_query,two.n_query_valid)==(2,1)

def test_seeds_and_chunks(monkeypatch):
    torch.manual_seed(0)
    d,ids = torch.randn(60,200),(torch.randint(9,(60,)),torch.randint(9,(200,)),torch.randint(3,(60,)),torch.randint(3,(200,)))
    a = evaluate_single_shot(d, *ids)
    state = torch.get_rng_state()
    assert evaluate_single_shot(d, *ids).to_json()==a.to_json()==evaluate_single_shot(d.numpy(), *ids).to_json()
    assert evaluate_single_shot(d, *ids, seed=1).mAP!=a.mAP and torch.equal(state, torch.get_rng_state())
    rows = [evaluate_single_shot(d[i:i+1], *[o[i:i+1] if j in (0,2) else o for j,o in enumerate(ids)]).mAP for i in range(3)]
    assert rows==[evaluate_single_shot(d[[i]*2], ids[0][[i]*2], ids[1], ids[2][[i]*2], ids[3]).mAP for i in range(3)]

@pytest.mark.parametrize('bad', [np.nan,-np.inf])
def test_single_shot_refuses_what_is_no_distance(bad):
    with pytest.raises(ValueError, match='NaN'): evaluate_single_shot([[bad,1.]], [1], [1,2])
    with pytest.raises(ValueError, match='NaN'): evaluate_single_shot([[1.,bad]], [1], [1,2])
    with pytest.raises(ValueError, match='infinitely far'): evaluate_single_shot([[np.inf,1.]], [1], [1,2])
    assert evaluate_single_shot([[1.,np.inf,bad]], [1], [1,2,-1]).rank1==1

def test_single_shot_errors():
    d,ids = np.zeros((1,2)),([1],[1,2])
    for kw in (dict(trials=0),dict(ranks=0)):
        with pytest.raises(ValueError, match='from 1 on'): evaluate_single_shot(d, *ids, **kw)
    with pytest.raises(ValueError, match='a row per query'): evaluate_single_shot(d[0], *ids)
    with pytest.raises(NoMatchError, match='junk'): evaluate_single_shot(d, [1], [-1,-1])
    res = evaluate_single_shot(d, *ids, ranks=3)
    assert res.rank(3)==1 and list(res.figures())==['rank-1','mAP (one match: mean of 1/place)']
    for k in (0,4):
        with pytest.raises(ValueError, match='goes from 1 to 3'): res.rank(k)

def test_about_and_distance_of_the_card():
    dist = Distances(torch.rand(2,3), torch.rand(4,3), 'euclidean')
    dist.about = {'data':'two', 'flip':'none'}
    res = evaluate_single_shot(dist, [1,2], [1,2,1,2], about={'data':'mine'}, trials=7, seed=3)
    assert res.distance=='euclidean' and res.about=={'data':'mine', 'flip':'none'}
    for s in ('7 trials, seed 3','2 of 2','cameras unknown','mine'): assert s in repr(res)
