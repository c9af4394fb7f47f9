"Worst queries, confused people, cameras and the plane: against plain loops, by hand, and with what real tables lack"
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from pyramidreid.core import Role
from pyramidreid.data.transforms import strong_tfms
from pyramidreid.evaluation.plots import rank_gallery
from pyramidreid.evaluation.retrieval import NoMatchError, evaluate
from pyramidreid.explain import interpretation
from pyramidreid.explain.interpretation import *
from pyramidreid.explain.suspect_labels import *


def make(n=60, n_ids=6, seed=0, unknown=0, junk=0, roles=True, dim=6):
    "An interpretation of random embeddings; the first `unknown` images have no camera, `junk` images have no label"
    g,rng = torch.Generator().manual_seed(seed),np.random.default_rng(seed)
    label,camera = rng.integers(0, n_ids, n),rng.integers(0, 3, n)
    camera[:unknown] = -1
    label[n//2:n//2+junk] = -1
    is_junk = label<0
    role = rng.choice([Role.QUERY,Role.GALLERY], n) if roles else np.full(n, Role.TRAIN)
    if roles: role[is_junk] = Role.GALLERY
    items = pd.DataFrame(dict(
        fn=[f'{i}.jpg' for i in range(n)], pid=np.where(is_junk, -1, label*10+1),
        cam=[None if c<0 else f'c{c}' for c in camera], label=label, camera=camera, role=[Role(o) for o in role]))
    centre = torch.randn(n_ids+1, dim, generator=g)
    return ReIDInterpretation(centre[label]+torch.randn(n, dim, generator=g), items)

CASES = [dict(), dict(unknown=20), dict(unknown=60), dict(junk=5), dict(seed=3, n_ids=15, junk=3, unknown=4)]

def loop_rankings(interp):
    "For each query its position, its label, and the allowed gallery images in order as (label, right, position)"
    queries,gallery = interp.queries,interp.gallery
    emb = F.normalize(interp.emb, dim=1)
    similarity = emb[:len(queries)] @ emb[len(queries):len(queries)+len(gallery)].T
    labels,cameras = gallery.label.tolist(),gallery.camera.tolist()
    for i,(label,camera) in enumerate(zip(queries.label, queries.camera)):
        def allowed(j, label=label, camera=camera):
            return labels[j]>=0 and not (labels[j]==label and cameras[j]==camera>=0)
        order = sorted(range(len(gallery)), key=lambda j, row=similarity[i]: -row[j].item())
        yield i,label,[(labels[j],labels[j]==label,j) for j in order if allowed(j)]

@pytest.mark.parametrize('case', CASES)
def test_worst_queries_are_those_of_a_loop(case):
    interp = make(**case)
    expected = {}
    for i,_,row in loop_rankings(interp):
        ranks = [rank for rank,(_,right,_) in enumerate(row, 1) if right]
        if not ranks: continue
        ap = np.mean([n/rank for n,rank in enumerate(ranks, 1)])
        above = [interp.gallery.pid.iloc[j] for _,_,j in row[:ranks[0]-1]]
        text = ', '.join(map(str, above[:5])) + ' …'*(len(above)>5)
        expected[i] = pytest.approx(ap),ranks[0],len(ranks),text
    worst = interp.worst(1000)
    assert set(worst.index)==set(expected) and worst.AP.is_monotonic_increasing
    for i,row in worst.iterrows(): assert (row.AP,row.first_right,row.matches,row.above)==expected[i]
    assert interp.worst(3).index.tolist()==worst.index[:3].tolist()

@pytest.mark.parametrize('case', CASES)
def test_confused_people_are_those_of_a_loop(case):
    interp = make(**case)
    above,of = {},{}
    for _,a,row in loop_rankings(interp):
        for right_at,(_,right,_) in enumerate(row):
            if not right: continue
            for wrong_at,(b,own,_) in enumerate(row):
                if own: continue
                of[a,b] = of.get((a,b), 0)+1
                above[a,b] = above.get((a,b), 0)+(wrong_at<right_at)
    pid = lambda label: label*10+1
    confused = interp.confused(10000)
    expected = {(pid(a),pid(b)):(n,of[a,b]) for (a,b),n in above.items() if n}
    assert {(o.pid,o.other):(o.above,o.of) for o in confused.itertuples()}==expected
    for o in confused.itertuples():
        assert o.share==pytest.approx(o.above/o.of)
        back = (o.other-1)//10,(o.pid-1)//10
        assert o.back==pytest.approx(above[back]/of[back] if back in of else np.nan, nan_ok=True)
    assert confused.share.is_monotonic_decreasing

def test_ties_are_broken_by_gallery_order():
    items = pd.DataFrame(dict(fn=list('qabc'), pid=[1,2,1,2], cam=None, label=[0,1,0,1], camera=-1,
                              role=[Role.QUERY]+[Role.GALLERY]*3))
    confused = ReIDInterpretation(torch.ones(4,2), items).confused()
    assert confused[['pid','other','above','of']].values.tolist()==[[1,2,1,2]] and np.isnan(confused.back[0])

@pytest.mark.parametrize('dim', [6,2**18]) # one block of the gallery, or blocks of 32 rows
def test_ranked_is_rank_gallery_whatever_the_blocks(dim):
    interp = make(n=80, junk=4, dim=dim)
    q,g = interp._split(interp.emb)
    expected = rank_gallery(q[[3,0]], g, interp.queries.iloc[[3,0]], interp.gallery, 7)
    ranked = interp.ranked([3,0], 7)
    for column in ('fn','rank','right'): assert ranked[column].tolist()==expected[column].tolist()

@pytest.mark.parametrize('case', [dict(n=120), dict(n=120, unknown=40), dict(n=120, junk=8)])
def test_camera_pairs_are_evaluations_of_their_own(case):
    interp = make(**case)
    pairs = interp.camera_pairs().set_index(['query_cam','gallery_cam'])
    queries,gallery = interp.queries,interp.gallery
    query_emb,gallery_emb = interp._split(interp.emb)
    unknown = dict(queries=(queries.camera<0).sum(), gallery=(gallery.camera<0).sum())
    assert pairs.attrs['unknown camera']==unknown
    cams = ('c0','c1','c2')
    assert set(pairs.index)=={(a,b) for a in cams for b in cams if a!=b}
    for (a,b),cell in pairs.iterrows():
        i,j = (queries.cam==a).to_numpy(copy=True),(gallery.cam==b).to_numpy(copy=True)
        alone = evaluate(query_emb[i], gallery_emb[j], queries.label[i].tolist(), gallery.label[j].tolist())
        assert (cell['mAP'],cell['rank-1'])==(round(100*alone.mAP, 2),round(100*alone.rank1, 2))
        assert cell.queries==alone.n_query_valid

def test_camera_pairs_among_all_images():
    interp = make()
    pairs = interp.camera_pairs(gallery='all').set_index(['query_cam','gallery_cam'])
    queries,gallery = interp.queries,interp.gallery
    query_emb,gallery_emb = interp._split(interp.emb)
    for (a,b),cell in pairs.iterrows():
        i,elsewhere = (queries.cam==a).to_numpy(copy=True),(gallery.cam!=b).to_numpy()
        pids = queries.label[i].to_numpy(),gallery.label.to_numpy()
        of_all = evaluate(query_emb[i], gallery_emb, *pids, mask=(pids[0][:,None]==pids[1]) & elsewhere)
        assert (cell['mAP'],cell['rank-1'])==(round(100*of_all.mAP, 2),round(100*of_all.rank1, 2))
    assert 'whole gallery' in interp.camera_pairs(gallery='all').attrs['gallery']
    assert 'among all images' in interp.plot_camera_pairs(gallery='all').axes[0].get_xlabel()
    assert interp.plot_camera_pairs().axes[0].get_xlabel()=='camera of the gallery, alone'

@pytest.mark.parametrize('metric', ['mAP','rank-1'])
def test_camera_pairs_are_drawn(metric):
    interp = make(n=120)
    fig = interp.plot_camera_pairs(metric)
    pairs = interp.camera_pairs()
    expected = sorted(f'{value:.0f}\nn={n}' for value,n in zip(pairs[metric], pairs.queries))
    assert sorted(t.get_text() for t in fig.axes[0].texts)==expected

def test_no_camera_known():
    interp = make(unknown=60)
    with pytest.raises(ValueError, match='known for 0 of'): interp.camera_pairs()
    with pytest.raises(ValueError, match="'mAP' or 'rank-1'"): interp.plot_camera_pairs('AP')

def test_the_order_of_the_table_does_not_matter():
    interp = make(n=40)
    mix = np.random.default_rng(1).permutation(40)
    other = ReIDInterpretation(interp.emb[mix], interp.items.iloc[mix])
    assert other.card.mAP==pytest.approx(interp.card.mAP)
    a,b = [o.confused(1000).sort_values(['pid','other']).to_string(index=False) for o in (interp,other)]
    assert a==b

# tables as they come

def test_nothing_to_rank():
    interp = make(roles=False)
    for method in (interp.worst,interp.confused,interp.camera_pairs,interp.plot_worst):
        with pytest.raises(ValueError, match='need both queries and a gallery'): method()
    assert len(interp.label_errors(2)) and interp.plot_embeddings()

def test_nobody_to_find():
    interp = make(n=20, n_ids=20)
    alone = ReIDInterpretation(interp.emb, interp.items.assign(label=range(20), pid=range(1,21)))
    for method in (alone.worst,alone.confused):
        with pytest.raises(NoMatchError, match='no person in common'): method()

@pytest.mark.parametrize('change,match', [
    (lambda emb,items: (emb,items.drop(columns=['label','role'])), "no column 'label', 'role'"),
    (lambda emb,items: (emb[:-1],items), '60 images, and embeddings of shape'),
    (lambda emb,items: (emb[0],items), 'one embedding per row')])
def test_what_does_not_fit(change, match):
    interp = make()
    with pytest.raises(ValueError, match=match): ReIDInterpretation(*change(interp.emb, interp.items))

@pytest.mark.parametrize('n', [0,-1])
def test_nothing_asked_for(n):
    interp = make()
    with pytest.raises(ValueError, match=f'n={n}: ask for at least one query'): interp.worst(n)
    with pytest.raises(ValueError, match=f'n={n}: ask for at least one query'): interp.plot_worst(n)
    with pytest.raises(ValueError, match=f'n={n}: ask for at least one pair'): interp.confused(n)
    with pytest.raises(ValueError, match=f'k={n}: ask for at least one match'): interp.ranked([0], n)
    with pytest.raises(ValueError, match=f'k={n}: ask for at least one match'): interp.plot_worst(2, n)

def test_nan_is_named():
    interp = make()
    interp.emb[3] = float('nan')
    with pytest.raises(ValueError, match='1 of 60 embeddings hold NaN'): interp.plot_embeddings()
    with pytest.raises(ValueError, match='1 of .* rows hold NaN'): interp.worst()

# the plane

def test_the_plane_is_that_of_the_singular_values():
    torch.manual_seed(0)
    emb = torch.randn(70,12)*torch.linspace(3,.1,12)
    state = torch.get_rng_state()
    xy,fraction = principal_plane(emb)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(xy, principal_plane(emb)[0])
    x = F.normalize(emb, dim=1).double().numpy()
    u,s,_ = np.linalg.svd(x-x.mean(0), full_matrices=False)
    np.testing.assert_allclose(fraction, (s**2/(s**2).sum())[:2], atol=1e-3)
    np.testing.assert_allclose(xy.abs(), np.abs(u[:,:2]*s[:2]), atol=2e-2)

def test_degenerate_planes():
    xy,fraction = principal_plane(torch.ones(3,4))
    assert xy.isfinite().all() and fraction.isfinite().all()
    with pytest.raises(ValueError, match='at least two images'): principal_plane(torch.ones(1,4))

def legend(fig): return [t.get_text() for t in fig.axes[0].get_legend().get_texts()]

def test_people_are_coloured():
    interp = make(unknown=10, junk=3)
    assert legend(interp.plot_embeddings(ids=[11,21]))==['pid 11','pid 21','others']
    three = legend(interp.plot_embeddings(ids=3))
    assert three==legend(interp.plot_embeddings(ids=np.int64(3))) and len(three)==4
    with pytest.raises(ValueError, match=r'no image of person 12; there are ids such as \d+, \d+'):
        interp.plot_embeddings(ids=[12])

def test_cameras_are_coloured():
    interp = make(unknown=10, junk=3)
    assert legend(interp.plot_embeddings('cam'))==['camera c0','camera c1','camera c2','others']
    with pytest.raises(ValueError, match="'pid' or by 'cam'"): interp.plot_embeddings('camera')

# from a learner

@pytest.fixture(scope='module')
def learned(trained): return ReIDInterpretation.from_learner(trained)

def test_from_a_learner(trained, learned):
    assert type(learned.emb) is torch.Tensor
    assert learned.card.mAP==pytest.approx(trained.evaluate().mAP)
    assert len(learned.items)==len(trained.dls.valid.items) and 'queries' in repr(learned)
    mirrored = ReIDInterpretation.from_learner(trained, flip=True)
    assert not torch.allclose(mirrored.emb, learned.emb)

def test_plots_of_a_learner(learned):
    assert len(learned.plot_worst(2, 5).axes)==12
    assert len(learned.plot_embeddings(thumbs=5).axes[0].artists)==5

def test_the_worst_are_drawn_with_their_own_rankings(learned, monkeypatch):
    drawn = {}
    def plot_ranking(queries, ranked): drawn.update(queries=queries, ranked=ranked)
    monkeypatch.setattr(interpretation, 'plot_ranking', plot_ranking)
    learned.plot_worst(3, 4)
    worst = learned.worst(3)
    assert drawn['queries'].fn.tolist()==worst.fn.tolist()
    for row,first_right in enumerate(worst.first_right):
        ranked = drawn['ranked'][drawn['ranked']['query']==row]
        first_drawn = ranked['rank'][ranked.right].tolist()[:1]
        assert first_drawn==([first_right] if first_right<=4 else [])

@pytest.mark.parametrize('cache', [None,True])
def test_a_training_loader_is_not_augmented(make_learner, make_dls, cache):
    learn = make_learner(make_dls(tfms=strong_tfms, cache=cache))
    items = learn.dls.train.items
    one,two = (ReIDInterpretation.from_learner(learn, learn.dls.train) for _ in range(2))
    from_files = learn.embed(learn.dls.test_dl(items.fn.tolist()))
    assert torch.equal(one.emb, two.emb) and torch.allclose(one.emb, from_files, atol=1e-6)
    assert one.items.fn.tolist()==items.fn.tolist() and one.items.label.tolist()==items.label.tolist()
    assert one.label_errors(3).equals(two.label_errors(3))

def test_the_validation_loader_is_the_default(trained, learned):
    given = ReIDInterpretation.from_learner(trained, trained.dls.valid)
    assert given.items.equals(learned.items) and torch.equal(given.emb, learned.emb)

def test_a_loader_without_labels_is_refused(trained):
    with pytest.raises(ValueError, match='with_labels=True'):
        ReIDInterpretation.from_learner(trained, trained.dls.test_dl(trained.dls.train.items.fn[:4].tolist()))
