"Open-set searches against loops over images, intervals against scipy, and what a threshold promises"
import decimal
import json
import math
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from toys import random_exclusions

from pyramidreid.evaluation.distances import Distances
from pyramidreid.evaluation.intervals import _beta_cdf, _t_squared, binomial_interval
from pyramidreid.evaluation.openset import *
from pyramidreid.evaluation.retrieval import evaluate_distances
from pyramidreid.training.threshold_calibration import *


def of_scores(impostor, person=None, genuine=(), place=None, **kwargs):
    "A calibration from bare scores; by default each search is by another person, and each match at rank 1"
    if person is None: person = range(len(impostor))
    if place is None: place = [1]*len(genuine)
    defaults = dict(pairs=[], n_gallery=9, n_ids=3, unknown='absent', cameras=False, distance='cosine')
    return Calibration(**{**defaults, **kwargs}, impostor=impostor, person=person, genuine=genuine, place=place)

# scores, by loops

def loop_searches(dist, query_pids, gallery_pids, query_cams, gallery_cams, unknown, mask=None):
    "Lists of (score, person), of (score, rank), and of the scores of pairs of different people and of one person"
    impostor,genuine,different,same = [],[],[],[]
    def counts(i, j):
        if dist[i][j]==np.inf or (mask is not None and mask[i][j]): return False
        same_camera = query_cams is not None and gallery_cams[j]==query_cams[i]
        return gallery_pids[j]!=-1 and not (gallery_pids[j]==query_pids[i] and same_camera)
    for i,pid in enumerate(query_pids):
        if pid==-1: continue
        ranked = sorted([j for j in range(len(gallery_pids)) if counts(i, j)], key=lambda j: (dist[i][j],j))
        right = [rank for rank,j in enumerate(ranked, 1) if gallery_pids[j]==pid]
        wrong = [j for j in ranked if gallery_pids[j]!=pid]
        if right: genuine.append((-dist[i][ranked[right[0]-1]],right[0]))
        if wrong and (unknown=='hide' or not right): impostor.append((-dist[i][wrong[0]],pid))
        different += [-dist[i][j] for j in wrong]
        same += [-dist[i][ranked[rank-1]] for rank in right]
    return impostor,genuine,different,same

@st.composite
def rankings(draw):
    "Distances with ties, few people, few cameras or none, junk among queries and gallery"
    n_query,n_gallery = draw(st.integers(1,6)),draw(st.integers(1,20))
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    n_pid,n_cam,limit = draw(st.integers(1,5)),draw(st.integers(0,3)),draw(st.sampled_from([2,5,1000]))
    query_cams,gallery_cams = [rng.integers(0, n_cam, n) if n_cam else None for n in (n_query,n_gallery)]
    dist = rng.integers(-limit, limit, (n_query,n_gallery)).astype(np.float32)/8
    return dist,rng.integers(-1, n_pid+1, n_query),rng.integers(-1, n_pid, n_gallery),query_cams,gallery_cams

def as_kind(ranking, kind):
    "The same ranking with ids as strings, as tensors, or in another precision"
    dist,*ids = ranking
    def strings(ids): return None if ids is None else np.array([str(o) for o in ids])
    if kind=='strings': return dist,*map(strings, ids)
    if kind=='tensors': return [None if o is None else torch.from_numpy(o) for o in ranking]
    if kind=='double':  return dist.astype(float),*ids
    if kind=='half':    return torch.from_numpy(dist).half(),*ids
    return ranking

def check_pair_rates(pairs, different, same):
    "Every row of the table holds the exact rates at its score, in order, up to 1"
    if not (len(different) and len(same)):
        assert not len(pairs)
        return
    assert (pairs[-1,1:]==1).all()
    for score,false_accepts,true_accepts in pairs:
        assert false_accepts==pytest.approx((different>=score).mean())
        assert true_accepts==pytest.approx((same>=score).mean())
    assert (np.diff(pairs[:,1])>=0).all() and (np.diff(pairs[:,0])<=0).all()

@settings(max_examples=150, deadline=None)
@given(rankings(), st.sampled_from(['hide','absent']),
       st.sampled_from(['numbers','strings','tensors','double','half']), st.integers(1,4))
def test_searches_are_those_of_the_loops(ranking, unknown, kind, chunk):
    dist,_,gallery_pids,_,_ = ranking
    impostor,genuine,different,same = loop_searches(*ranking, unknown)
    args = as_kind(ranking, kind)
    if not impostor:
        with pytest.raises(ValueError, match='no search for an unknown|junk'):
            calibrate_distances(*args, unknown=unknown)
        return
    before = dist.copy()
    result = calibrate_distances(*args, unknown=unknown, chunk=chunk)
    assert np.array_equal(dist, before)
    def rounded(x): return np.float32(np.float16(x)) if kind=='half' else np.float32(x)
    people = [pid for _,pid in impostor]
    assert result.impostor.tolist()==[rounded(score) for score,_ in impostor]
    assert len({*zip(result.person, people)})==len({*result.person})==len({*people}), 'a code for each person'
    assert result.genuine.tolist()==[rounded(score) for score,_ in genuine]
    assert (result.n_gallery,result.n_ids)==((gallery_pids!=-1).sum(),len({*gallery_pids}-{-1}))
    check_pair_rates(result.pairs, rounded(different), rounded(same))
    if kind!='half': assert result.place.tolist()==[rank for _,rank in genuine] # rounding makes ties
    if not genuine: return
    found = [(rounded(score),rank) for (score,_),rank in zip(genuine, result.place)]
    for t in (-1,0,1): assert result.dir_at(t, 2)==np.mean([score>=t and rank<=2 for score,rank in found])
    if kind=='half': return
    card = evaluate_distances(*args)
    assert result.dir_at(-np.inf)==pytest.approx(card.rank1) and result.dir_at(-np.inf, 5)==pytest.approx(card.rank5)

@settings(max_examples=150, deadline=None)
@given(rankings(), st.sampled_from(['hide','absent']), st.sampled_from(['mask','inf','images','keys']))
def test_searches_with_images_left_out(ranking, unknown, by):
    dist,query_pids,gallery_pids,*cams = ranking
    mask,options = random_exclusions(by, dist, query_pids, gallery_pids)
    impostor,genuine,different,same = loop_searches(*ranking, unknown, mask)
    if by=='inf': dist = np.where(mask, np.inf, dist).astype(np.float32)
    args = dist,query_pids,gallery_pids,*cams
    if not impostor:
        with pytest.raises(ValueError, match='no search for an unknown|junk'):
            calibrate_distances(*args, unknown=unknown, **options)
        return
    result = calibrate_distances(*args, unknown=unknown, chunk=2, **options)
    assert result.impostor.tolist()==[score for score,_ in impostor]
    assert result.genuine.tolist()==[score for score,_ in genuine]
    assert result.place.tolist()==[rank for _,rank in genuine]
    check_pair_rates(result.pairs, np.float32(different), np.float32(same))
    words = dict(mask='mask', images='the query itself', keys='same person, same key')
    if by in words: assert words[by] in result.about and words[by] in repr(result)

def test_a_set_calibrated_against_itself():
    torch.manual_seed(0)
    emb,pids = torch.randn(60,16),torch.arange(60)//4
    with pytest.warns(UserWarning, match='same_set=True'): fooled = calibrate_distances(Distances(emb, emb), pids, pids)
    assert fooled.place.tolist()==[1]*60
    right = calibrate_distances(Distances(emb, emb), pids, pids, same_set=True)
    assert right.place.tolist()==evaluate_distances(Distances(emb, emb), pids, pids, same_set=True).first_rank.tolist()
    assert np.mean(right.place==1)<.3

def test_ranks_as_in_evaluation_on_real_numbers():
    torch.manual_seed(0)
    dist = Distances(torch.randn(80,8), torch.randn(500,8))
    query_pids,gallery_pids = torch.randint(12,(80,)),torch.randint(-1,10,(500,))
    ids = query_pids,gallery_pids,torch.randint(3,(80,)),torch.randint(3,(500,))
    result,card = calibrate_distances(dist, *ids),evaluate_distances(dist, *ids)
    assert result.place.tolist()==card.first_rank[card.first_rank>0].tolist()
    assert len(result.impostor)==80 and result.distance=='cosine'
    scores = -dist[:].numpy()
    scores[(query_pids[:,None]==gallery_pids) | (gallery_pids==-1)] = -9
    assert np.array_equal(result.impostor, scores.max(1))
    absent = calibrate_distances(dist, *ids, unknown='absent')
    assert len(absent.impostor)==80-card.n_query_valid and len(absent.genuine)==card.n_query_valid

def test_queries_all_known():
    dist = [[.1,.2],[.3,.1]]
    with pytest.raises(ValueError, match="every query's person is in the gallery. Use unknown='hide'"):
        calibrate_distances(dist, [1,2], [1,2], unknown='absent')
    assert calibrate_distances(dist, [1,2], [1,2]).impostor.tolist()==pytest.approx([-.2,-.3])

def test_queries_all_unknown():
    result = calibrate_distances([[.1,.2],[.3,.1]], [8,9], [1,2], unknown='absent', far=.5)
    assert result.impostor.tolist()==pytest.approx([-.1,-.1]) and not len(result.genuine)
    with pytest.raises(ValueError, match='no detection rate'): result.dir()
    with pytest.raises(ValueError, match='no ROC'): result.plot_roc()
    with pytest.raises(ValueError, match='no pairs of both kinds'): result.verification(.5)
    assert 'known searches' in repr(result) and 'nan' not in repr(result)
    assert len(result.plot_scores().get_legend().get_texts())==2, 'unknown people and a threshold'

def test_one_camera_and_one_person():
    dist = [[.1,.2,.3]]
    one = calibrate_distances(dist, [1], [1,1,2], [0], [0,0,0], unknown='absent')
    assert one.impostor.tolist()==pytest.approx([-.3]) and not len(one.genuine) and one.cameras
    with pytest.raises(ValueError, match='only shows the person'): calibrate_distances(dist, [1], [1,1,1])
    with pytest.raises(ValueError, match='all gallery images are junk'): calibrate_distances(dist, [1], [-1]*3)
    with pytest.raises(ValueError, match='all queries are junk'): calibrate_distances(dist, [-1], [1]*3)
    with pytest.raises(ValueError, match='a row per query'): calibrate_distances(np.zeros((1,0)), [1], [])

@pytest.mark.parametrize('bad', [np.nan,-np.inf])
def test_bad_distances(bad):
    with pytest.raises(ValueError, match='NaN'): calibrate_distances([[bad,1.]], [1], [1,2])
    junk_and_infinite = calibrate_distances([[.5,bad,np.inf,.7]], [1], [1,-1,2,3])
    assert junk_and_infinite.impostor.tolist()==pytest.approx([-.7])

# errors

@pytest.mark.parametrize('kwargs,match', [
    (dict(unknown='some'), "'hide' or 'absent'"), (dict(chunk=0), 'from 1 on'), (dict(query_cams=[1]), 'or neither'),
    (dict(far=0), 'not a valid false-accept rate'), (dict(far=math.nan), 'not a valid false-accept rate')])
def test_bad_arguments_of_calibrate_distances(kwargs, match):
    with pytest.raises(ValueError, match=match): calibrate_distances([[.1,.2]], [1], [1,2], **kwargs)

def test_ids_of_another_length():
    with pytest.raises(ValueError, match='5 entries'): calibrate_distances([[.1,.2]], [1]*5, [1,2])

@pytest.mark.parametrize('far', [0,1,-.1,1.5,math.nan])
def test_bad_rates(far):
    with pytest.raises(ValueError, match='not a valid false-accept rate'): of_scores([.1]).threshold(far)
    with pytest.raises(ValueError, match='not a valid false-accept rate'): of_scores([.1]).verification(far)

@pytest.mark.parametrize('kwargs,match', [
    (dict(level=95), 'not a valid confidence level'), (dict(genuine=[.1], place=[0]), 'start at 1'),
    (dict(pairs=[[math.nan,.1,.2]]), 'finite'), (dict(impostor=[.1,math.nan]), 'finite'),
    (dict(impostor=[]), 'at least one'), (dict(impostor=[.1,.2], found=[1]), 'the person found')])
def test_bad_calibrations(kwargs, match):
    with pytest.raises(ValueError, match=match): of_scores(**{'impostor':[.1], **kwargs})

def test_bad_thresholds():
    c = of_scores([.1], genuine=[.1])
    with pytest.raises(ValueError, match='NaN'): c.far_at(math.nan)
    with pytest.raises(ValueError, match='NaN'): c.dir_at(math.nan)
    with pytest.raises(ValueError, match='from 1'): c.dir_at(.1, k=0)

def test_chunks_give_what_the_whole_gives():
    torch.manual_seed(0)
    dist = Distances(torch.randn(60,16), torch.randn(20_000,16))
    ids = torch.randint(50,(60,)),torch.randint(40,(20_000,))
    whole,chunks = calibrate_distances(dist, *ids),calibrate_distances(dist, *ids, chunk=7)
    np.testing.assert_allclose(whole.impostor, chunks.impostor, atol=1e-6)
    assert np.array_equal(whole.person, chunks.person) and len(whole.pairs)<250

# intervals

@settings(max_examples=60, deadline=None)
@given(st.integers(1,5000), st.floats(0,1), st.sampled_from([.5,.9,.95,.999]))
def test_interval_is_scipys(n, fraction, level):
    k = round(fraction*n)
    expected = stats.binomtest(k, n).proportion_ci(level, 'exact')
    assert binomial_interval(k, n, level)==pytest.approx((expected.low,expected.high), rel=1e-7, abs=1e-12)

def assert_crosses(function, x, value, rel=1e-8):
    "The function reaches the value within `rel` of x and of 1-x, and the roundings of x and of scipy"
    gap = rel*min(x, 1-x)+2.3e-16
    before,after = sorted([function(x-gap),function(x+gap)])
    assert before*(1-1e-6)<=value<=after*(1+1e-6), (before,value,after)

@pytest.mark.parametrize('n', [20_001,10**6,10**9])
def test_interval_of_many_searches(n):
    """By scipy's beta distribution, the bounds have the tails that they should have (its quantiles are wrong for
    1000 of 10^9). In milliseconds: the continued fraction took seconds"""
    for k in (0,1,2,7,1000,n//3,n//2+.5,n-1000.25,n-2,n-1,n):
        for level in (.5,.95,.999999):
            tail = (1-level)/2
            low,high = binomial_interval(k, n, level)
            if k:   assert_crosses(stats.beta(k, n-k+1).cdf, low, tail)
            if k<n: assert_crosses(stats.beta(k+1, n-k).sf, high, tail)
    start = time.process_time()
    for _ in range(5): binomial_interval(n//3, n)
    assert time.process_time()-start<.25

@pytest.mark.parametrize('n', [10**6,10**9,10**12])
@pytest.mark.parametrize('level', [.5,.95,.999999])
def test_one_of_many_searches_in_sixty_digits(n, level):
    "At the high end for 1 of n, (1-p)^n + n p (1-p)^(n-1) is the tail; for n-1 of n, the low end is 1 minus that"
    with decimal.localcontext(decimal.Context(prec=60)):
        tail = (1-decimal.Decimal(level))/2
        below,above = decimal.Decimal(0),decimal.Decimal(100)/n
        for _ in range(120):
            p = (below+above)/2
            if ((n-1)*(1-p).ln()).exp()*(1+(n-1)*p)>tail: below = p
            else:                                          above = p
    assert binomial_interval(1, n, level)[1]==pytest.approx(float(p), rel=1e-10)
    assert binomial_interval(n-1, n, level)[0]==pytest.approx(float(1-p), abs=2e-15, rel=0)

def test_almost_all_of_many_searches():
    "With effective numbers, less than one search may have found nobody"
    for k,n in ((10**9-.01,10**9),(10**6-.3,10**6),(.2,10**9)):
        low,high = binomial_interval(k, n)
        assert 0<=low<=k/n<=high<=1
        assert high==pytest.approx(stats.beta.ppf(.975, k+1, n-k), rel=1e-9, abs=1e-12)
        assert low==pytest.approx(stats.beta.ppf(.025, k, n-k+1), rel=1e-4, abs=1e-12)

def test_beta_cdf_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a,b = 10**rng.uniform(-1, 5, 2)
        anywhere,near_mean = rng.uniform(size=2)
        mean,sd = stats.beta.mean(a, b),stats.beta.std(a, b)
        for x in (anywhere,np.clip(mean+4*(near_mean-.5)*sd, 1e-9, 1-1e-9)):
            assert _beta_cdf(x, a, b)==pytest.approx(stats.beta.cdf(x, a, b), rel=1e-7, abs=1e-10)
    assert (_beta_cdf(0, 2, 3),_beta_cdf(1, 2, 3))==(0,1)

@pytest.mark.parametrize('args', [(1,0),(3,2),(-1,2),(1,2,1.)])
def test_interval_errors(args):
    with pytest.raises(ValueError, match='No interval'): binomial_interval(*args)

@pytest.mark.parametrize('df', [1,2,19,399,50_000])
@pytest.mark.parametrize('level', [.5,.9,.95,.999])
def test_quantiles_of_t_are_scipys(df, level):
    assert _t_squared(df, level)==pytest.approx(stats.t.ppf((1+level)/2, df)**2, rel=1e-6)

def test_searches_by_one_person_count_for_fewer():
    person = np.repeat(range(100), 4)
    clustered = np.repeat(np.arange(100)<5, 4).astype(float)
    scattered = (np.arange(400)%20==0).astype(float)
    few = 400*(stats.t.ppf(.975, 399)/stats.t.ppf(.975, 99))**2
    for score,threshold,k,n in ((clustered,.5,5,100),(scattered,.5,few/20,few),(scattered,2.,0,100)):
        assert of_scores(score, person).far_at(threshold)==pytest.approx((k/n,*binomial_interval(k, n)))
    def width(score): return np.diff(of_scores(score, person).far_at(.5)[1:])[0]
    assert width(clustered)>1.8*width(scattered)

def loop_effective(score, threshold, person, found, level):
    "The effective number of searches, with every pair of searches that share a person counted in a loop"
    n,people = len(score),len(set(person))
    sizes = [list(person).count(p) for p in set(person)]
    fewest = n**2/sum(size**2 for size in sizes)
    hits = [float(s>=threshold) for s in score]
    if people==1 or len(set(hits))==1: return fewest
    def effect(hits, ends):
        mean = sum(hits)/n
        deviation = [h-mean for h in hits]
        own = sum(d**2 for d in deviation)
        shared = sum(deviation[i]*deviation[j] for i in range(n) for j in range(n) if ends[i] & ends[j])
        return shared/own if own else 0
    searcher = [{p} for p in person]
    effects = [effect(hits, searcher),effect([float(s>=np.median(score)) for s in score], searcher)]
    if found is not None:
        effects.append(effect(hits, [{p,f} for p,f in zip(person, found)]))
        fewest = fewest/2
    t_ratio = stats.t.ppf((1+level)/2, n-1)/stats.t.ppf((1+level)/2, people-1)
    return min(n, max(n*t_ratio**2/max(1, max(effects)*people/(people-1)), fewest))

@settings(max_examples=60, deadline=None)
@given(st.integers(2,30), st.integers(1,8), st.booleans(), st.sampled_from([.8,.95]), st.integers(0,2**32-1))
def test_effective_number_is_that_of_the_loops(n, people, hide, level, seed):
    rng = np.random.default_rng(seed)
    person = rng.integers(0, people, n)
    found = (person+rng.integers(1, people+3, n))%(people+3) if hide else None
    score = rng.integers(0, 6, n)/4
    c = of_scores(score, person*7, level=level, found=found*7 if hide else ())
    for threshold in (-1,.25,.75,2):
        effective = loop_effective(score, threshold, person, found, level)
        rate = (score>=threshold).mean()
        expected = (rate,*binomial_interval(rate*effective, effective, level))
        assert c.far_at(threshold)==pytest.approx(expected, abs=1e-9)

@pytest.mark.parametrize('n', [20,500])
def test_one_person_is_one_search_however_often_they_come(n):
    c = of_scores(np.linspace(0, 1, n), [7]*n, far=.1)
    rate,low,high = c.far_at(c.threshold())
    assert rate==pytest.approx(.1) and (low,high)==pytest.approx(binomial_interval(.1, 1)) and high>.95

def test_two_people_are_few():
    _,high = of_scores(np.linspace(0, 1, 500), [7,8]*250, far=.1).interval()
    assert high>.35 # .13 if the searches were independent

def test_people_found_are_known_if_people_are_hidden():
    dist,pids = [[.1,.3,.2,.9],[.3,.1,.4,.2],[.2,.4,.1,.3]],[10,20,30,-1]
    c = calibrate_distances(dist, pids[:3], pids)
    code = dict(zip(pids[:3], c.person))
    assert c.found.tolist()==[code[30],code[10],code[10]]
    assert not len(calibrate_distances(dist, [10,20,40], pids, unknown='absent').found)

# coverage

@pytest.mark.parametrize('people,each,similarity', [
    (20,10,.9), (5,20,.5), pytest.param(100, 4, .9, marks=pytest.mark.slow),
    pytest.param(100, 10, .5, marks=pytest.mark.slow)])
def test_coverage_with_several_searches_each(people, each, similarity):
    "Scores that a person's searches share in part: the true rate, known exactly, is in the interval"
    rng,person = np.random.default_rng(0),np.repeat(range(people), each)
    fars = (.01,.05,.1)
    covered = {far:[] for far in fars}
    for _ in range(200):
        shared,own = np.repeat(rng.normal(size=people), each),rng.normal(size=len(person))
        c = of_scores(similarity**.5*shared+(1-similarity)**.5*own, person)
        for far in fars:
            threshold = c.threshold(far)
            _,low,high = c.far_at(threshold)
            covered[far].append(low<=stats.norm.sf(threshold)<=high)
    assert {far:np.mean(o)>=.94 for far,o in covered.items()}==dict.fromkeys(fars, True)

def hidden_trial(seed):
    """One calibration of 100 people hidden in turn, and the rate of strangers before other galleries:
    is it in the interval, and would it be if it did not matter who was found?"""
    rng = np.random.default_rng(seed)
    spread = np.linspace(2, .2, 24, dtype=np.float32)
    centre = 1.5+rng.standard_normal((5600,24), dtype=np.float32)*spread
    def embed(people):
        emb = people+.4*rng.standard_normal(people.shape, dtype=np.float32)
        return emb/np.linalg.norm(emb, axis=1, keepdims=True)
    person,strangers = np.repeat(range(100), 4),embed(centre[:5000])
    similarity = embed(centre[5000+person])@embed(centre[5000+person]).T
    similarity[person[:,None]==person] = -1
    best,found = similarity.max(1),person[similarity.argmax(1)]
    calibration = of_scores(best, person, found=found)
    threshold = calibration.threshold(.1)
    galleries = [embed(centre[5100+100*i+person]) for i in range(5)]
    rate = np.mean([(strangers@gallery.T).max(1)>=threshold for gallery in galleries])
    intervals = [c.far_at(threshold)[1:] for c in (calibration,of_scores(best, person))]
    return [low<=rate<=high for low,high in intervals]

def test_coverage_where_people_are_hidden():
    mutual,one_way = np.mean([hidden_trial(seed) for seed in range(100)], 0)
    assert mutual>=.91 and mutual>one_way

def test_coverage_of_independent_searches():
    "The true rate of the threshold for random scores, known exactly, is in the interval"
    rng,(low,high) = np.random.default_rng(0),of_scores(range(200)).interval(.05)
    rates = stats.norm.sf([of_scores(rng.normal(size=200)).threshold(.05) for _ in range(2000)])
    assert .95<=((low<=rates) & (rates<=high)).mean()<=.98 and rates.mean()==pytest.approx(10/201, abs=.002)

# thresholds

@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-4,12).map(lambda o: o/8), min_size=1, max_size=60), st.floats(1e-4,.9999))
def test_rate_never_exceeds_the_wanted_one(scores, far):
    c,n = of_scores(scores),len(scores)
    if math.floor(far*n+1e-12)<1:
        with pytest.raises(ValueError, match=f'{n} impostor searches'): c.threshold(far)
        return
    threshold = c.threshold(far)
    rate,low,high = c.far_at(threshold)
    assert low<=rate<=high and rate<=far and (np.float32(scores)>=threshold).mean()<=far
    lower = [s for s in scores if s<threshold]
    if lower: assert np.mean([s>=max(lower) for s in scores])>far-1e-12, 'a lower threshold would do'

@pytest.mark.parametrize('k', range(1,100))
def test_round_rates_lose_no_search(k):
    "100·0.29 is 28.999… in floating point"
    c = of_scores(np.arange(100))
    assert c.threshold(k/100)==100-k and (c.impostor>=100-k).mean()==k/100

@pytest.mark.parametrize('n', [49,98,103,200])
def test_out_of_reach_means_the_same_everywhere(n):
    "49·(1/49) is 0.999… in floating point"
    c = of_scores(np.arange(n))
    for far,within in ((1/n,True),(np.nextafter(1/n, 0),False),(np.nextafter(1/n, 1),True)):
        assert c.table([far]).threshold.notna().tolist()==[within]
        legend = c.plot_scores(far).get_legend().get_texts()
        assert any(o.get_text().startswith('threshold') for o in legend)==within
        if within: assert c.threshold(far)==n-1
        else: pytest.raises(ValueError, c.threshold, far).match('out of reach')
        plt.close('all')

def test_equal_scores():
    c = of_scores([.5]*20)
    threshold = c.threshold(.1)
    assert threshold>.5 and not (np.float32([.5])>=threshold).any() and c.far_at(threshold)[0]==0

def test_too_few_searches():
    c = of_scores(np.linspace(0, 1, 50), genuine=[.9], far=.001)
    message = 'out of reach of 50 impostor searches.*At least 1,000 are needed'
    for method in (c.threshold,c.interval,c.dir):
        with pytest.raises(ValueError, match=message): method()
    assert c.threshold(.02)==1 and 'at least 1,000 are needed' in repr(c)
    assert c.table().threshold.isna().tolist()==[False,False,True,True]
    assert len(c.plot_scores().get_legend().get_texts())==2 and not c.plot_dir().containers, 'no threshold, no interval'

def test_verification():
    torch.manual_seed(0)
    dist,query_pids,gallery_pids = torch.randn(40,200),torch.randint(5,(40,)),torch.randint(5,(200,))
    c = calibrate_distances(dist, query_pids, gallery_pids)
    scores,same = -dist,query_pids[:,None]==gallery_pids
    for far in (.001,.01,.2):
        threshold,true_accepts = c.verification(far)
        false_accepts = (scores[~same]>=threshold).double().mean().item()
        assert far/1.15<=false_accepts<=far
        assert true_accepts==pytest.approx((scores[same]>=threshold).double().mean().item())
    with pytest.raises(ValueError, match='lowest rate per pair'): c.verification(1e-9)

# files and reports

@pytest.fixture
def saved(tmp_path):
    "A calibration, and the file it was written to"
    torch.manual_seed(0)
    dist = Distances(torch.randn(40,8), torch.randn(90,8))
    about = {'data':'random', 'path':tmp_path}
    c = calibrate_distances(dist, torch.arange(40)%9, torch.arange(90)%6, far=.1, about=about)
    path = tmp_path/'folder'/'calibration.json'
    c.to_json(path)
    return c,path

@pytest.mark.parametrize('source', [lambda path: path, str, lambda path: path.read_text()])
def test_json_round_trip(saved, source):
    c,path = saved
    back = Calibration.from_json(source(path))
    assert back.to_json()==c.to_json() and repr(back)==repr(c)
    assert back.threshold()==c.threshold() and back.interval(.2)==c.interval(.2)
    assert back.verification(.1)==c.verification(.1)

@pytest.mark.parametrize('change', [
    dict(person=[]), dict(impostor=['x']*40), dict(far=None), dict(more=1), dict(genuine=[None]*40),
    dict(card='ReIDResult')])
def test_json_with_wrong_values(saved, change):
    text = json.dumps(json.loads(saved[0].to_json()) | change)
    with pytest.raises(ValueError, match='is not a valid calibration'): Calibration.from_json(text)

def test_json_of_something_else(saved):
    values = json.loads(saved[0].to_json())
    del values['genuine']
    for text in ('{', '{}', '{"card":"ReIDResult"}', json.dumps(values)):
        with pytest.raises(ValueError, match='is not a valid calibration'): Calibration.from_json(text)

def test_card_and_plots():
    c = of_scores(np.linspace(0, .8, 200), genuine=np.linspace(.3, 1, 50), about={'data':'line'}, far=.02, level=.9)
    for text in ('FAR 0.02','90% interval','200 by 200 people, not in the gallery','cameras unknown','line'):
        assert text in repr(c)
    assert '<table' in c._repr_html_()
    assert c.table([.1]).loc[.1,'DIR rank-1']==c.dir(.1)
    ax = c.plot_dir(.1, ks=(1,3))
    assert [o.get_label() for o in ax.lines[:2]]==['rank 1','rank 3'] and ax.get_xscale()=='log'
    assert len(ax.containers)==1, 'the interval'
    bars = c.plot_scores(.1).patches
    assert sum(o.get_height() for o in bars)==pytest.approx(2)

def test_needs_neither_torch_nor_fastai():
    code = "import sys,pyramidreid.evaluation.openset; assert not {'torch','fastai','matplotlib'} & {*sys.modules}"
    subprocess.run([sys.executable,'-c',code], check=True)

# with a learner

def test_learner_calibrates_as_it_evaluates(trained):
    c,card = trained.calibrate(far=.1),trained.evaluate()
    assert c.dir_at(-2)==pytest.approx(card.rank1) and len(c.impostor)==card.n_query
    assert c.cameras and c.distance=='cosine'
    assert len(c.about['model'])==64 and c.about['backbone']==card.about['backbone']
    assert c.far_at(c.threshold())[0]<=.1
    with pytest.raises(ValueError, match='every query'): trained.calibrate(unknown='absent')

def test_learner_calibrates_with_absent_people(trained):
    items = trained.dls.valid.items
    is_query = items.split=='query'
    absent = items.pid.isin(items.pid[is_query].unique()[:2])
    table = items[is_query | ~absent].drop(columns=['label','camera','role'])
    dl = trained.dls.test_dl(table, with_labels=True)
    c = trained.calibrate(dl, unknown='absent', about={'data':'mine'})
    assert len(c.impostor)==(is_query & absent).sum() and c.about['data']=='mine'
