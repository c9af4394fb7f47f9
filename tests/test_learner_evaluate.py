"A learner's evaluation: mirrored images, other datasets, re-ranking, and what the cards say"
import pytest
import torch
from torch.nn import functional as F

from pyramidreid.data.datasets import market_table
from pyramidreid.evaluation.protocol_card import Card
from pyramidreid.evaluation.retrieval import evaluate
from pyramidreid.training.learner import *
from pyramidreid.training.learner_evaluation import *


@pytest.fixture(scope='session')
def test_table(people):
    df = market_table(people)
    return df[df.split!='train'].reset_index(drop=True)

# Mirrored images

@pytest.mark.parametrize('norm', ['branch','whole',None])
def test_flip_is_the_mean_of_both(make_learner, test_table, norm):
    learn = make_learner(norm=norm)
    dl = learn.dls.test_dl(test_table[:7])
    learn.model.eval()
    with torch.no_grad():
        both = torch.cat([learn.model(images)+learn.model(images.flip(3)) for images, in dl])
    mean = both.as_subclass(torch.Tensor)/2
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

# Cards

def differing(a, b):
    "Names of the entries in which two cards' contexts differ"
    return {name for name in a.about if a.about[name]!=b.about[name]}

def test_the_three_evaluations_say_what_they_are(trained):
    plain,flip,reranked = trained.evaluate(),trained.evaluate(flip=True),trained.evaluate(rerank=True)
    assert (plain.about['flip'],plain.about['re-ranking'])==('none','none')
    assert differing(plain, flip)=={'flip'} and differing(plain, reranked)=={'re-ranking'}
    assert 'k1=20' in reranked.about['re-ranking'] and 'k1=20' in repr(reranked)
    assert reranked.ap.tolist()!=plain.ap.tolist()!=flip.ap.tolist()
    few = trained.evaluate(rerank=dict(k1=3, k2=1, lambda_=0))
    assert few.about['re-ranking']=='k-reciprocal, k1=3, k2=1, λ=0' and few.ap.tolist()!=reranked.ap.tolist()

def test_flipped_evaluation_is_that_of_flipped_embeddings(trained):
    items,emb = trained.dls.valid.items,trained.embed(flip=True)
    q,g = ((items.split==s).to_numpy() for s in ('query','gallery'))
    want = evaluate(emb[q], emb[g], items.pid[q], items.pid[g], items.cam[q], items.cam[g])
    got = trained.evaluate(flip=True)
    assert got.mAP==pytest.approx(want.mAP) and got.first_rank.equal(want.first_rank)
    dist = trained.to_rank(flip=True, distance='euclidean')['dist'][:]
    torch.testing.assert_close(dist, torch.cdist(emb[q], emb[g])**2, atol=1e-5, rtol=0)

@pytest.fixture
def shop(test_table):
    "A table with a name of its own"
    table = test_table.copy()
    table.attrs['name'] = 'Shop 行'
    return table

def test_other_datasets(trained, people, shop, tmp_path):
    before,folder = shop.copy(),tmp_path/'new'/'cards'
    table = trained.evaluate_on({'a folder':people, 'a table':shop}, path=folder)
    assert list(table.index)==['a folder','a table'] and table['mAP (mean of precisions)'].nunique()==1
    assert sorted(file.name for file in folder.iterdir())==['a folder.json','a table.json']
    assert shop.equals(before)

def test_cards_of_other_datasets(trained, people, shop, tmp_path):
    trained.evaluate_on({'a folder':people, 'a table':shop}, path=tmp_path)
    want,cards = trained.evaluate(),{name:Card.from_json(tmp_path/f'{name}.json') for name in ('a folder','a table')}
    assert cards['a table'].about['data']=='Shop 行' and cards['a folder'].about['data']==people.name
    for card in cards.values():
        assert card.mAP==pytest.approx(want.mAP) and card.n_gallery==want.n_gallery
        assert card.about['trained on']==want.about['trained on']

def test_evaluate_on_passes_its_arguments_on(trained, test_table):
    assert trained.evaluate_on({'x':test_table}, rerank=True, about={'note':'mine'}).shape==(1,6)

def test_evaluate_on_nothing(trained):
    with pytest.raises(ValueError, match='no cards'): trained.evaluate_on({})

def test_training_images_are_left_out(trained, people):
    full = market_table(people)
    without = full[full.split!='train']
    assert len(without)<len(full)
    assert trained.evaluate_on({'all':full}).equals(trained.evaluate_on({'all':without}))

@pytest.mark.parametrize('split,message', [('gallery','no query'), ('query','no gallery'), ('train','no query')])
def test_a_table_without_queries_or_gallery(trained, test_table, tmp_path, split, message):
    table = test_table.assign(split=split)
    with pytest.raises(ValueError, match=message): trained.evaluate_on({'x':table}, path=tmp_path/'cards')
    with pytest.raises(ValueError, match=message): trained.evaluate(trained.dls.test_dl(table, with_labels=True))
    assert not (tmp_path/'cards').exists()

def test_a_table_without_splits(trained, test_table):
    with pytest.raises(ValueError, match="x: .*'split'"): trained.evaluate_on({'x':test_table.drop(columns='split')})
    with pytest.raises(ValueError, match='no labels'): trained.evaluate(trained.dls.test_dl(test_table))

def test_a_table_without_a_name_goes_by_the_one_given(trained, test_table, tmp_path):
    df = test_table.copy()
    df.attrs = {}
    trained.evaluate_on({'street':df}, path=tmp_path)
    assert Card.from_json(tmp_path/'street.json').about['data']=='street'
