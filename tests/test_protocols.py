"Pairs of cameras against `plain_scores` of each pair, single gallery shots against every possible gallery"
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
from toys import random_exclusions

from pyramidreid.evaluation.distances import Distances
from pyramidreid.evaluation.protocols import *
from pyramidreid.evaluation.retrieval import *


@st.composite
def rankings(draw, max_gallery=25):
    "Distances with ties, few people, few cameras, junk and distractors: distances, pids and cameras of both"
    n_query,n_gallery = draw(st.integers(1,6)),draw(st.integers(1,max_gallery))
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    n_pids,n_cams,n_values = draw(st.integers(1,4)),draw(st.integers(1,4)),draw(st.sampled_from([1,5,100]))
    return (rng.integers(0, n_values, (n_query,n_gallery)).astype(np.float32),
            rng.integers(0, n_pids, n_query), rng.integers(-1, n_pids+1, n_gallery),
            rng.integers(0, n_cams, n_query), rng.integers(0, n_cams, n_gallery))

def random_ids(n_query, n_gallery):
    "Person and camera ids without structure: query pids, gallery pids, query cameras, gallery cameras"
    return (torch.randint(9, (n_query,)), torch.randint(9, (n_gallery,)),
            torch.randint(3, (n_query,)), torch.randint(3, (n_gallery,)))

# pairs of cameras

def plain_cameras(dist, query_pids, gallery_pids, query_cams, gallery_cams, gallery='camera', mask=None):
    "`{(query camera, gallery camera): (queries, images, mAP, rank-1, trapezoidal mAP)}` for pairs with a match"
    res = {}
    mask = np.zeros(dist.shape, bool) if mask is None else mask
    for a,b in itertools.product(sorted({*query_cams}), sorted({*gallery_cams})):
        q,g = query_cams==a,gallery_cams==b
        left_out = mask[q]
        if gallery=='all':
            left_out = left_out | ((query_pids[q][:,None]==gallery_pids) & ~g)
            g = np.ones(len(gallery_pids), bool)
        scores = plain_scores(dist[q][:,g], query_pids[q], gallery_pids[g], query_cams[q], gallery_cams[g],
                              mask=left_out[:,g])
        scores = [s for s in scores if s]
        if not scores: continue
        mAP,trapezoid = [100*np.mean([s[name] for s in scores]) for name in ('ap','trapezoid')]
        rank1 = 100*np.mean([s['first']==1 for s in scores])
        res[a,b] = len(scores),(gallery_pids[g]!=-1).sum(),mAP,rank1,trapezoid
    return res

CAMERA_IDS = {'numbers':lambda x: x, 'strings':lambda x: np.array([f'c{o}' for o in x]), 'tensors':tensor,
              'floats':lambda x: x.astype(float)}

@settings(max_examples=150, deadline=None)
@given(rankings(), st.sampled_from([*CAMERA_IDS]), st.integers(1,4), st.sampled_from(['camera','all']), st.booleans())
def test_every_pair(problem, kind, chunk, gallery, masked):
    dist,query_pids,gallery_pids,*cams = problem
    ids = query_pids,gallery_pids,*map(CAMERA_IDS[kind], cams)
    options = dict(gallery=gallery, mask=np.random.default_rng(0).random(dist.shape)<.3 if masked else None)
    want = plain_cameras(dist, query_pids, gallery_pids, *cams, **options)
    if not want:
        with pytest.raises(NoMatchError): evaluate_cameras(dist, *ids, **options)
        return
    before = dist.copy()
    res = evaluate_cameras(dist, *ids, **options)
    assert res.equals(evaluate_cameras(torch.from_numpy(dist), *ids, chunk=chunk, **options))
    assert np.array_equal(dist, before)
    def number(cam): return int(cam[1:]) if kind=='strings' else cam
    got = {(number(query_cam),number(gallery_cam)): row for query_cam,gallery_cam,*row in res.values.tolist()}
    assert got.keys()==want.keys()
    for k in want: assert got[k]==pytest.approx(want[k], abs=.0051)

def test_pairs_among_the_camera_s_images_or_among_all():
    "By hand: Ann's image from the hall is behind a stranger in the hall, one on the roof, and her own from the roof"
    dist,pids,cams = [[.1,.2,.3,.4]],['bob','ann','eve','ann'],['roof','roof','hall','hall']
    def cells(**kwargs): return evaluate_cameras(dist, ['ann'], pids, ['door'], cams, **kwargs)
    alone,among_all = cells(),cells(gallery='all')
    columns = ['query_cam','gallery_cam','queries','images','mAP','rank-1','mAP (trapezoid)']
    assert list(alone.columns)==list(among_all.columns)==columns
    assert alone.values.tolist()==[['door','hall',1,2,50.,0.,25.], ['door','roof',1,2,50.,0.,25.]]
    assert among_all.values.tolist()==[['door','hall',1,4,33.33,0.,16.67], ['door','roof',1,4,50.,0.,25.]]
    assert 'images of its gallery camera alone' in alone.attrs['gallery']
    assert 'the whole gallery' in among_all.attrs['gallery']
    assert "that camera alone" in evaluate_cameras.__doc__ and "gallery='all'" in evaluate_cameras.__doc__
    with pytest.raises(ValueError, match="'camera' or 'all', not 'whole'"): cells(gallery='whole')

def test_pairs_leave_out_the_query_itself_and_other_keys():
    torch.manual_seed(0)
    dist = torch.rand(30,90)
    query_pids,gallery_pids = torch.randint(5, (30,)),torch.randint(5, (90,))
    cams = torch.randint(3, (30,)),torch.randint(3, (90,))
    images,keys = (torch.arange(30),torch.randint(90, (90,))),(torch.randint(2, (30,)),torch.randint(2, (90,)))
    def equal(pair): return pair[0][:,None]==pair[1]
    mask = equal(images) | (equal(keys) & (query_pids[:,None]==gallery_pids))
    for gallery in ('camera','all'):
        got = evaluate_cameras(dist, query_pids, gallery_pids, *cams, gallery=gallery, query_images=images[0],
                               gallery_images=images[1], query_keys=keys[0], gallery_keys=keys[1])
        assert got.equals(evaluate_cameras(dist, query_pids, gallery_pids, *cams, gallery=gallery, mask=mask))

def test_pairs_are_those_of_evaluate():
    torch.manual_seed(0)
    q,g = torch.randn(40,8),torch.randn(300,8)
    query_pids,gallery_pids = torch.randint(9, (40,)),torch.randint(-1, 12, (300,))
    query_cams,gallery_cams = torch.randint(3, (40,)),torch.randint(4, (300,))
    res = evaluate_cameras(Distances(q, g), query_pids, gallery_pids, query_cams, gallery_cams)
    assert [*zip(res.query_cam, res.gallery_cam)]==[(a,b) for a in range(3) for b in range(4) if a!=b]
    for row in res.itertuples():
        a,b = query_cams==row.query_cam,gallery_cams==row.gallery_cam
        card = evaluate(q[a], g[b], query_pids[a], gallery_pids[b], query_cams[a], gallery_cams[b])
        assert (row.queries,row.mAP)==(card.n_query_valid,pytest.approx(100*card.mAP, abs=.0051))

def test_unusual_cameras():
    "A camera with one image, one without a query, one without a match, and one with only junk"
    dist = np.array([[.1,.2,.3,.4,.5]]*2)
    gallery_pids,gallery_cams = [1,2,1,9,-1],['hall','roof','roof','yard','lift']
    res = evaluate_cameras(dist, [1,2], gallery_pids, ['door','door'], gallery_cams)
    assert res.values.tolist()==[['door','hall',1,1,100.,100.,100.],['door','roof',2,2,75.,50.,62.5]]
    query_cams = pd.Series(['door']*2).astype('category')
    assert evaluate_cameras(dist.tolist(), pd.Series([1,2]), gallery_pids, query_cams, gallery_cams).equals(res)
    one_image = evaluate_cameras(dist[:,:1], [1,2], [1], [0,0], [1])
    assert one_image.values.tolist()==[[0,1,1,1,100,100,100]]

def test_camera_errors():
    dist,pids = np.zeros((2,2)),([1,2],[1,2])
    with pytest.raises(ValueError, match='need query_cams'): evaluate_cameras(dist, *pids, None, None)
    with pytest.raises(ValueError, match='or neither'): evaluate_cameras(dist, *pids, [1,2], None)
    with pytest.raises(ValueError, match='query_cams mixes'): evaluate_cameras(dist, *pids, ['a',None], ['a','b'])
    with pytest.raises(ValueError, match='query_cams holds missing'): evaluate_cameras(dist, *pids, [1,None], [1,2])
    with pytest.raises(NoMatchError, match="own camera"): evaluate_cameras(dist, *pids, [1,1], [1,1])
    with pytest.raises(ValueError, match='finite'): evaluate_cameras(dist*np.nan, *pids, [1,1], [2,2])
    with pytest.raises(ValueError, match='a row per query'): evaluate_cameras(dist[0], *pids, [1,1], [2,2])

# single gallery shot

def plain_single_shot(dist, query_pids, gallery_pids, query_cams=None, gallery_cams=None, left_out=None):
    """Per query the probability of each rank of its match, 0 = first, over all galleries of one image per person
    that could be drawn; None without a match"""
    res = []
    for i,row in enumerate(dist):
        images = {}
        for j,pid in enumerate(gallery_pids):
            if pid==-1 or (query_cams is not None and gallery_cams[j]==query_cams[i]): continue
            if left_out is not None and left_out[i][j]:
                if pid==query_pids[i]: continue
                row = [*row[:j],np.inf,*row[j+1:]] # drawn, but not ranked
            images.setdefault(pid, []).append(j)
        res.append(rank_probabilities(row, images, query_pids[i]) if query_pids[i] in images else None)
    return res

def rank_probabilities(row, images, pid):
    "The probability of each rank of the image of `pid` if one of each person's `images` is drawn"
    probability,galleries = Counter(),[*itertools.product(*images.values())]
    for gallery in galleries:
        match = next(j for j in gallery if j in images[pid])
        rank = sum((row[j],j)<(row[match],match) for j in gallery)
        probability[rank] += 1/len(galleries)
    return probability

def up_to(probability, k): return sum(p for rank,p in probability.items() if rank<=k)

@settings(max_examples=40, deadline=None)
@given(rankings(max_gallery=9), st.booleans())
def test_single_shot_is_the_mean_over_all_galleries(problem, with_cameras):
    dist,query_pids,gallery_pids,*cams = problem
    ids = query_pids,gallery_pids,*(cams if with_cameras else ())
    want = [p for p in plain_single_shot(dist, *ids) if p]
    if not want:
        with pytest.raises(NoMatchError): evaluate_single_shot(dist, *ids)
        return
    before = dist.copy()
    res = evaluate_single_shot(dist, *ids, trials=2000, ranks=4)
    assert np.array_equal(dist, before)
    assert (res.n_query_valid,res.cameras)==(len(want),with_cameras)
    assert res.n_ids==len({*gallery_pids}-{-1})
    np.testing.assert_allclose(res.cmc, [np.mean([up_to(p, k) for p in want]) for k in range(4)], atol=.06)
    mAP = np.mean([sum(p/(rank+1) for rank,p in probability.items()) for probability in want])
    assert res.mAP==pytest.approx(mAP, abs=.06)
    def is_certain(p): return min(abs(p), abs(1-p))<1e-9
    for k in range(4):
        if all(is_certain(up_to(p, k)) for p in want): assert res.std[k]==0

@settings(max_examples=40, deadline=None)
@given(rankings(max_gallery=9), st.booleans(), st.sampled_from(['mask','inf','keys','images']))
def test_single_shot_with_images_left_out(problem, with_cameras, by):
    dist,query_pids,gallery_pids,*cams = problem
    ids = query_pids,gallery_pids,*(cams if with_cameras else ())
    left_out,options = random_exclusions(by, dist, query_pids, gallery_pids)
    want = [p for p in plain_single_shot(dist, *ids, *(() if with_cameras else (None,None)), left_out) if p]
    if by=='inf': dist = np.where(left_out, np.inf, dist)
    if not want:
        with pytest.raises(NoMatchError): evaluate_single_shot(dist, *ids, **options)
        return
    res = evaluate_single_shot(dist, *ids, trials=2000, ranks=4, **options)
    assert res.n_query_valid==len(want)
    np.testing.assert_allclose(res.cmc, [np.mean([up_to(p, k) for p in want]) for k in range(4)], atol=.06)

def test_single_shot_of_one_image_each_is_the_whole_gallery():
    torch.manual_seed(0)
    dist,query_pids = torch.randn(50,80).round(decimals=1),torch.randint(80, (50,))
    single = evaluate_single_shot(dist, query_pids, torch.arange(80), trials=3)
    whole = evaluate_distances(dist, query_pids, torch.arange(80))
    assert torch.allclose(single.cmc, whole.cmc)
    assert single.mAP==pytest.approx(whole.mAP) and not single.std.any()

def test_each_image_is_drawn_equally_often():
    dist = torch.arange(12.)[None]
    res = evaluate_single_shot(dist, [0], [1]*6+[0]+[1]*5, trials=20_000)
    assert res.cmc[0].item()==pytest.approx(5/11, abs=.02)
    assert res.std[0].item()==pytest.approx((5*6)**.5/11, abs=.01)

def test_the_query_s_camera_is_not_drawn_from():
    dist,gallery_pids = [[.1,.2,.3,.9]],['a','b','b','a']
    res = evaluate_single_shot(dist, ['a'], gallery_pids, ['x'], ['x','x','y','y'], trials=1)
    assert (res.rank1,res.mAP,res.trials,res.std[0])==(0,.5,1,0)
    assert evaluate_single_shot(dist, ['a'], gallery_pids, ['x'], ['x','x','x','y'], trials=20).rank1==1
    with pytest.raises(NoMatchError, match='own camera'):
        evaluate_single_shot(dist, ['a'], gallery_pids, ['x'], ['x','y','y','x'])
    two = evaluate_single_shot(dist*2, ['a','b'], ['a','b','b','c'], ['x','x'], ['x','x','y','y'])
    assert (two.n_query,two.n_query_valid)==(2,1)

def test_seeds():
    torch.manual_seed(0)
    dist,ids = torch.randn(60,200),random_ids(60, 200)
    res = evaluate_single_shot(dist, *ids)
    state = torch.get_rng_state()
    assert evaluate_single_shot(dist, *ids).to_json()==res.to_json()
    assert evaluate_single_shot(dist.numpy(), *ids).to_json()==res.to_json()
    assert evaluate_single_shot(dist, *ids, seed=1).mAP!=res.mAP
    assert torch.equal(state, torch.get_rng_state())

def test_queries_of_one_camera_share_the_draws():
    torch.manual_seed(0)
    dist,(query_pids,gallery_pids,query_cams,gallery_cams) = torch.randn(60,200),random_ids(60, 200)
    for i in range(3):
        one,two = [evaluate_single_shot(dist[rows], query_pids[rows], gallery_pids, query_cams[rows], gallery_cams)
                   for rows in ([i],[i,i])]
        assert one.mAP==two.mAP

@pytest.mark.parametrize('bad', [np.nan,-np.inf])
def test_single_shot_refuses_invalid_distances(bad):
    with pytest.raises(ValueError, match='NaN'): evaluate_single_shot([[bad,1.]], [1], [1,2])
    with pytest.raises(ValueError, match='NaN'): evaluate_single_shot([[1.,bad]], [1], [1,2])
    junk_may_be_invalid = evaluate_single_shot([[1.,np.inf,bad]], [1], [1,2,-1])
    assert junk_may_be_invalid.rank1==1

def test_single_shot_errors():
    dist,pids = np.zeros((1,2)),([1],[1,2])
    for options in (dict(trials=0),dict(ranks=0)):
        with pytest.raises(ValueError, match='from 1 on'): evaluate_single_shot(dist, *pids, **options)
    with pytest.raises(ValueError, match='a row per query'): evaluate_single_shot(dist[0], *pids)
    with pytest.raises(NoMatchError, match='junk'): evaluate_single_shot(dist, [1], [-1,-1])

def test_rank_of_a_short_curve():
    res = evaluate_single_shot(np.zeros((1,2)), [1], [1,2], ranks=3)
    assert res.rank(3)==1 and list(res.metrics())==['rank-1','mAP (one match: mean of 1/rank)']
    for k in (0,4):
        with pytest.raises(ValueError, match='goes from 1 to 3'): res.rank(k)

def test_context_of_the_card():
    dist = Distances(torch.rand(2,3), torch.rand(4,3), 'euclidean')
    dist.about = {'data':'two', 'flip':'none'}
    res = evaluate_single_shot(dist, [1,2], [1,2,1,2], about={'data':'mine'}, trials=7, seed=3)
    assert res.distance=='euclidean' and res.about=={'data':'mine', 'flip':'none'}
    for words in ('7 trials, seed 3','2 of 2','cameras unknown','mine'): assert words in repr(res)
