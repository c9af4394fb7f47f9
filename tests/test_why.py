"Similarities taken apart by branches: against plain loops, and what is refused"
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pyramidreid.explain.bands import *
from pyramidreid.models.pyramid import embedding, pyramid_windows

PYRAMIDS = [(6,None),(6,[1]),(6,[6]),(4,[1,3]),(1,None),(3,None)]

@pytest.mark.parametrize('n_parts,levels', PYRAMIDS)
def test_each_branch_is_its_cosine_and_their_mean_that_of_the_whole(n_parts, levels):
    torch.manual_seed(0)
    windows = pyramid_windows(n_parts, levels)
    feats = torch.randn(2,len(windows),16).relu()
    a,b = embedding(feats)
    table = branch_similarities(a, b, n_parts, levels)
    for row,(i,l),x,y in zip(table.itertuples(), windows, *feats):
        assert row.similarity==pytest.approx(F.cosine_similarity(x, y, dim=0).item(), abs=1e-6)
        assert (row.level,row.top,row.bottom)==(l,pytest.approx(i/n_parts),pytest.approx((i+l)/n_parts))
    assert table.similarity.mean()==pytest.approx((a@b).item(), abs=1e-6)
    other = branch_similarities(b.numpy(), a.double()*7, n_parts, levels) # any type and length
    np.testing.assert_allclose(other.similarity, table.similarity, atol=1e-6)

def test_half_precision_is_known_as_what_it_was():
    torch.manual_seed(0)
    a,b = embedding(torch.rand(2,21,32)).half()
    cosine = F.cosine_similarity(a.double(), b.double(), dim=0).item()
    assert branch_similarities(a, b).similarity.mean()==pytest.approx(cosine, abs=1e-9)

def test_a_dead_branch_agrees_with_nothing_and_the_mean_stays_the_cosine():
    torch.manual_seed(0)
    feats = torch.rand(2,6,4)
    feats[0,2] = 0
    a,b = embedding(feats)
    table = branch_similarities(a, b, 3)
    assert table.similarity[2]==0 and table.similarity.mean()==pytest.approx((a@b).item(), abs=1e-6)

@pytest.mark.parametrize('change,match', [
    (lambda a: embedding(torch.rand(1,6,4), 'whole')[0], "emb_a have lengths .* norm='branch'"), (lambda a: torch.rand(24), "norm='branch'"),
    (lambda a: a[:-1], '23 numbers, which are not 6 branches'), (lambda a: a[None], r'shape \(1, 24\)'), (lambda a: a*0, 'zero or not finite'),
    (lambda a: a*float('nan'), 'zero or not finite'), (lambda a: embedding(torch.rand(1,6,8))[0], '48 and of 24 numbers'), (lambda a: a[:0], 'has 0 numbers')])
def test_what_cannot_be_taken_apart(change, match):
    torch.manual_seed(0)
    a,b = embedding(torch.rand(2,6,4))
    with pytest.raises(ValueError, match=match): branch_similarities(change(a), b, 3)

@pytest.mark.parametrize('n_parts,levels', PYRAMIDS)
def test_windows_of_a_lane_do_not_overlap(n_parts, levels):
    b = len(pyramid_windows(n_parts, levels))
    emb = embedding(torch.ones(1,b,2))[0]
    table = branch_similarities(emb, emb, n_parts, levels)
    lanes = list(window_lanes(table))
    assert sorted(o[0] for o in lanes)==list(range(b))
    for x,lane,n in lanes:
        assert 0<=lane<n
        for y,other,_ in lanes:
            if x!=y and lane==other and table.level[x]==table.level[y]:
                assert table.bottom[x]<=table.top[y]+1e-9 or table.bottom[y]<=table.top[x]+1e-9

def test_a_learner_explains(trained):
    fns = trained.dls.valid.items.fn[:2].tolist()
    a,b = trained.embed(trained.dls.test_dl(fns))
    trained.model.train()
    e = trained.explain(*fns)
    assert trained.model.training
    assert e.cosine==pytest.approx((a@b).item(), abs=1e-6) and len(e.table)==6
    assert e.levels.adds.sum()==pytest.approx(e.cosine) and e.levels.branches.tolist()==[3,2,1]
    assert 'mean of 6 branches' in repr(e) and '<table' in e._repr_html_()
    opened = [np.asarray(Image.open(f).convert('RGB')) for f in fns]
    assert trained.explain(*opened).cosine==pytest.approx(e.cosine, abs=1e-6)
    assert trained.explain(fns[0], opened[0]).table.similarity.to_numpy()==pytest.approx(1, abs=1e-6)

def test_the_pictures_are_what_the_model_saw(trained):
    fns = trained.dls.valid.items.fn[:2].tolist()
    e = trained.explain(*fns)
    assert e.images.shape==(2,48,24,3) and e.images.dtype==np.uint8
    for im,f in zip(e.images, fns):
        plain = np.asarray(Image.open(f).convert('RGB').resize((24,48), Image.BILINEAR), dtype=float)
        assert abs(im-plain).mean()<8

def test_other_norms_are_refused(make_learner):
    learn = make_learner(norm=None)
    with pytest.raises(ValueError, match="norm=None.*no mean of branch cosines"): learn.explain(*learn.dls.valid.items.fn[:2])

def test_drawn_windows_have_the_extents_of_the_table(trained):
    fns = trained.dls.valid.items.fn[:3].tolist()
    one,two = trained.explain(*fns[:2]),trained.explain(*fns[1:])
    fig = plot_explanations([one,two])
    axs = fig.axes[:8]
    assert [len(ax.patches) for ax in axs]==[0,6,4,2]*2 # windows over both people
    for k,e in enumerate([one,two]):
        for l in (1,2,3):
            ax,t = axs[4*k+l],e.table[e.table.level==l]
            got = {(round(p.get_y()/48,6),round((p.get_y()+p.get_height())/48,6)) for p in ax.patches}
            assert got=={(round(r.top,6),round(r.bottom,6)) for r in t.itertuples()}
    same = plot_explanations([one]).axes[1].patches[0].get_facecolor()
    fixed = one.plot(vmin=0, vmax=1).axes[1].patches[0].get_facecolor()
    assert same!=fixed

def test_nothing_to_draw():
    with pytest.raises(ValueError, match='nothing to draw'): plot_explanations([])

def test_different_pyramids_are_not_drawn_together(trained):
    e = trained.explain(*trained.dls.valid.items.fn[:2])
    with pytest.raises(ValueError, match='different pyramids'): plot_explanations([e, Explanation(e.table.iloc[:3], e.images)])
