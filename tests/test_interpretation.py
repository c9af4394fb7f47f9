"Worst queries, confused people, cameras, label errors and the plane: against plain loops, by hand, and with what real tables lack"
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from pyramidreid.core import Role
from pyramidreid.evaluation.plots import rank_gallery
from pyramidreid.evaluation.retrieval import NoMatchError, evaluate
from pyramidreid.explain.interpretation import *
from pyramidreid.explain.labels import *


def make(n=60, n_ids=6, seed=0, unknown=0, junk=0, roles=True, dim=6):
    "Random embeddings of a table"
    g = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    label,cam = rng.integers(0, n_ids, n),rng.integers(0, 3, n)
    cam[:unknown] = -1
    label[n//2:n//2+junk] = -1
    items = pd.DataFrame(dict(fn=[f'{i}.jpg' for i in range(n)], pid=label*10+1, cam=[None if c<0 else f'c{c}' for c in cam], label=label, camera=cam,
                              role=rng.choice([Role.QUERY,Role.GALLERY], n) if roles else Role.TRAIN))
    items.loc[items.label<0,'pid'] = -1
    items.loc[items.label<0,'role'] = items.role.where(~(items.label<0), Role.GALLERY if roles else Role.TRAIN)
    centre = torch.randn(n_ids+1,dim,generator=g)
    return ReIDInterpretation(centre[label]+torch.randn(n,dim,generator=g), items),items

CASES = [dict(), dict(unknown=20), dict(unknown=60), dict(junk=5), dict(seed=3, n_ids=15, junk=3, unknown=4)]

def plain(interp):
    "For each query: the places of its allowed gallery images, in order, as (label, right)"
    q,g = interp.queries,interp.gallery
    emb = F.normalize(interp.emb, dim=1)
    sim = emb[:len(q)] @ emb[len(q):len(q)+len(g)].T
    for i,(l,c) in enumerate(zip(q.label, q.camera)):
        order = sorted(range(len(g)), key=lambda j: -sim[i,j].item())
        yield i,l,[(g.label.iloc[j],g.label.iloc[j]==l,j) for j in order if g.label.iloc[j]>=0 and not (g.label.iloc[j]==l and c>=0 and g.camera.iloc[j]==c)]

@pytest.mark.parametrize('case', CASES)
def test_worst_queries_by_a_plain_loop(case):
    interp,_ = make(**case)
    want = {}
    for i,_,row in plain(interp):
        hits = [k for k,o in enumerate(row) if o[1]]
        if hits: want[i] = (np.mean([(n+1)/(k+1) for n,k in enumerate(hits)]),hits[0]+1,len(hits),[interp.gallery.pid.iloc[o[2]] for o in row[:hits[0]]])
    got = interp.worst(1000)
    assert set(got.index)==set(want) and got.AP.is_monotonic_increasing
    for i,o in got.iterrows():
        ap,first,n,above = want[i]
        assert (o.AP,o.first_right,o.matches)==(pytest.approx(ap),first,n)
        assert o.above==', '.join(map(str, above[:5]))+' …'*(len(above)>5)
    assert interp.worst(3).index.tolist()==got.index[:3].tolist()

@pytest.mark.parametrize('case', CASES)
def test_confused_people_by_a_plain_loop(case):
    interp,_ = make(**case)
    above,of = {},{}
    for _,a,row in plain(interp):
        for p,(_,right,_) in enumerate(row):
            if not right: continue
            for k,(b,own,_) in enumerate(row):
                if own: continue
                of[a,b] = of.get((a,b),0)+1
                above[a,b] = above.get((a,b),0)+(k<p)
    got = interp.confused(10000)
    pid = lambda l: l*10+1
    assert {(o.pid,o.other):(o.above,o['of']) for _,o in got.iterrows()}=={(pid(a),pid(b)):(n,of[a,b]) for (a,b),n in above.items() if n}
    for _,o in got.iterrows():
        a,b = (o.pid-1)//10,(o.other-1)//10
        assert o.share==pytest.approx(o.above/o['of'])
        assert o.back==pytest.approx(above[b,a]/of[b,a]) if (b,a) in of else np.isnan(o.back)
    assert got.share.is_monotonic_decreasing

def test_ties_are_broken_by_gallery_order():
    items = pd.DataFrame(dict(fn=list('qabc'), pid=[1,2,1,2], cam=None, label=[0,1,0,1], camera=-1, role=[Role.QUERY]+[Role.GALLERY]*3))
    got = ReIDInterpretation(torch.ones(4,2), items).confused()
    assert got[['pid','other','above','of']].values.tolist()==[[1,2,1,2]] and np.isnan(got.back[0])

@pytest.mark.parametrize('block', [False,True])
def test_ranked_is_rank_gallery_whatever_the_blocks(block):
    interp,_ = make(n=80, junk=4) if not block else make(n=80, junk=4, dim=2**18) # 32 rows in a block
    q,g = interp._split(interp.emb)
    want = rank_gallery(q[[3,0]], g, interp.queries.iloc[[3,0]], interp.gallery, 7)
    got = interp.ranked([3,0], 7)
    assert got.fn.tolist()==want.fn.tolist() and got['rank'].tolist()==want['rank'].tolist() and got.right.tolist()==want.right.tolist()

@pytest.mark.parametrize('case', [dict(n=120), dict(n=120, unknown=40), dict(n=120, junk=8)])
def test_camera_pairs_are_evaluations_of_their_own(case):
    interp,_ = make(**case)
    pairs,(q,g),(eq,eg) = interp.camera_pairs(),(interp.queries,interp.gallery),interp._split(interp.emb)
    assert pairs.attrs['unknown camera']==dict(queries=(q.camera<0).sum(), gallery=(g.camera<0).sum())
    seen = 0
    for a in ('c0','c1','c2'):
        for b in ('c0','c1','c2'):
            i,j = ((o.cam==c).to_numpy(copy=True) for o,c in ((q,a),(g,b)))
            cell = pairs[(pairs.query_cam==a) & (pairs.gallery_cam==b)]
            if a==b: assert cell.empty; continue
            want = evaluate(eq[i], eg[j], q.label[i].tolist(), g.label[j].tolist())
            assert (cell.mAP.item(),cell['rank-1'].item(),cell.queries.item())==(round(100*want.mAP,2),round(100*want.rank1,2),want.n_query_valid)
            seen += 1
    assert seen==6==len(pairs)
    fig = interp.plot_camera_pairs('rank-1')
    assert sum('n=' in t.get_text() for t in fig.axes[0].texts)==6

def test_no_camera_known():
    interp,_ = make(unknown=60)
    with pytest.raises(ValueError, match='known for 0 of'): interp.camera_pairs()
    with pytest.raises(ValueError, match="'mAP' and 'rank-1'"): interp.plot_camera_pairs('AP')

def test_the_order_of_the_table_does_not_matter():
    interp,items = make(n=40)
    emb = torch.empty_like(interp.emb)
    emb[np.argsort(items.role.map({Role.QUERY:0,Role.GALLERY:1}), kind='stable')] = interp.emb
    mix = np.random.default_rng(1).permutation(40)
    other = ReIDInterpretation(emb[mix], items.iloc[mix])
    a,b = interp.confused(1000),other.confused(1000)
    assert other.card.mAP==pytest.approx(interp.card.mAP) and a.sort_values(['pid','other']).to_string(index=False)==b.sort_values(['pid','other']).to_string(index=False)

# labels

def plain_likeness(emb, labels, mixed=()):
    x,n = F.normalize(emb.double(), dim=1).numpy(),len(labels)
    for i in range(n):
        others = {l:[j for j in range(n) if labels[j]==l and j!=i] for l in set(labels)}
        own,sims = others.pop(labels[i]),x@x[i]
        near = max((j for o in others.values() for j in o), key=lambda j: sims[j])
        means = {l:sims[o].mean() for l,o in others.items() if len(o)>1 and l not in mixed}
        other = max(means, key=means.get)
        has = own and labels[i] not in mixed
        yield (sims[own].mean() if has else np.nan, sims[own].max() if has else np.nan, sims[near], near, means[other], other)

@pytest.mark.parametrize('mixed', [(),(2,)])
def test_likeness_by_a_plain_loop(mixed):
    torch.manual_seed(0)
    emb,labels = torch.randn(50,5),torch.randint(0,8,(50,))
    labels[7] = 8 # alone in its id
    got = id_similarity(emb, labels, mixed)
    want = np.array(list(plain_likeness(emb, labels.tolist(), mixed)))
    np.testing.assert_allclose(got.to_numpy(dtype=float), want, atol=1e-6)
    assert got.own_mean.isna().sum()==1+sum((labels==m).sum() for m in mixed)

def clumps(seed=0, n_ids=8, each=6, noise=.25):
    "Well separated people, in embeddings and table"
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(n_ids).repeat_interleave(each)
    emb = torch.randn(n_ids,32,generator=g)[label] + noise*torch.randn(len(label),32,generator=g)
    items = pd.DataFrame(dict(fn=[f'{i}.jpg' for i in range(len(label))], pid=label+1, cam=1, label=label, camera=0, role=[Role.QUERY,*[Role.GALLERY]*(each-1)]*n_ids))
    order = np.argsort(items.role, kind='stable')
    return emb[order],items.iloc[order].reset_index(drop=True)

def test_swapped_labels_come_first():
    emb,items = clumps()
    for c in ('pid','label'): items.loc[[20,40],c] = items.loc[[40,20],c].to_numpy()
    assert items.label[20]!=items.label[40]
    got = ReIDInterpretation(emb, items).label_errors(2)
    for sign in ('outlier','neighbour'): assert set(got.index[got.sign==sign])=={20,40}
    o = got[got.sign=='outlier'].loc[20]
    assert o.pid==items.pid[20] and o.other_pid==items.pid[40] and o.fn=='%s'%items.fn[20] and 'in the mean to its own id' in o.why
    assert (got.groupby('sign').score.apply(lambda s: s.is_monotonic_decreasing)).all() and (got.score>0).all()

def test_a_copy_under_another_id_is_the_first_duplicate():
    emb,items = clumps()
    emb = torch.cat([emb,emb[20:21]])
    items = pd.concat([items,items.iloc[[20]].assign(pid=items.pid[45], label=items.label[45])], ignore_index=True)
    got = ReIDInterpretation(emb, items).label_errors(3)
    first = got[got.sign=='duplicate'].iloc[0]
    assert first.name==48 and first.fn==first.other_fn and first.other_pid==items.pid[20]

def test_clean_clumps_have_nothing_to_show():
    got = ReIDInterpretation(*clumps()).label_errors(5)
    assert got.empty and list(got.columns)==['sign','score','fn','pid','cam','other_fn','other_pid','other_cam','why']

def test_distractors_are_no_person_but_may_be_near_one():
    emb,items = clumps()
    torch.manual_seed(9)
    more = torch.cat([torch.randn(5,32), emb[30:31]+.01])
    zero = pd.DataFrame(dict(fn=[f'z{i}' for i in range(6)], pid='0000', cam=1, label=8, camera=0, role=Role.GALLERY))
    got = ReIDInterpretation(torch.cat([emb,more]), pd.concat([items,zero], ignore_index=True)).label_errors(9)
    assert not (got[got.sign!='duplicate'].fn.str.startswith('z')).any() and not (got[got.sign=='outlier'].other_pid=='0000').any()
    assert got[got.sign=='duplicate'][['fn','other_fn']].values.tolist()==[['z5',items.fn[30]]]

def test_junk_is_no_suspect():
    emb,items = clumps()
    items.loc[20,['pid','label']] = -1
    emb[20] = emb[40]
    got = ReIDInterpretation(emb, items).label_errors(9)
    assert 20 not in got.index and items.fn[20] not in got.other_fn.tolist()

# tables as they come

def test_nothing_to_rank_but_labels_to_look_at():
    interp,_ = make(roles=False)
    for f in (interp.worst,interp.confused,interp.camera_pairs,interp.plot_worst): pytest.raises(ValueError, f).match('need both queries and a gallery')
    assert len(interp.label_errors(2)) and interp.plot_embeddings()

def test_nobody_to_find():
    interp,items = make(n=20, n_ids=20)
    items = items.assign(label=range(20), pid=range(1,21))
    alone = ReIDInterpretation(interp.emb, items)
    for f in (alone.worst,alone.confused): pytest.raises(NoMatchError, f).match('no person in common')
    got = alone.label_errors(4)
    assert got.empty
    with pytest.raises(ValueError, match='no neighbour'): alone.plot_label_errors()
    with pytest.raises(ValueError, match='two people or more; these images are of 1'): ReIDInterpretation(interp.emb, items.assign(label=0)).label_errors()

@pytest.mark.parametrize('change,match', [(lambda e,d: (e,d.drop(columns=['label','role'])), "no column 'label', 'role'"), (lambda e,d: (e[:-1],d), '60 images, and embeddings of shape'), (lambda e,d: (e[0],d), 'one embedding per row')])
def test_what_does_not_fit(change, match):
    interp,items = make()
    with pytest.raises(ValueError, match=match): ReIDInterpretation(*change(interp.emb, items))

def test_nothing_asked_for():
    interp,_ = make()
    for f in (interp.worst,interp.plot_worst):
        for n in (0,-1): pytest.raises(ValueError, f, n).match(f'n={n}: ask for one query or more')
    for n in (0,-1):
        pytest.raises(ValueError, interp.confused, n).match(f'n={n}: ask for one pair')
        for f in (interp.label_errors,interp.plot_label_errors): pytest.raises(ValueError, f, n).match(f'n={n}: ask for one suspect')
        pytest.raises(ValueError, interp.ranked, [0], n).match(f'k={n}: ask for one match')
        pytest.raises(ValueError, interp.plot_worst, 2, n).match(f'k={n}: ask for one match')
        pytest.raises(ValueError, interp.plot_label_errors, k=n).match(f'k={n}: ask for one image')

def test_nan_is_named():
    interp,items = make()
    interp.emb[3] = float('nan')
    with pytest.raises(ValueError, match='1 of 60 embeddings hold NaN'): interp.plot_embeddings()
    with pytest.raises(ValueError, match='1 of .* rows hold NaN'): interp.worst()
    with pytest.raises(ValueError, match='1 of .* rows hold NaN'): interp.label_errors()

# the plane

def test_the_plane_is_that_of_the_singular_values():
    torch.manual_seed(0)
    emb = torch.randn(70,12)*torch.linspace(3,.1,12)
    state = torch.get_rng_state()
    xy,part = principal_plane(emb)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(xy, principal_plane(emb)[0])
    x = F.normalize(emb, dim=1).double().numpy()
    x = x-x.mean(0)
    u,s,_ = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(part, (s**2/(s**2).sum())[:2], atol=1e-3)
    np.testing.assert_allclose(xy.abs(), np.abs(u[:,:2]*s[:2]), atol=2e-2)

def test_degenerate_planes():
    xy,part = principal_plane(torch.ones(3,4))
    assert xy.isfinite().all() and part.isfinite().all()
    with pytest.raises(ValueError, match='at least two images'): principal_plane(torch.ones(1,4))

def test_colours_of_the_plane():
    interp,_ = make(unknown=10, junk=3)
    legend = lambda fig: [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert legend(interp.plot_embeddings(ids=[11,21]))==['pid 11','pid 21','others']
    assert legend(interp.plot_embeddings(ids=np.int64(3)))==legend(interp.plot_embeddings(ids=3)) and len(legend(interp.plot_embeddings(ids=3)))==4
    assert legend(interp.plot_embeddings('cam'))==['camera c0','camera c1','camera c2','others']
    with pytest.raises(ValueError, match=r'no image of person 12; there are ids such as \d+, \d+'): interp.plot_embeddings(ids=[12])
    with pytest.raises(ValueError, match="'pid' or by 'cam'"): interp.plot_embeddings('camera')

# from a learner

def test_from_a_learner(trained):
    interp = ReIDInterpretation.from_learner(trained)
    assert type(interp.emb) is torch.Tensor
    assert interp.card.mAP==pytest.approx(trained.evaluate().mAP) and len(interp.items)==len(trained.dls.valid.items)
    assert 'queries' in repr(interp)
    fig = interp.plot_worst(2, 5)
    assert len(fig.axes)==12
    assert interp.plot_label_errors(1, sign='outlier', k=3) and interp.plot_embeddings(thumbs=5)
    with pytest.raises(ValueError, match="sign='other'"): interp.plot_label_errors(sign='other')
    mirrored = ReIDInterpretation.from_learner(trained, flip=True)
    assert not torch.allclose(mirrored.emb, interp.emb)

def test_the_worst_are_drawn_with_their_own_rankings(trained, monkeypatch):
    import pyramidreid.explain.interpretation as m
    seen = {}
    monkeypatch.setattr(m, 'plot_ranking', lambda q,r,**k: seen.update(q=q, r=r))
    interp = ReIDInterpretation.from_learner(trained)
    interp.plot_worst(3, 4)
    w = interp.worst(3)
    assert seen['q'].fn.tolist()==w.fn.tolist()
    for k,(_,o) in enumerate(w.iterrows()):
        right = seen['r'][seen['r']['query']==k].right.tolist()
        assert (right.index(True)+1 if True in right else 99)==(o.first_right if o.first_right<=4 else 99)

def test_a_training_loader_is_not_augmented(make_learner, make_dls):
    from pyramidreid.data.transforms import strong_tfms
    for cache in (None,True):
        learn = make_learner(make_dls(tfms=strong_tfms, cache=cache))
        items = learn.dls.train.items
        one,two = (ReIDInterpretation.from_learner(learn, learn.dls.train) for _ in range(2))
        plain = learn.embed(learn.dls.test_dl(items.fn.tolist()))
        assert torch.equal(one.emb, two.emb) and torch.allclose(one.emb, plain, atol=1e-6)
        assert one.items.fn.tolist()==items.fn.tolist() and one.items.label.tolist()==items.label.tolist()
        assert one.label_errors(3).equals(two.label_errors(3))
        valid = ReIDInterpretation.from_learner(learn, learn.dls.valid)
        assert valid.items.label.tolist()==ReIDInterpretation.from_learner(learn).items.label.tolist()

def test_training_labels(trained):
    dl = trained.dls.test_dl(trained.dls.train.items[['fn','pid','cam','split']], with_labels=True)
    interp = ReIDInterpretation.from_learner(trained, dl)
    assert (interp.n_query,interp.n_gallery)==(0,0) and set(interp.label_errors(2).sign)<={'outlier','neighbour','duplicate'}
    with pytest.raises(ValueError, match='with_labels=True'): ReIDInterpretation.from_learner(trained, trained.dls.test_dl(trained.dls.train.items.fn[:4].tolist()))
