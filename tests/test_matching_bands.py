"Similarities taken apart by branches: against plain loops, and what is refused"
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pyramidreid.explain.matching_bands import *
from pyramidreid.models.pyramid import join_branches, pyramid_windows

PYRAMIDS = [(6,None),(6,[1]),(6,[6]),(4,[1,3]),(1,None),(3,None)]

@pytest.mark.parametrize('n_parts,levels', PYRAMIDS)
def test_each_branch_is_its_cosine_and_their_mean_is_the_cosine(n_parts, levels):
    torch.manual_seed(0)
    windows = pyramid_windows(n_parts, levels)
    feats = torch.randn(2,len(windows),16).relu()
    a,b = join_branches(feats)
    table = branch_similarities(a, b, n_parts, levels)
    assert len(table)==len(windows)
    for row,(first,level),x,y in zip(table.itertuples(), windows, *feats):
        assert row.similarity==pytest.approx(F.cosine_similarity(x, y, dim=0).item(), abs=1e-6)
        extent = pytest.approx(first/n_parts),pytest.approx((first+level)/n_parts)
        assert (row.level,row.top,row.bottom)==(level,*extent)
    assert table.similarity.mean()==pytest.approx((a@b).item(), abs=1e-6)
    any_type_and_length = branch_similarities(b.numpy(), a.double()*7, n_parts, levels)
    np.testing.assert_allclose(any_type_and_length.similarity, table.similarity, atol=1e-6)

def test_half_precision():
    torch.manual_seed(0)
    a,b = join_branches(torch.rand(2,21,32)).half()
    cosine = F.cosine_similarity(a.double(), b.double(), dim=0).item()
    assert branch_similarities(a, b).similarity.mean()==pytest.approx(cosine, abs=1e-9)

def test_a_dead_branch_agrees_with_nothing_and_the_mean_stays_the_cosine():
    torch.manual_seed(0)
    feats = torch.rand(2,6,4)
    feats[0,2] = 0
    a,b = join_branches(feats)
    table = branch_similarities(a, b, 3)
    assert table.similarity[2]==0 and table.similarity.mean()==pytest.approx((a@b).item(), abs=1e-6)

@pytest.mark.parametrize('change,match', [
    (lambda a: join_branches(torch.rand(1,6,4), 'whole')[0], "emb_a have lengths .* norm='branch'"),
    (lambda a: torch.rand(24), "norm='branch'"),
    (lambda a: a[:-1], '23 dimensions, which cannot be 6 branches'),
    (lambda a: a[:0], 'has 0 dimensions'),
    (lambda a: a[None], r'shape \(1, 24\)'),
    (lambda a: a*0, 'zero or not finite'),
    (lambda a: a*float('nan'), 'zero or not finite'),
    (lambda a: join_branches(torch.rand(1,6,8))[0], '48 and 24 dimensions')])
def test_what_cannot_be_taken_apart(change, match):
    torch.manual_seed(0)
    a,b = join_branches(torch.rand(2,6,4))
    with pytest.raises(ValueError, match=match): branch_similarities(change(a), b, 3)

@pytest.mark.parametrize('n_parts,levels', PYRAMIDS)
def test_windows_of_a_lane_do_not_overlap(n_parts, levels):
    n = len(pyramid_windows(n_parts, levels))
    emb = join_branches(torch.ones(1,n,2))[0]
    table = branch_similarities(emb, emb, n_parts, levels)
    lanes = list(window_lanes(table))
    assert sorted(branch for branch,_,_ in lanes)==list(range(n))
    assert all(0<=lane<n_lanes for _,lane,n_lanes in lanes)
    for x,lane,_ in lanes:
        for y,other,_ in lanes:
            if x==y or lane!=other or table.level[x]!=table.level[y]: continue
            assert table.bottom[x]<=table.top[y]+1e-9 or table.bottom[y]<=table.top[x]+1e-9

# from a learner

@pytest.fixture(scope='module')
def files(trained):
    "Image files of three people"
    return trained.dls.valid.items.drop_duplicates('pid').fn[:3].tolist()

def test_a_learner_explains(trained, files):
    a,b = trained.embed(trained.dls.test_dl(files[:2]))
    trained.model.train()
    explanation = trained.explain(*files[:2])
    assert trained.model.training
    assert explanation.cosine==pytest.approx((a@b).item(), abs=1e-6) and len(explanation.table)==6
    levels = explanation.levels
    assert levels.adds.sum()==pytest.approx(explanation.cosine) and levels.branches.tolist()==[3,2,1]
    assert 'mean of 6 branches' in repr(explanation) and '<table' in explanation._repr_html_()

def test_files_and_arrays_are_the_same(trained, files):
    cosine = trained.explain(*files[:2]).cosine
    arrays = [np.asarray(Image.open(f).convert('RGB')) for f in files[:2]]
    assert trained.explain(*arrays).cosine==pytest.approx(cosine, abs=1e-6)
    assert trained.explain(files[0], arrays[0]).table.similarity.to_numpy()==pytest.approx(1, abs=1e-6)

def test_a_wrapped_model_is_explained(trained, files, monkeypatch):
    cosine = trained.explain(*files[:2]).cosine
    monkeypatch.setattr(trained, 'model', torch.nn.DataParallel(trained.model))
    assert trained.explain(*files[:2]).cosine==pytest.approx(cosine, abs=1e-6)

@pytest.mark.parametrize('bad', [None,3,np.zeros((4,4,3))])
def test_something_else_than_an_image(trained, files, bad):
    with pytest.raises(ValueError, match='^query'): trained.explain(bad, files[0])
    with pytest.raises(ValueError, match='^match'): trained.explain(files[0], bad)

def test_a_file_that_is_not_there(trained, files):
    with pytest.raises(FileNotFoundError, match='nobody.jpg'): trained.explain(files[0], 'nobody.jpg')

def test_the_images_are_what_the_model_saw(trained, files):
    explanation = trained.explain(*files[:2])
    assert explanation.images.shape==(2,48,24,3) and explanation.images.dtype==np.uint8
    for image,file in zip(explanation.images, files):
        resized = np.asarray(Image.open(file).convert('RGB').resize((24,48), Image.BILINEAR), dtype=float)
        assert abs(image-resized).mean()<8

def test_other_norms_are_refused(make_learner, files):
    learn = make_learner(norm=None)
    with pytest.raises(ValueError, match="norm=None.*not a mean of branch cosines"): learn.explain(*files[:2])

# the plot

def test_drawn_windows_have_the_extents_of_the_table(trained, files):
    explanations = [trained.explain(*files[:2]),trained.explain(*files[1:])]
    rows = np.array(plot_explanations(explanations).axes[:8]).reshape(2, 4)
    for axs,explanation in zip(rows, explanations):
        assert [len(ax.patches) for ax in axs]==[0,6,4,2] # windows over both people
        for level,ax in enumerate(axs[1:], 1):
            windows = explanation.table[explanation.table.level==level]
            expected = {(round(o.top, 6),round(o.bottom, 6)) for o in windows.itertuples()}
            assert {(round(p.get_y()/48, 6),round((p.get_y()+p.get_height())/48, 6)) for p in ax.patches}==expected

def test_limits_of_the_colours(trained, files):
    explanation = trained.explain(*files[:2])
    own_range = plot_explanations([explanation]).axes[1].patches[0].get_facecolor()
    fixed_range = explanation.plot(vmin=0, vmax=1).axes[1].patches[0].get_facecolor()
    assert own_range!=fixed_range

def test_nothing_to_draw():
    with pytest.raises(ValueError, match='nothing to draw'): plot_explanations([])

def test_different_pyramids_are_not_drawn_together(trained, files):
    explanation = trained.explain(*files[:2])
    other = Explanation(explanation.table.iloc[:3], explanation.images)
    with pytest.raises(ValueError, match='different pyramids'): plot_explanations([explanation,other])
