"A learner's evaluation: mirrored images, other data sets, re-ranking, and what the cards say"
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from pyramidreid.data.datasets import market_table
from pyramidreid.evaluation.card import Card
from pyramidreid.evaluation.retrieval import evaluate
from pyramidreid.training.learner import *


@pytest.fixture(scope='session')
def test_table(people):
    df = market_table(people)
    return df[df.split!='train'].reset_index(drop=True)

# mirrored images

@pytest.mark.parametrize('norm', ['branch','whole',None])
def test_flip_is_the_mean_of_both(make_learner, test_table, norm):
    learn = make_learner(norm=norm)
    dl = learn.dls.test_dl(test_table[:7])
    learn.model.eval()
    with torch.no_grad(): mean = torch.cat([(learn.model(x)+learn.model(x.flip(3))).as_subclass(torch.Tensor)/2 for x, in dl])
    branches = mean.view(7,6,8)
    if norm=='branch': mean = F.normalize((branches/branches.norm(dim=2, keepdim=True)).flatten(1))
    if norm=='whole': mean = mean/mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(learn.embed(dl, flip=True), mean)
    assert not torch.allclose(learn.embed(dl), mean)

@pytest.mark.parametrize('training', [True,False])
def test_embedding_leaves_the_model_as_it_was(make_learner, test_table, training, monkeypatch):
    learn = make_learner()
    learn.model.train(training)
    state = {k:v.clone() for k,v in learn.model.state_dict().items()}
    learn.embed(learn.dls.test_dl(test_table[:5]), flip=True)
    assert all(m.training==training for m in learn.model.modules())
    assert all(torch.equal(v, state[k]) for k,v in learn.model.state_dict().items())
    def cut(x): raise RuntimeError('cut short')
    monkeypatch.setattr(learn.model.body, 'forward', cut)
    with pytest.raises(RuntimeError, match='cut short'): learn.embed(learn.dls.test_dl(test_table[:5]))
    assert learn.model.training==training

# cards

def test_the_three_evaluations_say_what_they_are(trained):
    plain,flip,both = trained.evaluate(),trained.evaluate(flip=True),trained.evaluate(rerank=True)
    assert (plain.about['flip'],plain.about['re-ranking'])==('none','none')
    assert {k for k in plain.about if plain.about[k]!=flip.about[k]}=={'flip'} and {k for k in plain.about if plain.about[k]!=both.about[k]}=={'re-ranking'}
    assert 'k1=20' in both.about['re-ranking'] and 'k1=20' in repr(both) and both.ap.tolist()!=plain.ap.tolist()!=flip.ap.tolist()
    few = trained.evaluate(rerank=dict(k1=3, k2=1, lambda_=0))
    assert few.about['re-ranking']=='k-reciprocal, k1=3, k2=1, λ=0' and few.ap.tolist()!=both.ap.tolist()

def test_flipped_evaluation_is_that_of_flipped_embeddings(trained):
    items,emb = trained.dls.valid.items,trained.embed(flip=True)
    q,g = ((items.split==s).to_numpy() for s in ('query','gallery'))
    want = evaluate(emb[q], emb[g], items.pid[q], items.pid[g], items.cam[q], items.cam[g])
    got = trained.evaluate(flip=True)
    assert got.mAP==pytest.approx(want.mAP) and got.first_rank.equal(want.first_rank)
    torch.testing.assert_close(trained.to_rank(flip=True, distance='euclidean')['dist'][:], torch.cdist(emb[q], emb[g])**2, atol=1e-5, rtol=0)

def test_other_data_sets(trained, people, test_table, tmp_path):
    shop = test_table.copy()
    shop.attrs['name'] = 'Shop 行'
    before = shop.copy()
    t = trained.evaluate_on({'a folder':people, 'a table':shop}, path=tmp_path/'new'/'cards')
    assert list(t.index)==['a folder','a table'] and t['mAP (mean of precisions)'].nunique()==1
    assert sorted(o.name for o in (tmp_path/'new'/'cards').iterdir())==['a folder.json','a table.json'] and shop.equals(before)
    cards = {k:Card.from_json(tmp_path/'new'/'cards'/f'{k}.json') for k in t.index}
    want = trained.evaluate()
    assert cards['a table'].about['data']=='Shop 行' and cards['a folder'].about['data']==people.name
    for c in cards.values():
        assert c.mAP==pytest.approx(want.mAP) and c.n_gallery==want.n_gallery and c.about['trained on']==want.about['trained on']
    only = trained.evaluate_on({'x':test_table}, rerank=True, about={'note':'mine'})
    assert only.shape==(1,6)
    with pytest.raises(ValueError, match='no cards'): trained.evaluate_on({})

def test_training_images_are_left_out(trained, people):
    full = market_table(people)
    assert (full.split=='train').any() and trained.evaluate_on({'all':full}).equals(trained.evaluate_on({'all':full[full.split!='train']}))

@pytest.mark.parametrize('splits,says', [(['gallery'],'no query'), (['query'],'no gallery'), (['train'],'no query')])
def test_nothing_to_ask(trained, test_table, tmp_path, splits, says):
    df = pd.concat([test_table.assign(split=s) for s in splits])
    with pytest.raises(ValueError, match=says): trained.evaluate_on({'x':df}, path=tmp_path/'cards')
    with pytest.raises(ValueError, match=says): trained.evaluate(trained.dls.test_dl(df[df.split!='train'] if splits!=['train'] else df, with_labels=True))
    assert not (tmp_path/'cards').exists()

def test_a_table_without_splits(trained, test_table):
    with pytest.raises(ValueError, match='split'): trained.evaluate_on({'x':test_table.drop(columns='split')})
    with pytest.raises(ValueError, match='no labels'): trained.evaluate(trained.dls.test_dl(test_table))

def test_a_table_without_a_name_goes_by_the_one_given(trained, test_table, tmp_path):
    df = test_table.copy()
    df.attrs = {}
    trained.evaluate_on({'street':df}, path=tmp_path)
    assert Card.from_json(tmp_path/'street.json').about['data']=='street'
