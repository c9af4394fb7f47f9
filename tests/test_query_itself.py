"A file that is a query and in the gallery never finds itself, and people whom the model was trained on are counted"
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from reference import plain_scores
from torch.nn import functional as F

from pyramidreid.cli.frame import Console
from pyramidreid.cli.inputs import query_gallery_distances
from pyramidreid.core import ReIDWarning
from pyramidreid.data.datasets import market_table
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.evaluation.plots import rank_gallery
from pyramidreid.evaluation.retrieval import NoMatchError, evaluate_distances
from pyramidreid.explain.interpretation import ReIDInterpretation
from pyramidreid.training.threshold_calibration import calibrate_distances

SMALL = dict(p=4, k=4, size=(48,24), num_workers=0)

@pytest.fixture(scope='module')
def twice(people):
    "Every test image as a query and in the gallery, cameras unknown; the gallery goes by other names of the same files"
    df = market_table(people)
    df = df[df.split!='train'].drop_duplicates('fn').assign(cam=None)
    other_names = [fn.parent/'..'/fn.parent.name/fn.name for fn in df.fn]
    table = pd.concat([df.assign(split='query'), df.assign(split='gallery', fn=other_names)], ignore_index=True)
    table.attrs['name'] = 'twice'
    return table

def leave_one_out(emb, pids):
    "The scores of each image against all others"
    emb = F.normalize(emb, dim=1)
    return plain_scores((-emb@emb.T).numpy(), pids, pids, mask=np.eye(len(emb), dtype=bool))

def assert_leave_one_out(card, emb, pids):
    scores = leave_one_out(emb, pids)
    np.testing.assert_allclose(card.ap, [s['ap'] if s else np.nan for s in scores], atol=1e-6)
    assert card.first_rank.tolist()==[s['first'] if s else 0 for s in scores]
    kept = (np.asarray(pids)!=-1).sum() # junk is left out of the gallery anyway
    assert card.words()['the query itself']==f'left out: {kept} of {len(emb)} queries are in the gallery'

@pytest.fixture(scope='module')
def half(twice):
    "Rows of `twice` that are queries"
    return (twice.split=='query').to_numpy()

def test_learner(trained, twice, half):
    dl = trained.dls.test_dl(twice, with_labels=True)
    emb = trained.embed(dl)
    assert_leave_one_out(trained.evaluate(dl), emb[half], twice.pid[half].to_numpy())
    assert 'query_images' in trained.to_rank(dl) and 'query_images' not in trained.to_rank()
    assert trained.evaluate_on({'twice':twice}).shape==(1,7)
    rerank = trained.to_rank(dl, rerank=dict(k1=3, k2=1, lambda_=.5))
    kept = twice.pid[half].to_numpy()>=0
    mask = np.eye(kept.sum(), dtype=bool)
    want = [s['ap'] if s else np.nan for s in
            plain_scores(rerank['dist'][:].numpy(), rerank['query_pids'], rerank['gallery_pids'], mask=mask)]
    np.testing.assert_allclose(evaluate_distances(**rerank).ap, want, atol=1e-6)

def test_metrics_during_training(make_learner, people, twice):
    train = market_table(people).query('split=="train"')
    table = pd.concat([train.assign(cam=None),twice], ignore_index=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error', ReIDWarning)
        learn = make_learner(ReIDDataLoaders.from_table(table, **SMALL))
        cached = make_learner(ReIDDataLoaders.from_table(table, cache=True, **SMALL))
    learn.fit(1)
    card = learn.evaluate()
    assert 'the query itself' in card.words()
    shown = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert shown['mAP']==pytest.approx(card.mAP, abs=1e-6) and shown['rank1']==pytest.approx(card.rank1)
    with cached.no_logging(): values = cached.validate()
    assert values[-3]==pytest.approx(cached.evaluate().mAP, abs=1e-6)
    assert 'the query itself' in cached.evaluate().words()

def test_metrics_of_a_shuffled_loader_do_not_guess(make_learner, people, twice):
    "Rows in another order than the table's: which file is which is unknown"
    learn = make_learner()
    dl = learn.dls.test_dl(twice, with_labels=True)
    shuffled = dl.new(shuffle=True)
    assert learn.validate(dl=dl)[-3]==pytest.approx(learn.evaluate(dl).mAP, abs=1e-6)
    with pytest.warns(ReIDWarning, match='a query may find its own file'): learn.validate(dl=shuffled)

def test_shown_rankings(trained, twice, half, monkeypatch):
    dl = trained.dls.test_dl(twice, with_labels=True)
    seen = []
    monkeypatch.setattr('pyramidreid.training.learner_evaluation.plot_ranking', lambda queries,ranked,**kwargs:
                        seen.append((queries,ranked)))
    trained.show_results(dl=dl, seed=0, max_n=3)
    (queries,ranked), = seen
    for query,files in ranked.groupby('query').fn:
        own = queries.fn.iloc[query].resolve()
        assert len(files) and own not in {fn.resolve() for fn in files}

def test_interpretation(trained, twice, half):
    interp = ReIDInterpretation.from_learner(trained, trained.dls.test_dl(twice, with_labels=True))
    assert_leave_one_out(interp.card, interp.emb[:interp.n_query], interp.queries.pid.to_numpy())
    first = interp.ranked([0,5], k=3)
    scores = leave_one_out(interp.emb[:interp.n_query], interp.queries.pid.to_numpy())
    nearest = first[first['rank']==1].right.tolist()
    assert nearest==[scores[i]['first']==1 for i in (0,5)]
    worst = interp.worst(3)
    assert worst.matches.tolist()==[(interp.queries.pid==pid).sum()-1 for pid in worst.pid]

def test_calibration(trained, twice, half):
    dl = trained.dls.test_dl(twice, with_labels=True)
    calibration = trained.calibrate(dl, far=.2)
    scores = [s for s,pid in zip(leave_one_out(trained.embed(dl)[half], twice.pid[half].to_numpy()), twice.pid[half])
              if s and pid!=-1]
    assert calibration.place.tolist()==[s['first'] for s in scores]
    assert 'are in the gallery' in calibration.card().loc['the query itself','']

def test_command_line(twice, half):
    class Brightness:
        size,emb_sz,n_branches = (96,48),6,3
        about = dict(norm='branch', data='nothing', n_ids=0, arch='none', size=(96,48), n_parts=3, levels=[1])
        def run(self, x): return x.reshape(len(x), 6, -1).mean(-1).astype('float32')
    found = query_gallery_distances(Console(quiet=True), Brightness(), twice, 'twice')
    assert_leave_one_out(evaluate_distances(**found), found['dist'].q, found['query_pids'])
    assert calibrate_distances(**found, far=.2).place.max()>1

def test_a_query_whose_only_image_is_itself(trained, twice, half):
    one_each = twice[twice.pid>0].drop_duplicates(['pid','split'])
    with pytest.raises(NoMatchError, match='all the query itself'):
        trained.evaluate(trained.dls.test_dl(one_each, with_labels=True))

def test_a_file_as_two_people():
    "The query's own file under another id is not ranked, but among neighbours of suspects it is shown"
    emb = torch.eye(3)
    queries = pd.DataFrame(dict(fn=['a.jpg'], label=[0], camera=[-1]))
    gallery = pd.DataFrame(dict(fn=['a.jpg','b.jpg','a.jpg'], label=[0,0,1], camera=-1))
    assert rank_gallery(emb[:1], emb, queries, gallery).fn.tolist()==['b.jpg']
    assert rank_gallery(emb[:1], emb, queries, gallery, own_file=True).fn.tolist()==['a.jpg','b.jpg','a.jpg']

# other keys of a table

def test_other_clothes(trained, twice, half, people):
    df = market_table(people)
    df = df[df.split!='train'].reset_index(drop=True)
    rng = np.random.default_rng(0)
    df['clothes'] = rng.choice(['red','blue',None], len(df))
    dl = trained.dls.test_dl(df, with_labels=True)
    emb = F.normalize(trained.embed(dl), dim=1)
    q,g = (df.split=='query').to_numpy(),(df.split=='gallery').to_numpy()
    clothes = np.where(df.clothes.isna(), [f'unknown {i}' for i in df.index], df.clothes)
    want = plain_scores((-emb[q]@emb[g].T).numpy(), df.pid[q].to_numpy(), df.pid[g].to_numpy(), df.cam[q].to_numpy(),
                        df.cam[g].to_numpy(), query_keys=clothes[q], gallery_keys=clothes[g])
    card = trained.evaluate(dl, key='clothes')
    assert card.first_rank.tolist()==[s['first'] if s else 0 for s in want]
    assert card.words()['key']=='clothes' and 'left out (pairs' in card.words()['same person, same key']
    assert trained.evaluate(dl).mAP!=card.mAP
    assert trained.evaluate_on({'x':df}, key='clothes').shape==(1,6)
    with pytest.raises(ValueError, match="key='shoes': this column of the table does not exist; there are 'fn'"):
        trained.evaluate(dl, key='shoes')
    empty = trained.dls.test_dl(df.assign(clothes=None), with_labels=True)
    with pytest.raises(ValueError, match='is empty'): trained.evaluate(empty, key='clothes')

# people whom the model was trained on

def test_loaders_warn_of_queries_that_are_trained_on(people):
    df = market_table(people)
    test_pids,train_pids = df.pid[df.split=='query'].unique(),df.pid[df.split=='train'].unique()
    leaked = df.replace({'pid':{test_pids[0]:train_pids[0], test_pids[1]:train_pids[1]}})
    with pytest.warns(ReIDWarning, match='2 of 6 people with queries are in the training images') as found:
        dls = ReIDDataLoaders.from_table(leaked, **SMALL)
    assert len(found)==1 and str(train_pids[0]) in str(found[0].message)
    assert dls.valid.items.label.isin(range(dls.c)).any()
    distractors = df.assign(pid=df.pid.where(df.pid!=0, train_pids[0]))
    with warnings.catch_warnings():
        warnings.simplefilter('error', ReIDWarning)
        ReIDDataLoaders.from_table(df, **SMALL)
        ReIDDataLoaders.from_table(distractors, **SMALL)

def count_in(card): return card.words().get('query identities trained on')

def test_cards_count_queries_that_were_trained_on(make_learner, people):
    df = market_table(people)
    test_pids,train_pids = df.pid[df.split=='query'].unique(),df.pid[df.split=='train'].unique()
    leaked = df.replace({'pid':{test_pids[0]:train_pids[0]}})
    with pytest.warns(ReIDWarning, match='1 of 6'): dls = ReIDDataLoaders.from_table(leaked, **SMALL)
    learn = make_learner(dls)
    learn.fit(1)
    assert count_in(learn.evaluate())=='1 of 6' and '1 of 6' in str(learn.evaluate())

def as_test(df):
    "Training images as queries and gallery"
    train = df[df.split=='train']
    first = ~train.duplicated('pid')
    return train.assign(split=np.where(first, 'query', 'gallery'))

def test_another_table_of_the_same_dataset(trained, people):
    "Ids of another dataset coincide by chance"
    seen = as_test(market_table(people))
    def card(table): return trained.evaluate(trained.dls.test_dl(table, with_labels=True))
    assert count_in(trained.evaluate()) is None
    assert count_in(card(seen))=='12 of 12'
    seen.attrs['name'] = 'another street'
    assert count_in(card(seen)) is None

def test_training_people_of_joined_datasets(trained):
    dls = SimpleNamespace(data_name='A + B', pids=['A/1','A/2','B/1'], c=3)
    def count(name, pids):
        queries = pd.DataFrame(dict(pid=pids, label=range(len(pids))))
        about = {'data':name, 'trained on':'A + B, 3 identities'}
        return type(trained)._trained_people(SimpleNamespace(dls=dls), queries, about)
    assert count('A', [1,2,3])=={'query identities trained on':'2 of 3'}
    assert count('B', [2])=={} and count('C', [1])=={}
    assert count('A', ['A/1','A/9'])=={'query identities trained on':'1 of 2'}
    assert count('A + B', ['A/1','A/9'])=={'query identities trained on':'1 of 2'}
