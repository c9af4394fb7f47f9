"Open-set searches against loops over images, intervals against scipy, and what a threshold promises"
import json
import math
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pyramidreid.evaluation.intervals import _beta_cdf, _t2, binomial_interval
from pyramidreid.evaluation.openset import *
from pyramidreid.evaluation.retrieval import Distances, evaluate_distances
from pyramidreid.training.calibration import *


def of_scores(impostor, person=None, genuine=(), place=None, **kwargs):
    "A calibration of bare scores"
    return Calibration(**{**dict(impostor=impostor, person=range(len(impostor)) if person is None else person, genuine=genuine, place=[1]*len(genuine) if place is None else place,
        pairs=[], n_gallery=9, n_ids=3, unknown='absent', cameras=False, distance='cosine'), **kwargs})

# scores, by loops

def plain_searches(d, qp, gp, qc, gc, unknown):
    "Lists of (score, person), of (score, place), and of the scores of pairs of different people and of one"
    impostor,genuine,other,match = [],[],[],[]
    for i in range(len(d)):
        if qp[i]==-1: continue
        here = [j for j in range(len(gp)) if gp[j]!=-1 and not (gp[j]==qp[i] and qc is not None and gc[j]==qc[i])]
        ranked = sorted(here, key=lambda j: (d[i][j],j))
        right = [n for n,j in enumerate(ranked) if gp[j]==qp[i]]
        wrong = [j for j in ranked if gp[j]!=qp[i]]
        if right: genuine.append((-d[i][ranked[right[0]]],right[0]+1))
        if wrong and (unknown=='hide' or not right): impostor.append((-d[i][wrong[0]],qp[i]))
        other += [-d[i][j] for j in wrong]
        match += [-d[i][ranked[n]] for n in right]
    return impostor,genuine,other,match

@st.composite
def rankings(draw):
    "Distances with ties, few people, few cameras or none, junk among queries and gallery"
    n_q,n_g = draw(st.integers(1,6)),draw(st.integers(1,20))
    rng = np.random.default_rng(draw(st.integers(0,2**32-1)))
    n_pid,n_cam,hi = draw(st.integers(1,5)),draw(st.integers(0,3)),draw(st.sampled_from([2,5,1000]))
    cams = [rng.integers(0, n_cam, n) if n_cam else None for n in (n_q,n_g)]
    return (rng.integers(-hi, hi, (n_q,n_g)).astype(np.float32)/8, rng.integers(-1, n_pid+1, n_q), rng.integers(-1, n_pid, n_g), *cams)

@settings(max_examples=200, deadline=None)
@given(rankings(), st.sampled_from(['hide','absent']), st.sampled_from(['numbers','strings','tensors','double','half']), st.integers(1,4))
def test_searches_are_those_of_the_loops(p, unknown, kind, chunk):
    d,qp,gp,qc,gc = p
    impostor,genuine,other,match = plain_searches(*p, unknown)
    text = lambda x: None if x is None else np.array([str(o) for o in x])
    args = {'strings':(d,*map(text, (qp,gp,qc,gc))), 'tensors':[None if o is None else torch.from_numpy(o) for o in p],
            'double':(d.astype(float),*p[1:]), 'half':(torch.from_numpy(d).half(),*p[1:])}.get(kind, p)
    if not impostor:
        with pytest.raises(ValueError, match='no search by an unknown|junk'): calibrate_distances(*args, unknown=unknown)
        return
    before = d.copy()
    res = calibrate_distances(*args, unknown=unknown, chunk=chunk)
    assert np.array_equal(d, before)
    f = (lambda x: np.float32(np.float16(x))) if kind=='half' else np.float32
    assert res.impostor.tolist()==[f(s) for s,_ in impostor] and len({*zip(res.person, [p for _,p in impostor])})==len({*res.person})==len({p for _,p in impostor})
    assert res.genuine.tolist()==[f(s) for s,_ in genuine]
    if kind!='half': assert res.place.tolist()==[r for _,r in genuine]
    assert (res.n_gallery,res.n_ids)==((gp!=-1).sum(),len({*gp}-{-1}))
    other,match = f(other),f(match)
    assert len(res.pairs)==0 if not (len(other) and len(match)) else (res.pairs[-1,1:]==1).all()
    for t,false,true in res.pairs: assert (false,true)==(pytest.approx((other>=t).mean()),pytest.approx((match>=t).mean()))
    assert (np.diff(res.pairs[:,1])>=0).all() and (np.diff(res.pairs[:,0])<=0).all()
    if genuine:
        card = evaluate_distances(*args)
        if kind!='half': assert res.dir_at(-np.inf)==pytest.approx(card.rank1) and res.dir_at(-np.inf, 5)==pytest.approx(card.rank5)
        for t in (-1,0,1): assert res.dir_at(t, 2)==np.mean([f(s)>=t and r<=2 for s,r in zip([s for s,_ in genuine], res.place)])

def test_places_as_in_evaluation_on_real_numbers():
    torch.manual_seed(0)
    d = Distances(torch.randn(80,8), torch.randn(500,8))
    ids = torch.randint(12,(80,)),torch.randint(-1,10,(500,)),torch.randint(3,(80,)),torch.randint(3,(500,))
    res,card = calibrate_distances(d, *ids),evaluate_distances(d, *ids)
    assert res.place.tolist()==card.first_rank[card.first_rank>0].tolist() and len(res.impostor)==80
    assert -1<=res.impostor.min() and res.impostor.max()<=1 and res.distance=='cosine'
    q,j = ids[0].numpy(),ids[1].numpy()
    s = -d[:].numpy()
    s[(q[:,None]==j) | (j==-1)] = -9
    assert np.array_equal(res.impostor, s.max(1))
    gone = calibrate_distances(d, *ids, unknown='absent')
    assert len(gone.impostor)==80-card.n_query_valid and len(gone.genuine)==card.n_query_valid

def test_queries_all_known_or_all_unknown():
    d = [[.1,.2],[.3,.1]]
    with pytest.raises(ValueError, match="every query's person is in the gallery. Take unknown='hide'"): calibrate_distances(d, [1,2], [1,2], unknown='absent')
    assert calibrate_distances(d, [1,2], [1,2]).impostor.tolist()==pytest.approx([-.2,-.3])
    res = calibrate_distances(d, [8,9], [1,2], unknown='absent', far=.5)
    assert res.impostor.tolist()==pytest.approx([-.1,-.1]) and not len(res.genuine)
    with pytest.raises(ValueError, match='no detection rate'): res.dir()
    with pytest.raises(ValueError, match='no ROC'): res.plot_roc()
    with pytest.raises(ValueError, match='no pairs of both kinds'): res.verification(.5)
    assert 'known searches' in repr(res) and 'nan' not in repr(res)
    res.plot_scores()

def test_one_camera_and_one_person():
    d = [[.1,.2,.3]]
    one = calibrate_distances(d, [1], [1,1,2], [0], [0,0,0], unknown='absent')
    assert one.impostor.tolist()==pytest.approx([-.3]) and not len(one.genuine) and one.cameras
    with pytest.raises(ValueError, match='no one but the person'): calibrate_distances(d, [1], [1,1,1])
    with pytest.raises(ValueError, match='all gallery images are junk'): calibrate_distances(d, [1], [-1]*3)
    with pytest.raises(ValueError, match='all queries are junk'): calibrate_distances(d, [-1], [1]*3)
    with pytest.raises(ValueError, match='a row per query'): calibrate_distances(np.zeros((1,0)), [1], [])

@pytest.mark.parametrize('bad', [np.nan,-np.inf])
def test_what_is_no_distance(bad):
    with pytest.raises(ValueError, match='NaN'): calibrate_distances([[bad,1.]], [1], [1,2])
    with pytest.raises(ValueError, match='infinitely far'): calibrate_distances([[np.inf,1.]], [1], [1,2])
    res = calibrate_distances([[.5,bad,np.inf,.7]], [1], [1,-1,2,3])
    assert res.impostor.tolist()==pytest.approx([-.7])

def test_errors():
    d,ids = [[.1,.2]],([1],[1,2])
    for kw,say in ((dict(unknown='some'),"'hide' or 'absent'"),(dict(chunk=0),'from 1 on'),(dict(far=0),'no rate'),(dict(far=math.nan),'no rate'),(dict(query_cams=[1]),'or neither')):
        with pytest.raises(ValueError, match=say): calibrate_distances(d, *ids, **kw)
    for far in (0,1,-.1,1.5,math.nan):
        with pytest.raises(ValueError, match='no rate of false accepts'): of_scores([.1]).threshold(far)
    for kw,say in ((dict(level=95),'no confidence'),(dict(genuine=[.1], place=[0]),'from 1 on'),(dict(pairs=[[math.nan,.1,.2]]),'finite'),(dict(impostor=[.1,math.nan]),'finite'),(dict(impostor=[]),'at least one')):
        with pytest.raises(ValueError, match=say): of_scores(**{'impostor':[.1], **kw})
    c = of_scores([.1], genuine=[.1])
    for f,say in ((lambda: c.far_at(math.nan),'NaN'),(lambda: c.dir_at(math.nan),'give a score'),(lambda: c.dir_at(.1, k=0),'from 1 on')):
        with pytest.raises(ValueError, match=say): f()
    with pytest.raises(ValueError, match='5 entries'): calibrate_distances(d, [1]*5, [1,2])

def test_half_a_million_pairs_in_little_memory():
    "Blocks give what the whole gives"
    torch.manual_seed(0)
    d = Distances(torch.randn(300,16), torch.randn(20_000,16))
    ids = torch.randint(50,(300,)),torch.randint(40,(20_000,))
    a,b = calibrate_distances(d, *ids),calibrate_distances(d, *ids, chunk=7)
    np.testing.assert_allclose(a.impostor, b.impostor, atol=1e-6)
    assert np.array_equal(a.person, b.person) and len(a.pairs)<250

# intervals

@settings(max_examples=60, deadline=None)
@given(st.integers(1,5000), st.floats(0,1), st.sampled_from([.5,.9,.95,.999]))
def test_interval_is_scipys(n, share, level):
    k = round(share*n)
    want = stats.binomtest(k, n).proportion_ci(level, 'exact')
    assert binomial_interval(k, n, level)==pytest.approx((want.low,want.high), rel=1e-7, abs=1e-12)

def test_beta_cdf_is_scipys():
    rng = np.random.default_rng(0)
    for a,b,x in zip(10**rng.uniform(-1,5,300), 10**rng.uniform(-1,5,300), rng.uniform(size=300)):
        mean,sd = stats.beta.mean(a, b),stats.beta.std(a, b)
        for o in (x,np.clip(mean+4*(x-.5)*sd, 1e-9, 1-1e-9)): assert _beta_cdf(o, a, b)==pytest.approx(stats.beta.cdf(o, a, b), rel=1e-7, abs=1e-10)
    assert (_beta_cdf(0, 2, 3),_beta_cdf(1, 2, 3))==(0,1)

def test_interval_errors():
    for o in ((1,0),(3,2),(-1,2),(1,2,1.)):
        with pytest.raises(ValueError, match='no interval'): binomial_interval(*o)

def test_searches_of_one_person_count_for_less():
    who = np.repeat(range(100), 4)
    alike,apart = np.repeat(np.arange(100)<5, 4).astype(float),(np.arange(400)%20==0).astype(float)
    width = lambda score: np.diff(of_scores(score, who).far_at(.5)[1:])[0]
    few = 400*(stats.t.ppf(.975, 399)/stats.t.ppf(.975, 99))**2
    for score,t,k,n in ((alike,.5,5,100),(apart,.5,few/20,few),(apart,2.,0,100)): assert of_scores(score, who).far_at(t)==pytest.approx((k/n,*binomial_interval(k, n)))
    assert width(alike)>1.8*width(apart)

@pytest.mark.parametrize('df', [1,2,19,399,50_000])
def test_quantiles_of_t_are_scipys(df):
    for level in (.5,.9,.95,.999): assert _t2(df, level)==pytest.approx(stats.t.ppf((1+level)/2, df)**2, rel=1e-6)

def plain_effective(score, t, person, found, level):
    "Searches that share a person, at either end, counted pair by pair"
    n,people = len(score),len(set(person))
    sizes = [list(person).count(p) for p in set(person)]
    least = n**2/sum(o**2 for o in sizes)
    hits = [float(s>=t) for s in score]
    if people==1 or len(set(hits))==1: return least
    def effect(hits, ends):
        mean = sum(hits)/n
        rest = [h-mean for h in hits]
        own = sum(o**2 for o in rest)
        return sum(rest[i]*rest[j] for i in range(n) for j in range(n) if ends[i] & ends[j])/own if own else 0
    one = [{p} for p in person]
    d = max(effect(hits, one), effect([float(s>=np.median(score)) for s in score], one))
    if found is not None: d = max(d, effect(hits, [{p,f} for p,f in zip(person, found)]))
    few = (stats.t.ppf((1+level)/2, n-1)/stats.t.ppf((1+level)/2, people-1))**2
    return min(n, max(n*few/max(1, d*people/(people-1)), least if found is None else least/2))

@settings(max_examples=150, deadline=None)
@given(st.integers(2,30), st.integers(1,8), st.booleans(), st.sampled_from([.8,.95]), st.integers(0,2**32-1))
def test_effective_number_by_pairs_of_searches(n, people, hide, level, seed):
    rng = np.random.default_rng(seed)
    person = rng.integers(0, people, n)*7
    found = (person//7+rng.integers(1, people+3, n))%(people+3)*7 if hide else None
    score = rng.integers(0, 6, n)/4
    c = of_scores(score, person, level=level, found=() if found is None else found)
    for t in (-1,.25,.5,1.25,2):
        m = plain_effective(score, t, person, found, level)
        rate = (score>=t).mean()
        assert c.far_at(t)==pytest.approx((rate,*binomial_interval(rate*m, m, level)), abs=1e-9)

def test_one_person_is_one_search():
    "However often they come"
    for n in (20,500):
        c = of_scores(np.linspace(0, 1, n), [7]*n, far=.1)
        rate,low,high = c.far_at(c.threshold())
        assert rate==pytest.approx(.1) and (low,high)==pytest.approx(binomial_interval(.1, 1)) and high>.95
    low,high = of_scores(np.linspace(0, 1, 500), [7,8]*250, far=.1).interval()
    assert high>.35 # as of independent searches it would be .13

def test_who_found_whom_is_known_where_people_hide():
    d,pids = [[.1,.3,.2,.9],[.3,.1,.4,.2],[.2,.4,.1,.3]],[10,20,30,-1]
    c = calibrate_distances(d, pids[:3], pids)
    codes = dict(zip(pids[:3], c.person))
    assert c.found.tolist()==[codes[30],codes[10],codes[10]]
    assert not len(calibrate_distances(d, [10,20,40], pids, unknown='absent').found)
    with pytest.raises(ValueError, match='the person found'): of_scores([.1,.2], found=[1])

@pytest.mark.parametrize('people,each,alike', [(20,10,.9),(100,4,.9),(100,10,.5),(5,20,.5)])
@pytest.mark.parametrize('far', [.01,.05,.1])
def test_coverage_with_several_searches_each(people, each, alike, far):
    "Scores that people share in part, few and many false alarms: the true rate, known exactly, is in the interval"
    rng,who = np.random.default_rng(0),np.repeat(range(people), each)
    seen = []
    for _ in range(200):
        c = of_scores(alike**.5*np.repeat(rng.normal(size=people), each)+(1-alike)**.5*rng.normal(size=len(who)), who)
        t = c.threshold(far)
        low,high = c.far_at(t)[1:]
        seen.append(low<=stats.norm.sf(t)<=high)
    assert np.mean(seen)>=.94

def test_coverage_where_people_hide():
    "Each person hidden in turn from a gallery of those people: the rate of strangers before other galleries is in the interval"
    seen = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        def emb(p):
            x = p+.4*rng.standard_normal(p.shape, dtype=np.float32)
            return x/np.linalg.norm(x, axis=1, keepdims=True)
        centre = 1.5+rng.standard_normal((5600,24), dtype=np.float32)*np.linspace(2, .2, 24, dtype=np.float32)
        who,strangers,true = np.repeat(range(100), 4),emb(centre[:5000]),[]
        s = emb(centre[5000+who])@emb(centre[5000+who]).T
        s[who[:,None]==who] = -1
        both = [of_scores(s.max(1), who, found=o) for o in (who[s.argmax(1)],())]
        t = both[0].threshold(.1)
        true = np.mean([(strangers@emb(centre[5100+100*i+who]).T).max(1)>=t for i in range(5)])
        seen.append([low<=true<=high for low,high in (c.far_at(t)[1:] for c in both)])
    now,apart = np.mean(seen, 0)
    assert now>=.91 and now>apart

def test_coverage():
    "The true rate of the threshold for drawn scores, of which it is known exactly, is in the interval"
    rng,(low,high) = np.random.default_rng(0),of_scores(range(200)).interval(.05)
    true = stats.norm.sf([of_scores(rng.normal(size=200)).threshold(.05) for _ in range(2000)])
    assert .95<=((low<=true) & (true<=high)).mean()<=.98 and true.mean()==pytest.approx(10/201, abs=.002)

# thresholds

@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-4,12).map(lambda o: o/8), min_size=1, max_size=60), st.floats(1e-4,.9999))
def test_rate_is_never_above_what_was_asked(scores, far):
    c = of_scores(scores)
    n = len(scores)
    if math.floor(far*n+1e-12)<1:
        with pytest.raises(ValueError, match=f'{n} impostor searches'): c.threshold(far)
        return
    t = c.threshold(far)
    at,low,high = c.far_at(t)
    assert low<=at<=high and at<=far and (np.float32(scores)>=t).mean()<=far
    lower = [s for s in scores if s<t]
    assert not lower or np.mean([s>=max(lower) for s in scores])>far-1e-12, 'a lower threshold would have done'

def test_round_rates_lose_no_search():
    "100·0.29 is 28.999… in floating point"
    c = of_scores(np.arange(100))
    for k in range(1,100): assert c.threshold(k/100)==100-k and (c.impostor>=100-k).mean()==k/100

def test_what_is_out_of_reach_is_so_everywhere():
    "49·(1/49) is 0.999… in floating point"
    for n in (49,98,103,200):
        c = of_scores(np.arange(n))
        for far,k in ((1/n,1),(np.nextafter(1/n, 0),0),(np.nextafter(1/n, 1),1)):
            assert c.allowed(far)==k and c.table([far]).threshold.notna().tolist()==[k==1]
            assert ('threshold' in [t.get_text().split()[0] for t in c.plot_scores(far).get_legend().get_texts()])==(k==1)
            plt.close('all')

def test_equal_scores():
    c = of_scores([.5]*20)
    assert c.threshold(.1)>.5 and not (np.float32([.5])>=c.threshold(.1)).any() and c.far_at(c.threshold(.1))[0]==0

def test_too_few():
    c = of_scores(np.linspace(0, 1, 50), genuine=[.9], far=.001)
    for f in (c.threshold,c.interval,c.dir):
        with pytest.raises(ValueError, match='out of reach of 50 impostor searches.*At least 1,000 are needed'): f()
    assert c.threshold(.02)==1 and 'at least 1,000 are needed' in repr(c) and c.table().threshold.isna().tolist()==[False,False,True,True]
    c.plot_scores()
    c.plot_dir()

def test_verification():
    torch.manual_seed(0)
    d,q,g = torch.randn(40,200),torch.randint(5,(40,)),torch.randint(5,(200,))
    c = calibrate_distances(d, q, g)
    s,same = -d,q[:,None]==g
    for far in (.001,.01,.2):
        t,tar = c.verification(far)
        false = (s[~same]>=t).double().mean().item()
        assert far/1.15<=false<=far and tar==pytest.approx((s[same]>=t).double().mean().item())
    with pytest.raises(ValueError, match='smallest rate per pair'): c.verification(1e-9)

# keeping and showing

def test_json(tmp_path):
    torch.manual_seed(0)
    c = calibrate_distances(Distances(torch.randn(40,8), torch.randn(90,8)), torch.arange(40)%9, torch.arange(90)%6, far=.1, about={'data':'drawn', 'path':tmp_path})
    text = c.to_json(tmp_path/'sub'/'c.json')
    for back in (Calibration.from_json(text),Calibration.from_json(tmp_path/'sub'/'c.json'),Calibration.from_json(str(tmp_path/'sub'/'c.json'))):
        assert back.to_json()==text and back.threshold()==c.threshold() and back.interval(.2)==c.interval(.2) and back.verification(.1)==c.verification(.1) and repr(back)==repr(c)
    d = json.loads(text)
    for bad in ('{', '{}', '{"card":"ReIDResult"}', json.dumps({**d, 'person':[]}), json.dumps({**d, 'impostor':['x']*40}), json.dumps({**d, 'far':None}),
                json.dumps({**d, 'more':1}), json.dumps({k:v for k,v in d.items() if k!='genuine'}), json.dumps({**d, 'genuine':[None]*len(d['genuine'])})):
        with pytest.raises(ValueError, match='is no calibration'): Calibration.from_json(bad)

def test_card_and_plots():
    c = of_scores(np.linspace(0, .8, 200), genuine=np.linspace(.3, 1, 50), about={'data':'line'}, far=.02, level=.9)
    for s in ('FAR 0.02','90% interval','200 by 200 people, not in the gallery','cameras unknown','line'): assert s in repr(c)
    assert '<table' in c._repr_html_()
    assert c.table([.1]).loc[.1,'DIR rank-1']==c.dir(.1)
    ax = c.plot_dir(.1, ks=(1,3))
    assert len(ax.lines)>=2 and ax.get_xscale()=='log'
    bars = c.plot_scores(.1).patches
    assert sum(o.get_height() for o in bars)==pytest.approx(2)

def test_needs_neither_torch_nor_fastai():
    code = "import sys,pyramidreid.evaluation.openset; assert not {'torch','fastai','matplotlib'} & {*sys.modules}"
    subprocess.run([sys.executable,'-c',code], check=True)

def test_learner(trained):
    c = trained.calibrate(far=.1)
    card = trained.evaluate()
    assert c.dir_at(-2)==pytest.approx(card.rank1) and c.cameras and c.distance=='cosine' and len(c.impostor)==card.n_query and len(c.about['model'])==64
    assert c.far_at(c.threshold())[0]<=.1 and c.about['backbone']==card.about['backbone']
    with pytest.raises(ValueError, match='every query'): trained.calibrate(unknown='absent')
    items = trained.dls.valid.items
    people = items.pid[items.split=='query'].unique()
    some = items[(items.split=='query') | ~items.pid.isin(people[:2])].drop(columns=['label','camera','role'])
    gone = trained.calibrate(trained.dls.test_dl(some, with_labels=True), unknown='absent', about={'data':'mine'})
    assert len(gone.impostor)==items[(items.split=='query') & items.pid.isin(people[:2])].shape[0] and gone.about['data']=='mine'
