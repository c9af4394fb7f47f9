"Market-1501 and CUHK03-NP as published. Reads the folder that PYRAMIDREID_DATA names, and skips without it."
import os
from pathlib import Path

import pytest

DATA = os.environ.get('PYRAMIDREID_DATA')
pytestmark = pytest.mark.skipif(not DATA, reason='PYRAMIDREID_DATA is not set')

def find_or_skip(*parts):
    path = Path(DATA).joinpath(*parts)
    if not path.exists(): pytest.skip(f'no {path}')
    return path

def images_of(df, split): return df[df.split==split]
def count(rows): return len(rows),rows.pid.nunique()

@pytest.fixture(scope='module')
def market(): return find_or_skip('Market-1501-v15.09.15')

@pytest.fixture(scope='module')
def cuhk03_np(): return find_or_skip('cuhk03-np', 'detected').parent

def test_published_counts(market, capsys):
    from pyramidreid.data.datasets import market_table
    df = market_table(market)
    assert capsys.readouterr().out==''
    assert count(images_of(df, 'train'))==(12936,751)
    assert count(images_of(df, 'query'))==(3368,750)
    gallery = images_of(df, 'gallery')
    assert (gallery.pid==-1).sum()==3819 and (gallery.pid==0).sum()==2798
    assert count(gallery[gallery.pid!=-1])==(15913,751)
    assert df.cam.nunique()==6

@pytest.mark.parametrize('boxes,n_train,n_gallery', [('detected',7365,5332), ('labeled',7368,5328)])
def test_published_counts_of_cuhk03_np(boxes, n_train, n_gallery, capsys):
    from pyramidreid.data.datasets import cuhk03_np_table, dataset_table
    path = find_or_skip('cuhk03-np', boxes).parent
    df = cuhk03_np_table(path, boxes)
    assert capsys.readouterr().out==''
    train,query,gallery = (images_of(df, split) for split in ('train','query','gallery'))
    assert [count(rows) for rows in (train,query,gallery)]==[(n_train,767), (1400,700), (n_gallery,700)]
    assert set(df.cam)=={1,2}
    assert not set(train.pid) & set(df.pid[df.split!='train'])
    assert dataset_table(path).attrs['name'].startswith('CUHK03-NP')

def test_market_is_recognised(market):
    from pyramidreid.data.datasets import dataset_table, market_table
    assert dataset_table(market).equals(market_table(market))
    with pytest.raises(FileNotFoundError, match='looks like market1501: pass that path'): dataset_table(market.parent)

def test_all_images_of_one_dataset_train_together_with_another(market, cuhk03_np):
    from pyramidreid.data.datasets import cuhk03_np_table, market_table
    from pyramidreid.data.tables import join_tables, train_on_all
    every = train_on_all(market_table(market))
    assert count(every)==(12936+3368+15913-2798,1501)
    df = join_tables(every, cuhk03_np_table(cuhk03_np), valid=1)
    assert images_of(df, 'train').pid.nunique()==1501+767
    assert len(images_of(df, 'query'))==1400 and df.cam.nunique()==6+2

def test_loaders(market):
    from pyramidreid.data.loaders import ReIDDataLoaders
    dls = ReIDDataLoaders.from_market(market, p=4, k=4, size=(96,48), num_workers=0)
    x,y = dls.one_batch()
    assert x.shape==(16,3,96,48)
    assert len(y[:,0].unique())==4 and dls.c==751

def test_every_query_has_a_match_under_the_protocol(market):
    import torch

    from pyramidreid.data.datasets import market_table
    from pyramidreid.evaluation.retrieval import evaluate
    df = market_table(market)
    query,gallery = images_of(df, 'query'),images_of(df, 'gallery')
    generator = torch.Generator().manual_seed(0)
    query_emb,gallery_emb = (torch.randn(len(rows), 8, generator=generator) for rows in (query,gallery))
    card = evaluate(query_emb, gallery_emb, query.pid, gallery.pid, query.cam, gallery.cam)
    assert (card.n_query_valid,card.n_gallery,card.n_junk,card.n_distractor)==(3368,15913,3819,2798)
    assert card.mAP<0.01
