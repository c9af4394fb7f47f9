"Label errors: similarities against a plain loop, planted errors, and what real tables lack"
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from pyramidreid.core import Role
from pyramidreid.explain.interpretation import *
from pyramidreid.explain.suspect_labels import *


def loop_similarity(emb, labels, mixed=()):
    "Rows of `id_similarity`, by loops over images"
    x,n = F.normalize(emb.double(), dim=1).numpy(),len(labels)
    for i in range(n):
        similarity = x@x[i]
        by_id = {l:[j for j in range(n) if labels[j]==l and j!=i] for l in set(labels)}
        own = by_id.pop(labels[i])
        near = max((j for images in by_id.values() for j in images), key=lambda j: similarity[j])
        means = {l:similarity[images].mean() for l,images in by_id.items() if len(images)>1 and l not in mixed}
        other = max(means, key=means.get)
        has_own = own and labels[i] not in mixed
        own_mean,own_best = (similarity[own].mean(),similarity[own].max()) if has_own else (np.nan,np.nan)
        yield own_mean,own_best,similarity[near],near,means[other],other

@pytest.mark.parametrize('mixed', [(),(2,)])
def test_similarity_is_that_of_the_loop(mixed):
    torch.manual_seed(0)
    emb,labels = torch.randn(50,5),torch.randint(0,8,(50,))
    labels[7] = 8 # alone in its id
    table = id_similarity(emb, labels, mixed)
    expected = np.array(list(loop_similarity(emb, labels.tolist(), mixed)))
    np.testing.assert_allclose(table.to_numpy(dtype=float), expected, atol=1e-6)
    assert table.own_mean.isna().sum()==1+sum((labels==m).sum() for m in mixed)

def clusters(seed=0, n_ids=8, each=6, noise=.25):
    "Embeddings and table of well separated people"
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(n_ids).repeat_interleave(each)
    emb = torch.randn(n_ids,32,generator=g)[label] + noise*torch.randn(len(label),32,generator=g)
    roles = [Role.QUERY,*[Role.GALLERY]*(each-1)]*n_ids
    items = pd.DataFrame(dict(fn=[f'{i}.jpg' for i in range(len(label))], pid=label+1, cam=1, label=label, camera=0,
                              role=roles))
    order = np.argsort(items.role, kind='stable')
    return emb[order],items.iloc[order].reset_index(drop=True)

@pytest.fixture
def swapped():
    "Embeddings and a table in which images 20 and 40 swapped their ids"
    emb,items = clusters()
    for c in ('pid','label'): items.loc[[20,40],c] = items.loc[[40,20],c].to_numpy()
    assert items.label[20]!=items.label[40]
    return emb,items

def test_swapped_labels_come_first(swapped):
    items = swapped[1]
    suspects = ReIDInterpretation(*swapped).label_errors(2)
    for sign in ('outlier','neighbour'): assert set(suspects.index[suspects.sign==sign])=={20,40}
    outlier = suspects[suspects.sign=='outlier'].loc[20]
    assert outlier.pid==items.pid[20] and outlier.other_pid==items.pid[40]
    assert outlier.fn==items.fn[20] and 'to its own id' in outlier.why
    assert suspects.groupby('sign').score.apply(lambda s: s.is_monotonic_decreasing).all()
    assert (suspects.score>0).all()

@pytest.mark.parametrize('k', [2,30])
def test_suspects_are_drawn_with_the_nearest_images_and_one_of_their_own_id(swapped, k, monkeypatch):
    drawn = {}
    def plot_ranking(suspects, ranked, **kwargs): drawn.update(suspects=suspects, ranked=ranked)
    monkeypatch.setattr('pyramidreid.explain.suspect_labels.plot_ranking', plot_ranking)
    emb,items = swapped
    ReIDInterpretation(emb, items).plot_label_errors(2, k=k)
    x = F.normalize(emb, dim=1)
    assert set(drawn['suspects'].index)=={20,40}
    for row,i in enumerate(drawn['suspects'].index):
        order = [j for j in (x@x[i]).argsort(descending=True).tolist() if j!=i]
        own = [j for j in order if items.label[j]==items.label[i]]
        expected = order[:k] if own[0] in order[:k] else [*order[:k],own[0]]
        ranked = drawn['ranked'][drawn['ranked']['query']==row]
        assert ranked.fn.tolist()==items.fn[expected].tolist() and ranked.right.any()
        assert ranked['rank'].tolist()==list(range(1, len(expected)+1))

def test_a_copy_with_another_id_is_the_first_duplicate():
    emb,items = clusters()
    emb = torch.cat([emb,emb[20:21]])
    copy = items.iloc[[20]].assign(pid=items.pid[45], label=items.label[45])
    items = pd.concat([items,copy], ignore_index=True)
    suspects = ReIDInterpretation(emb, items).label_errors(3)
    first = suspects[suspects.sign=='duplicate'].iloc[0]
    assert first.name==48 and first.fn==first.other_fn and first.other_pid==items.pid[20]

def test_clean_clusters_have_no_suspects():
    suspects = ReIDInterpretation(*clusters()).label_errors(5)
    assert suspects.empty
    assert list(suspects.columns)==['sign','score','fn','pid','cam','other_fn','other_pid','other_cam','why']

def test_distractors_are_not_one_person_but_may_be_near_one():
    emb,items = clusters()
    torch.manual_seed(9)
    more = torch.cat([torch.randn(5,32), emb[30:31]+.01])
    fns = [f'z{i}' for i in range(6)]
    zero = pd.DataFrame(dict(fn=fns, pid='0000', cam=1, label=8, camera=0, role=Role.GALLERY))
    items = pd.concat([items,zero], ignore_index=True)
    suspects = ReIDInterpretation(torch.cat([emb,more]), items).label_errors(9)
    assert not suspects[suspects.sign!='duplicate'].fn.isin(fns).any()
    assert not (suspects[suspects.sign=='outlier'].other_pid=='0000').any()
    assert suspects[suspects.sign=='duplicate'][['fn','other_fn']].values.tolist()==[['z5',items.fn[30]]]

def test_junk_is_not_suspected():
    emb,items = clusters()
    items.loc[20,['pid','label']] = -1
    emb[20] = emb[40]
    suspects = ReIDInterpretation(emb, items).label_errors(9)
    assert 20 not in suspects.index and items.fn[20] not in suspects.other_fn.tolist()

def test_every_id_has_one_image():
    emb,items = clusters()
    items = items.assign(label=range(len(items)), pid=range(1, len(items)+1))
    interp = ReIDInterpretation(emb, items)
    assert interp.label_errors(4).empty
    with pytest.raises(ValueError, match='no neighbour'): interp.plot_label_errors()

def test_one_id():
    emb,items = clusters()
    with pytest.raises(ValueError, match='at least two people; these images are of 1'):
        ReIDInterpretation(emb, items.assign(label=0)).label_errors()

@pytest.mark.parametrize('n', [0,-1])
def test_nothing_asked_for(n):
    interp = ReIDInterpretation(*clusters())
    with pytest.raises(ValueError, match=f'n={n}: ask for at least one suspect'): interp.label_errors(n)
    with pytest.raises(ValueError, match=f'n={n}: ask for at least one suspect'): interp.plot_label_errors(n)
    with pytest.raises(ValueError, match=f'k={n}: ask for at least one image'): interp.plot_label_errors(k=n)

def test_unknown_sign():
    with pytest.raises(ValueError, match="sign='other'"):
        ReIDInterpretation(*clusters()).plot_label_errors(sign='other')

def test_nan_is_named():
    emb,items = clusters()
    emb[3] = float('nan')
    with pytest.raises(ValueError, match='1 of .* rows hold NaN'): ReIDInterpretation(emb, items).label_errors()

# from a learner

def test_suspects_of_a_learner_are_drawn(trained):
    fig = ReIDInterpretation.from_learner(trained).plot_label_errors(1, sign='outlier', k=3)
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[0].startswith('suspect') and all(titles[1:4])

def test_training_labels(trained):
    items = trained.dls.train.items[['fn','pid','cam','split']]
    interp = ReIDInterpretation.from_learner(trained, trained.dls.test_dl(items, with_labels=True))
    suspects = interp.label_errors(2)
    assert (interp.n_query,interp.n_gallery)==(0,0)
    assert len(suspects) and set(suspects.sign)<={'outlier','neighbour','duplicate'}
