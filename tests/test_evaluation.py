"`evaluate` and `evaluate_distances` against plain scores written to be read, kinds of input, errors, and memory"
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_scores
from torch import nn, tensor

from pyramidreid.core import ReIDWarning
from pyramidreid.evaluation.protocol_card import *
from pyramidreid.evaluation.protocols import evaluate_cameras, evaluate_single_shot
from pyramidreid.evaluation.ranking import *
from pyramidreid.evaluation.retrieval import *
from pyramidreid.training.threshold_calibration import calibrate_distances


def assert_scores(card, scores, ranks=50):
    "The card holds the scores of `plain_scores`"
    valid = [s for s in scores if s]
    def mean(name): return np.mean([s[name] for s in valid])
    means = [card.mAP,card.mAP_trapezoid,card.mINP]
    np.testing.assert_allclose(means, [mean('ap'),mean('trapezoid'),mean('inp')], atol=1e-12)
    np.testing.assert_allclose(card.ap, [s['ap'] if s else np.nan for s in scores], atol=1e-12)
    assert card.first_rank.tolist()==[s['first'] if s else 0 for s in scores]
    cmc = [np.mean([s['first']<=k for s in valid]) for k in range(1, ranks+1)]
    np.testing.assert_allclose(card.cmc, cmc, atol=1e-7)
    assert (card.n_query,card.n_query_valid)==(len(scores),len(valid))

def assert_same(a, b):
    "Ranks and counts are equal, and means to rounding: their last bit may depend on the width of a chunk's table"
    assert a.first_rank.tolist()==b.first_rank.tolist() and a.n_tied==b.n_tied and a.card().equals(b.card())
    for x,y in zip((a.ap,a.inp,a.cmc), (b.ap,b.inp,b.cmc)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13, equal_nan=True)

def exact_distances(q, g, distance):
    "Distances of small whole numbers without rounding, in float64"
    q,g = np.asarray(q, np.float64),np.asarray(g, np.float64)
    if distance=='euclidean': return ((q[:,None]-g[None])**2).sum(-1)
    return -(q@g.T)/np.linalg.norm(g, axis=1).clip(1e-12)

def clustered(n_query=60, n_gallery=700, n_pids=12, width=16, noise=1., seed=0):
    "Embeddings around the centres of people, with junk and distractors; pids and cameras of both"
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(n_pids+2,width))
    query_pids,gallery_pids = rng.integers(1, n_pids+1, n_query),rng.integers(-1, n_pids+1, n_gallery)
    def emb(pids): return (centre[pids]+noise*rng.normal(size=(len(pids),width))).astype(np.float32)
    return (emb(query_pids), emb(gallery_pids), query_pids, gallery_pids,
            rng.integers(0, 4, n_query), rng.integers(0, 4, n_gallery))

# embeddings

@st.composite
def problems(draw, distance='euclidean'):
    "Whole-number embeddings: many ties, few people, few cameras, junk and distractors"
    n_query,n_gallery,width = draw(st.integers(1,6)),draw(st.integers(1,30)),draw(st.integers(1,4))
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    n_values = draw(st.integers(1,4))
    def embeddings(n):
        if distance=='euclidean': return rng.integers(0, n_values, (n,width))
        return rng.choice([-1,1], (n,4)) # of length 2, so that cosines are exact too
    q,g = embeddings(n_query),embeddings(n_gallery)
    if draw(st.booleans()): g[:] = g[rng.integers(0, n_gallery, n_gallery)]
    n_pids,n_cams = draw(st.integers(1,5)),draw(st.integers(1,4))
    pids = rng.integers(1, n_pids+1, n_query),rng.integers(-1, n_pids+2, n_gallery)
    cams = (rng.integers(0, n_cams, n_query),rng.integers(0, n_cams, n_gallery)) if draw(st.booleans()) else ()
    return q,g,pids,cams,draw(st.integers(1,7))

def check_problem(problem, distance):
    q,g,(query_pids,gallery_pids),cams,chunk = problem
    scores = plain_scores(exact_distances(q, g, distance), query_pids, gallery_pids, *cams)
    def run(**kwargs):
        emb = q.astype(np.float32),g.astype(np.float32)
        return evaluate(*emb, query_pids, gallery_pids, *cams, distance=distance, **kwargs)
    if not any(scores):
        with pytest.raises(NoMatchError): run()
        return
    card = run()
    assert_scores(card, scores)
    assert_same(run(chunk=chunk), card)
    assert card.n_junk==(gallery_pids==-1).sum() and card.n_gallery==len(g)-card.n_junk
    assert card.n_distractor==sum(pid!=-1 and pid not in query_pids for pid in gallery_pids)
    assert card.cameras==bool(cams)

@settings(max_examples=200, deadline=None)
@given(problems())
def test_euclidean_ties(problem): check_problem(problem, 'euclidean')

@settings(max_examples=150, deadline=None)
@given(problems('cosine'))
def test_cosine_ties(problem): check_problem(problem, 'cosine')

@pytest.mark.parametrize('noise', [.3,1.,5.])
@pytest.mark.parametrize('distance', ['cosine','euclidean'])
def test_continuous_embeddings(noise, distance):
    q,g,*ids = clustered(noise=noise)
    dist = exact_distances(q, g, distance)
    assert_scores(evaluate(q, g, *ids, distance=distance), plain_scores(dist, *ids))

def test_chunks_agree():
    q,g,*ids = clustered()
    card = evaluate(q, g, *ids)
    for chunk in (2,3,16,59,60,1000): assert_same(evaluate(q, g, *ids, chunk=chunk), card)
    assert evaluate(q, g, *ids, chunk=1).mAP==pytest.approx(card.mAP, abs=1e-6)

def test_sklearn():
    average_precision = pytest.importorskip('sklearn.metrics').average_precision_score
    q,g,query_pids,gallery_pids,query_cams,gallery_cams = clustered(noise=2.)
    card = evaluate(q, g, query_pids, gallery_pids, query_cams, gallery_cams, distance='euclidean')
    for i in range(0,60,7):
        same_pid = gallery_pids==query_pids[i]
        keep = (gallery_pids!=-1) & ~(same_pid & (gallery_cams==query_cams[i]))
        want = average_precision(same_pid[keep], -((q[i]-g[keep])**2).sum(1))
        assert want==pytest.approx(card.ap[i].item(), abs=1e-6)

def test_zero_vectors_and_scale():
    q,g,*ids = clustered()
    g[::5],q[3] = 0,0
    card = evaluate(q, g, *ids)
    assert_scores(card, plain_scores(exact_distances(q, g, 'cosine'), *ids))
    assert evaluate(q*1e-15, g*1e15, *ids).mAP==pytest.approx(card.mAP, abs=1e-6)
    all_zero = evaluate(np.zeros_like(q), np.zeros_like(g), *ids)
    assert_scores(all_zero, plain_scores(np.zeros((len(q),len(g))), *ids))

def test_junk_pid():
    q,g,query_pids,gallery_pids,*cams = clustered()
    assert evaluate(q, g, query_pids, gallery_pids, *cams, junk_pid=None).n_junk==0
    renamed = evaluate(q, g, query_pids, np.where(gallery_pids==-1, 99, gallery_pids), *cams, junk_pid=99)
    assert renamed.to_json()==evaluate(q, g, query_pids, gallery_pids, *cams).to_json()
    with pytest.raises(NoMatchError, match='junk'): evaluate(q, g, query_pids, np.full(len(g), -1))
    with pytest.raises(NoMatchError): evaluate(q, g, np.full(len(q), -1), gallery_pids)

def test_junk_pid_of_another_type():
    "'-1' and -1.0 mean -1 whatever the ids are; what can equal no id is an error, not the absence of junk"
    ids = ([1,2],[1,2,-1,-1])
    for pids in (ids,[list(map(str, o)) for o in ids],[np.array(o, np.int8) for o in ids]):
        for junk in (-1,'-1',-1.,np.int64(-1),np.array(-1),torch.tensor(-1),np.str_('-1')):
            assert evaluate_distances([[.1,.2,.3,.4]]*2, *pids, junk_pid=junk).n_junk==2, (pids,junk)
        for junk in (-1.5,[-1],[1,2,-1],True,math.nan,b'-1',np.array([1,2])):
            for f in (evaluate_distances,evaluate_single_shot,evaluate_cameras,calibrate_distances):
                with pytest.raises(ValueError, match='junk_pid='):
                    f([[.1,.2,.3,.4]]*2, *pids, [1,1], [2]*4, junk_pid=junk)
    with pytest.raises(ValueError, match="junk_pid='junk'.*whole numbers"):
        evaluate_distances([[.1,.2,.3,.4]]*2, *ids, junk_pid='junk')
    named = ['1','2'],['1','2','junk','-1']
    assert evaluate_distances([[.1,.2,.3,.4]]*2, *named, junk_pid='junk').n_junk==1

@pytest.mark.parametrize('written,junk,n_junk', [
    ('-1.0', -1, 1), ('-1 ', -1, 1), (' -1.0\t', '-1', 1), ('-1', '-1.0', 1), ('-1', ' -1 ', 1), ('-1.5', -1, 0),
    ('-10', -1, 0), ('1.0', -1, 0), ('junk ', 'junk', 1), ('007', '7', 0)])
def test_spellings_of_junk_as_text(written, junk, n_junk):
    "As pandas writes a whole number in a column with gaps, and with spaces around it; as in tables"
    for f in (evaluate_distances,evaluate_single_shot):
        card = f([[.3,.2,.1]], ['1'], ['1','2',written], [1], [2,2,2], junk_pid=junk)
        assert getattr(card, 'n_junk', n_junk)==n_junk
    assert evaluate_distances([[.3,.2,.1]], ['1'], ['1','2',written], junk_pid=junk).n_gallery==3-n_junk

def test_embeddings_are_left_alone():
    q,g,*ids = (torch.from_numpy(o) for o in clustered())
    before = [o.clone() for o in (q,g,*ids)]
    for distance in ('cosine','euclidean'): evaluate(q, g, *ids, distance=distance)
    assert all(map(torch.equal, (q,g,*ids), before))

def test_result_round_trip(tmp_path):
    q,g,query_pids,*ids = clustered()
    query_pids[4] = 77
    about = {'dataset':'märket', 'flip':'none', 'size':(384,128)}
    card = evaluate(q, g, query_pids, *ids, about=about)
    file = tmp_path/'r.json'
    json.loads(card.to_json(file), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))
    for src in (file,str(file),card.to_json()):
        back = ReIDResult.from_json(src)
        assert back.to_json()==card.to_json() and back.ap.dtype==card.ap.dtype and back.ap[4].isnan()
    assert repr(pickle.loads(pickle.dumps(card)))==repr(card)

def test_result_in_words():
    q,g,query_pids,*ids = clustered()
    query_pids[4] = 77
    card = evaluate(q, g, query_pids, *ids, about={'dataset':'märket'})
    expected = ['märket','positions 4','59 of 60','left out','gallery order','cosine',f'{100*card.mAP:.2f} %']
    for words in expected: assert words in repr(card)
    assert '<table' in card._repr_html_()
    assert card.rank10==pytest.approx(card.cmc[9].item())
    assert evaluate(q, g, query_pids, *ids, ranks=3).rank10==card.rank10

# kinds of ids and of embeddings

ID_KINDS = {'list':list, 'tensor':tensor, 'series':pd.Series, 'float':lambda x: x.astype(float),
            'list of tensors':lambda x: [tensor(o) for o in x], 'object':lambda x: x.astype(object),
            'category':lambda x: pd.Series(x).astype('category')}

@pytest.mark.parametrize('kind', ID_KINDS)
def test_kinds_of_ids(kind):
    q,g,*ids = clustered()
    assert evaluate(q, g, *map(ID_KINDS[kind], ids)).to_json()==evaluate(q, g, *ids).to_json()

def test_string_ids():
    q,g,query_pids,gallery_pids,query_cams,gallery_cams = clustered()
    def padded(ids): return ['-1' if o==-1 else f'{o:04d}' for o in ids]
    pids = padded(query_pids),padded(gallery_pids)
    as_text = evaluate(q, g, *pids, pd.Series(padded(query_cams)), padded(gallery_cams))
    assert as_text.to_json()==evaluate(q, g, query_pids, gallery_pids, query_cams, gallery_cams).to_json()

EMBEDDING_KINDS = {'tensor':tensor, 'half':lambda x: tensor(x).half(), 'bfloat16':lambda x: tensor(x).bfloat16(),
                   'half array':lambda x: x.astype(np.float16), 'lists':lambda x: x.tolist(),
                   'double':lambda x: tensor(x).double(), 'parameter':lambda x: nn.Parameter(tensor(x)),
                   'transposed':lambda x: tensor(x).T.contiguous().T, 'reversed':lambda x: x[::-1].copy()[::-1]}

@pytest.mark.parametrize('kind', EMBEDDING_KINDS)
def test_kinds_of_embeddings(kind):
    q,g,*ids = clustered()
    q,g = np.round(q*4)/4,np.round(g*4)/4
    convert = EMBEDDING_KINDS[kind]
    assert evaluate(convert(q), convert(g), *ids).mAP==pytest.approx(evaluate(q, g, *ids).mAP, abs=1e-9)

def test_whole_number_embeddings():
    q,g,*ids = clustered()
    q,g = np.round(q*4),np.round(g*4)
    assert evaluate(q.astype(int), g.astype(int), *ids).mAP==pytest.approx(evaluate(q, g, *ids).mAP, abs=1e-9)

def test_under_autocast():
    q,g,*ids = clustered()
    with torch.autocast('cpu', torch.bfloat16): card = evaluate(q, g, *ids)
    assert card.to_json()==evaluate(q, g, *ids).to_json()

@pytest.mark.parametrize('change,says', [
    (dict(query_emb=torch.zeros(2)), 'one embedding per row'),
    (dict(query_emb=torch.zeros(0,3)), 'at least one'), (dict(gallery_emb=torch.zeros(3,0)), 'at least one'),
    (dict(query_emb=torch.zeros(2,4)), 'widths 4 .query. and 3'),
    (dict(query_emb=[['a','b','c']]*2), 'query_emb: .* values are not numbers. Give one embedding per row'),
    (dict(query_pids=[1]), 'query_pids has 1 entries for 2'), (dict(gallery_cams=[1,2]), 'gallery_cams has 2'),
    (dict(gallery_cams=None), 'or neither'), (dict(query_cams=None), 'or neither'),
    (dict(gallery_pids=['1','2','3']), 'two kinds'), (dict(gallery_pids=[1,'2',3]), 'two kinds|mixes'),
    (dict(gallery_pids=[1,2,None]), 'missing'), (dict(query_pids=[1.,1.5]), 'fractional'),
    (dict(query_pids=[[1],[2]]), 'one dimension'),
    (dict(gallery_emb=tensor([[1.,2,3],[torch.inf,0,0],[0,torch.nan,0]])),
     r'gallery_emb: 2 of 3 rows .* first at \[1, 2\]'),
    (dict(query_emb=tensor([[1e30,0,0],[0,0,0]])), 'query_emb: 1 of 2'),
    (dict(distance='l1'), "'l1'"), (dict(ranks=0), 'from 1'), (dict(chunk=0), 'from 1')])
def test_errors(change, says):
    args = dict(query_emb=torch.rand(2,3), gallery_emb=torch.rand(3,3), query_pids=[1,2], gallery_pids=[1,2,3],
                query_cams=[1,1], gallery_cams=[2,2,2])
    with pytest.raises(ValueError, match=says): evaluate(**{**args, **change})

# ranks

def spread_out(spread, n_query, n_gallery):
    "Distances whose values are spread badly"
    d = torch.randn(n_query,n_gallery)
    if spread=='heavy': return d**9
    if spread=='two scales': return torch.where(torch.rand_like(d)<.5, d*1e-3, 1e4+d)
    if spread=='few values': return (d*3).round()
    if spread=='all equal': return torch.zeros_like(d)
    return d

def plain_ranks(row, keep, is_pid):
    "Ranks of the images of a person among those to `keep`, and how many of them are in a tie"
    row = row.double().numpy()
    order = keep[np.argsort(row[keep], kind='stable')]
    ranks = np.nonzero(is_pid[order])[0]
    return ranks.tolist(),sum((row[keep]==row[j]).sum()>1 for j in order[ranks])

@pytest.mark.parametrize('spread', ['normal','heavy','two scales','few values','all equal','infinite'])
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64,torch.float16])
def test_match_ranks(spread, dtype):
    torch.manual_seed(0)
    n_query,n_gallery = 30,3000
    d = spread_out(spread, n_query, n_gallery).to(dtype).clamp(-6e4, 6e4)
    query_pids,gallery_pids = torch.randint(40, (n_query,)),torch.randint(40, (n_gallery,))
    query_cams,gallery_cams = torch.randint(3, (n_query,)),torch.randint(3, (n_gallery,))
    if spread=='infinite': d[:,(torch.rand(n_gallery)<.3) & (gallery_pids>20)] = torch.inf
    same,match = MatchIndex(query_pids, gallery_pids, query_cams, gallery_cams)[torch.arange(n_query)]
    within_reach = d.gather(1, same.clamp(min=0)).isfinite().logical_or(~match).all(1)
    valid = (within_reach & match.any(1)).nonzero().view(-1)
    assert len(valid)>5
    before = d.clone()
    ranks,n_tied = match_ranks(d[valid], same[valid], match[valid])
    assert torch.equal(d, before)
    n_tied_plain = 0
    for i,row in zip(valid, ranks):
        is_pid = (gallery_pids==query_pids[i]).numpy()
        keep = np.flatnonzero(~(is_pid & (gallery_cams==query_cams[i]).numpy()))
        want,n = plain_ranks(d[i], keep, is_pid)
        assert row[row>=0].tolist()==want
        n_tied_plain += n
    assert n_tied==n_tied_plain

@pytest.mark.parametrize('row', [[np.nan,1,2],[1,np.nan,2],[1,2,np.nan],[-np.inf,1,2],[1,-np.inf,2],[np.nan]*3])
def test_match_ranks_refuses_invalid_distances(row):
    same,match = tensor([[0,1]]),tensor([[True,False]])
    with pytest.raises(ValueError, match='finite'): match_ranks(tensor([row]), same, match)

def test_ranks_without_a_match_in_reach():
    same = tensor([[0,1]])
    for row,match in (([1.,2,3],[False,False]), ([torch.inf,2,3],[True,False]), ([torch.inf]*3,[True,True])):
        ranks,n_tied = match_ranks(tensor([row]), same, tensor([match]))
        assert ranks.tolist()==[[-1,-1]] and n_tied==0

# given distances

class Rows:
    "Nothing but `shape` and rows"
    def __init__(self, d): self.d,self.shape = d,d.shape
    def __getitem__(self, i): return self.d[i]

FLOAT_KINDS = {
    'float32':lambda d: torch.tensor(d).float(), 'float64':torch.tensor, 'float16':lambda d: torch.tensor(d).half(),
    'bfloat16':lambda d: torch.tensor(d).bfloat16(), 'parameter':lambda d: nn.Parameter(torch.tensor(d)),
    'strided':lambda d: torch.tensor(d).repeat_interleave(2, 1)[:,::2],
    'transposed':lambda d: torch.tensor(d.T.copy()).T, 'array':lambda d: d.astype(np.float32),
    'half array':lambda d: d.astype(np.float16), 'big-endian':lambda d: d.astype('>f4'),
    'Fortran':np.asfortranarray, 'reversed':lambda d: d[::-1].copy()[::-1], 'lists':lambda d: d.tolist(),
    'frame':pd.DataFrame, 'rows':lambda d: Rows(torch.tensor(d)), 'rows of an array':Rows}
WHOLE_KINDS = {'int64':lambda d: torch.tensor(d).long(), 'int8':lambda d: torch.tensor(d).to(torch.int8),
               'int array':lambda d: d.astype(np.int32)}
PID_KINDS = {
    'numbers':lambda x: x, 'strings':lambda x: [str(o) for o in x], 'floats':lambda x: x.astype(float),
    'tensor':tensor, 'negative':lambda x: np.where(x==-1, -1, -2-x), 'huge':lambda x: np.where(x==-1, -1, 2**62+x)}

@st.composite
def matrices(draw):
    "Distances of all kinds, of whole values with ties up to all equal, with images out of reach, and any junk"
    n_query,n_gallery = draw(st.sampled_from([1,2,5])),draw(st.sampled_from([1,2,9,30]))
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    kind,largest = draw(st.sampled_from([*FLOAT_KINDS,*WHOLE_KINDS])),draw(st.sampled_from([0,1,100]))
    n_pids,n_cams = draw(st.integers(1,4)),draw(st.integers(1,3))
    dist = rng.integers(-largest, largest+1, (n_query,n_gallery)).astype(float)
    query_pids = rng.integers(0, n_pids, n_query)
    gallery_pids = rng.integers(draw(st.sampled_from([-1,0])), n_pids+1, n_gallery)
    if kind in FLOAT_KINDS:
        dist[rng.random(dist.shape)<.2] = np.inf
        dist[:,gallery_pids==-1] = rng.choice([np.nan,-np.inf,0])
    cams = (rng.integers(0, n_cams, n_query),rng.integers(0, n_cams, n_gallery)) if draw(st.booleans()) else ()
    return dist,(query_pids,gallery_pids),cams,kind,draw(st.sampled_from([*PID_KINDS])),draw(st.integers(1,4))

@settings(max_examples=400, deadline=None)
@given(matrices())
def test_any_distances(problem):
    d,pids,cams,kind,pid_kind,chunk = problem
    scores = plain_scores(d, *pids, *cams)
    dist = {**FLOAT_KINDS, **WHOLE_KINDS}[kind](d)
    before = pickle.dumps(dist)
    def run(**kwargs): return evaluate_distances(dist, *map(PID_KINDS[pid_kind], pids), *cams, **kwargs)
    if not any(scores):
        with pytest.raises(NoMatchError): run()
        return
    card = run()
    assert_scores(card, scores)
    assert pickle.dumps(dist)==before
    assert card.n_junk==(pids[1]==-1).sum() and card.distance=='as given'
    assert_same(in_three_threads(run, chunk=chunk), card)

def in_three_threads(f, **kwargs):
    n = torch.get_num_threads()
    torch.set_num_threads(3)
    try: return f(**kwargs)
    finally: torch.set_num_threads(n)

@pytest.mark.parametrize('row', [[np.nan,2,3],[-np.inf,2,3],[1,np.nan,3],[1,-np.inf,3]])
def test_invalid_distances(row):
    with pytest.raises(ValueError, match='finite'): evaluate_distances([row], [1], [1,2,3])

def test_images_at_infinity_are_not_ranked():
    inf = np.inf
    assert evaluate_distances([[1,inf,3]], [1], [1,2,3]).mAP==1
    card = evaluate_distances([[inf,1,2],[1,2,3],[inf,inf,inf]], [1,1,1], [1,2,1])
    assert card.first_rank.tolist()==[2,1,0] and card.n_query_valid==2 and card.mAP==(1/2+(1+2/3)/2)/2
    assert card.card().loc['infinite distance','']=='not ranked (matches among them: 3)'
    assert 'infinite distance' not in evaluate_distances([[1,inf,3]], [1], [1,2,3]).words()
    with pytest.raises(NoMatchError, match='all matches are at infinite distance'):
        evaluate_distances([[inf,1,2]], [1], [1,2,3])

@pytest.mark.parametrize('shape', [(3,),(0,3),(2,0),(1,2,3)])
def test_distances_are_a_matrix(shape):
    with pytest.raises(ValueError, match='a row per query'): evaluate_distances(np.zeros(shape), [1], [1])

@pytest.mark.parametrize('kind', [tensor,np.array])
def test_whole_numbers_are_not_rounded(kind):
    assert evaluate_distances(kind([[2**24+1,2**24]]), [1], [1,2]).mAP==.5

def test_large_ids_are_told_apart():
    ids = [2**53,2**53+1]
    q,_,distinct = id_codes(np.array(ids, object), np.array(ids, object))
    assert q[0]!=q[1] and distinct[q].tolist()==ids

@pytest.mark.parametrize('ids', [np.array([2**64-1,5], np.uint64), np.array([1e300,2]), [2**70,2**70+1],
                                 np.array([1+2j,1+3j])])
def test_ids_beyond_64_bits_are_refused(ids):
    with pytest.raises(ValueError, match='64-bit whole numbers'): id_codes(ids, ids)

@pytest.mark.parametrize('missing', [[1,None], [1.,np.nan], ['1',None], pd.Series([1,None], dtype='Int64'),
                                     pd.Series(['a',None])])
@pytest.mark.parametrize('name', ['query_pids','query_cams'])
def test_missing_ids(missing, name):
    ids = dict(query_pids=[1,2], gallery_pids=[1,2], query_cams=[1,2], gallery_cams=[3,4])
    with pytest.raises(ValueError, match=name): evaluate_distances(np.zeros((2,2)), **{**ids, name:missing})

def test_a_gallery_of_one_person():
    "As many matches as images"
    ids = [7]*3,[7]*20_000,[0]*3,torch.arange(20_000)%4
    assert evaluate_distances(torch.randn(3,20_000), *ids).mAP==1
    all_equal = evaluate_distances(torch.zeros(3,20_000), *ids)
    assert all_equal.mAP==1 and all_equal.n_tied==3*15_000 and all_equal.first_rank.tolist()==[1]*3

def test_a_wide_gallery():
    "100,000 images, half of them of the query's person"
    torch.manual_seed(0)
    dist,pids = torch.randn(2,100_000).round(decimals=3),torch.arange(100_000)%2
    card = evaluate_distances(dist, [1,1], pids)
    for row,ap in zip(dist, card.ap):
        match = pids[row.argsort(stable=True)]==1
        precision = match.cumsum(0)/torch.arange(1, 100_001).double()
        assert ap.item()==pytest.approx(precision[match].mean().item(), abs=1e-9)

# what else is left out: the query itself, images with the same key, and those of a mask

@st.composite
def exclusions(draw):
    "Small distances with ties and inf, ids, and any of: cameras, images, second keys, a mask"
    n_query,n_gallery = draw(st.sampled_from([1,2,6])),draw(st.sampled_from([1,5,30]))
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    def both(n): return rng.integers(0, n, n_query),rng.integers(0, n, n_gallery)
    dist = rng.integers(-2, 3, (n_query,n_gallery)).astype(draw(st.sampled_from(['f4','f8','f2'])))
    dist[rng.random(dist.shape)<draw(st.sampled_from([0,.2,.9]))] = np.inf
    pids = rng.integers(0, 3, n_query),rng.integers(-1, 4, n_gallery)
    options = {}
    if draw(st.booleans()): options.update(zip(('query_cams','gallery_cams'), both(3)))
    if draw(st.booleans()): options.update(zip(('query_images','gallery_images'), both(12)))
    if draw(st.booleans()): options.update(zip(('query_keys','gallery_keys'), both(3)))
    if draw(st.booleans()): options['mask'] = rng.random(dist.shape)<.3
    return dist,pids,options,draw(st.integers(1,4)),draw(st.sampled_from([*MASK_KINDS]))

MASK_KINDS = {'array':lambda x: x, 'tensor':tensor, 'lists':lambda x: x.tolist(), 'frame':pd.DataFrame,
              'rows':lambda x: Rows(tensor(x)), 'rows of an array':Rows}

@settings(max_examples=400, deadline=None)
@given(exclusions())
def test_left_out(problem):
    dist,pids,options,chunk,kind = problem
    scores = plain_scores(dist, *pids, **options)
    if 'mask' in options: options = {**options, 'mask':MASK_KINDS[kind](options['mask'])}
    before = dist.copy()
    def run(**kwargs): return evaluate_distances(dist, *pids, **options, **kwargs)
    if not any(scores):
        with pytest.raises(NoMatchError): run()
        return
    card = run()
    assert_scores(card, scores)
    assert_same(in_three_threads(run, chunk=chunk), card)
    assert np.array_equal(dist, before)

def test_left_out_in_words():
    "By hand: query 1 is gallery image 0, query 2 is image 2 under another name, and image 3 has query 1's clothes"
    dist = np.arange(8.).reshape(2,4)
    card = evaluate_distances(dist, [7,8], [7,8,9,7], query_images=['a.jpg','b.jpg'],
                              gallery_images=['a.jpg','c.jpg','b.jpg','d.jpg'])
    assert card.first_rank.tolist()==[3,2]
    assert card.words()['the query itself']=='left out: 2 of 2 queries are in the gallery'
    masked = evaluate_distances(dist, [7,8], [7,8,9,7], mask=[[True,True,False,False],[False]*4])
    assert masked.first_rank.tolist()==[2,2]
    assert masked.words()['mask']=='left out (pairs of query and gallery image: 2)'
    changed = evaluate_distances(dist, [7,8], [7,8,9,7], query_keys=['red','blue'],
                                 gallery_keys=['blue','red','red','red'])
    assert changed.first_rank.tolist()==[1,2]
    assert changed.words()['same person, same key']=='left out (pairs of query and gallery image: 1)'
    back = Card.from_json(changed.to_json())
    assert back.words()==changed.words() and back.to_json()==changed.to_json()
    with pytest.raises(ValueError, match='not of the same'): bootstrap(changed, minus=masked)

def test_nothing_else_left_out():
    "Arguments that leave nothing out change nothing"
    q,g,*ids = clustered()
    card = evaluate(q, g, *ids)
    nothing = dict(query_images=range(60), gallery_images=range(60,760), query_keys=[0]*60, gallery_keys=[1]*700,
                   mask=np.zeros((60,700), bool))
    same = evaluate(q, g, *ids, **nothing)
    assert same.ap.equal(card.ap) and same.first_rank.equal(card.first_rank) and same.mAP==card.mAP
    assert card.left_out=={} and list(same.left_out)==['the query itself','same person, same key','mask']

def test_a_set_against_itself():
    "Random embeddings find nobody, unless each image finds itself"
    torch.manual_seed(0)
    emb,pids = torch.randn(144,64),torch.arange(144)//12
    with pytest.warns(ReIDWarning, match='same_set=True'): fooled = evaluate(emb, emb, pids, pids)
    assert fooled.rank1==1
    with pytest.warns(ReIDWarning, match='same_set=True'): evaluate(emb, emb.clone(), pids, pids)
    with pytest.warns(ReIDWarning, match='same_set=True'):
        evaluate_distances(torch.cdist(emb, emb), pids, pids, [1]*144, range(144))
    with warnings.catch_warnings():
        warnings.simplefilter('error', ReIDWarning)
        card = evaluate(emb, emb, pids, pids, same_set=True)
        evaluate(emb, emb+.1, pids, pids)
        own_camera = evaluate(emb, emb, pids, pids, range(144), range(144))
        evaluate_distances(torch.cdist(emb, emb+torch.randn(144,64)/9), pids, pids)
    dist = -emb@(emb/emb.norm(dim=1, keepdim=True)).T
    assert_scores(card, plain_scores(dist.numpy(), pids, pids, mask=torch.eye(144).bool().numpy()))
    assert card.rank1<.3 and own_camera.mAP==card.mAP
    assert card.words()['the query itself']=='left out: 144 of 144 queries are in the gallery'

@pytest.mark.parametrize('kind', ['tensor','half','mapped'])
def test_queries_that_are_a_part_of_the_gallery(kind, tmp_path):
    torch.manual_seed(0)
    emb,pids = torch.randn(144,64),torch.arange(144)//12
    if kind=='half': emb = emb.half()
    if kind=='mapped':
        np.save(tmp_path/'g.npy', emb)
        emb = np.load(tmp_path/'g.npy', mmap_mode='r')
    queries = slice(0, 144, 5)
    with pytest.warns(ReIDWarning, match='query_images and gallery_images'):
        fooled = evaluate(emb[queries], emb, pids[queries], pids)
    assert fooled.rank1==1
    with warnings.catch_warnings():
        warnings.simplefilter('error', ReIDWarning)
        images = dict(query_images=range(0, 144, 5), gallery_images=range(144))
        right = evaluate(emb[queries], emb, pids[queries], pids, **images)
        evaluate(emb[queries], np.delete(np.asarray(emb), queries, 0), pids[queries], np.delete(pids, queries))
        evaluate(np.ones((9,4)), np.ones((20,4)), [1]*9, [1]*20) # a collapsed model
    assert right.ap.tolist()==evaluate(emb, emb, pids, pids, same_set=True).ap[queries].tolist()

@pytest.mark.parametrize('change,says', [
    (dict(same_set=True), 'as many|2 queries and 3'), (dict(query_images=[1,2]), 'both query_images'),
    (dict(query_keys=[1], gallery_keys=[1,2,3]), 'query_keys has 1'),
    (dict(query_keys=[1,None], gallery_keys=[1,2,3]), 'missing'),
    (dict(mask=[[True]*2]*2), 'mask has shape .2, 2. for 2 queries and 3'),
    (dict(mask=np.zeros((2,3))), 'mask holds .*float64'),
    (dict(mask=np.ones((2,3), bool)), 'left out by the mask')])
def test_errors_of_what_is_left_out(change, says):
    with pytest.raises(ValueError, match=says): evaluate_distances(np.zeros((2,3)), [1,2], [1,2,3], **change)

def test_the_reason_why_there_is_no_match():
    images = dict(query_images=['a'], gallery_images=['a'])
    with pytest.raises(NoMatchError, match='all the query itself, which do not'):
        evaluate_distances([[1.]], [1], [1], **images)
    with pytest.raises(NoMatchError, match="query's own camera or the query itself or with the query's own key"):
        evaluate_distances([[1.]], [1], [1], [0], [0], query_keys=[1], gallery_keys=[1], **images)

def test_files_of_both_sides(tmp_path, monkeypatch):
    "One file by several names is one image; without a common file there is nothing to leave out"
    for name in ('a','b','c'): (tmp_path/f'{name}.jpg').touch()
    (tmp_path/'link.jpg').symlink_to(tmp_path/'a.jpg')
    (tmp_path/'folder').symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    photo = np.zeros((2,2))
    queries = [tmp_path/'a.jpg','b.jpg',photo]
    gallery = ['link.jpg',tmp_path/'folder'/'b.jpg',tmp_path/'c.jpg',photo]
    images = shared_images(queries, gallery)
    same = images['query_images'][:,None]==images['gallery_images']
    assert same.tolist()==[[True,False,False,False],[False,True,False,False],[False,False,False,True]]
    assert shared_images(queries[:2], gallery[2:])=={}

# files and memory

@pytest.mark.parametrize('dtype', ['<f4','>f4','<f2'])
@pytest.mark.parametrize('layout', ['rows','every other','Fortran'])
def test_mapped_files(tmp_path, dtype, layout):
    def mapped(x, name):
        if layout=='every other': x = np.repeat(x, 2, axis=0)
        np.save(tmp_path/name, np.asfortranarray(x) if layout=='Fortran' else x)
        return np.load(tmp_path/name, mmap_mode='r')[::2 if layout=='every other' else 1]
    q,g,*ids = clustered(n_gallery=90)
    g = np.round(g*4).astype(dtype)
    dist = np.round(((q[:,None]-g)**2).sum(-1)).clip(0, 6e4).astype(dtype)
    mapped_dist = mapped(dist, 'dist.npy')
    assert isinstance(mapped_dist, np.memmap) and not mapped_dist.flags.writeable
    assert_scores(evaluate_distances(mapped_dist, *ids, chunk=7), plain_scores(dist.astype(float), *ids))
    q = np.round(q*4)
    from_file = evaluate(q, mapped(g, 'g.npy'), *ids, distance='euclidean')
    assert from_file.to_json()==evaluate(q, g.astype(np.float32), *ids, distance='euclidean').to_json()

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads RssAnon')
def test_bounded_memory(tmp_path):
    """A mapped gallery of 123 MB, 246 in float32, takes a block of 32 MB and its squares. And where 24 queries have
    100,000 matches each, the tables of matches, some twenty of 19 MB for all queries, are never in memory at once"""
    gallery = np.lib.format.open_memmap(tmp_path/'g.npy', 'w+', np.float16, (60_000,1024))
    gallery[:] = np.tile(np.random.default_rng(0).standard_normal((1500,1024), np.float32), (40,1))
    gallery.flush()
    script = Path(__file__).parent/'evaluation_memory.py'
    out = subprocess.run([sys.executable, script, tmp_path/'g.npy'], capture_output=True, text=True,
                         env={**os.environ, 'OMP_NUM_THREADS':'1'})
    assert out.returncode==0, out.stderr
    mapped_mb,matches_mb,uses_cuda = out.stdout.split()
    assert int(mapped_mb)<150 and int(matches_mb)<200 and uses_cuda=='False', out.stdout
