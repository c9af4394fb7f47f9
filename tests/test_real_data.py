"Market-1501 and CUHK03-NP as published. Reads the folder that PYRAMIDREID_DATA names, and skips without it."
import os
from pathlib import Path

import pytest

data = os.environ.get('PYRAMIDREID_DATA')
pytestmark = pytest.mark.skipif(not data, reason='PYRAMIDREID_DATA is not set')

@pytest.fixture(scope='module')
def market():
    path = Path(data)/'Market-1501-v15.09.15'
    if not path.exists(): pytest.skip(f'no {path}')
    return path

def test_published_counts(market, capsys):
    from pyramidreid.data.datasets import market_table
    df = market_table(market)
    assert capsys.readouterr().out==''
    count = lambda rows: (len(rows),rows.pid.nunique())
    assert count(df[df.split=='train'])==(12936,751)
    assert count(df[df.split=='query'])==(3368,750)
    gallery = df[df.split=='gallery']
    assert (gallery.pid==-1).sum()==3819 and (gallery.pid==0).sum()==2798
    assert len(gallery[gallery.pid!=-1])==15913
    assert df.cam.nunique()==6

@pytest.mark.parametrize('boxes,train,gallery', [('detected',7365,5332), ('labeled',7368,5328)])
def test_published_counts_of_cuhk03_np(boxes, train, gallery, capsys):
    from pyramidreid.data.datasets import cuhk03_np_table, dataset_table
    path = Path(data)/'cuhk03-np'
    if not (path/boxes).exists(): pytest.skip(f'no {path/boxes}')
    df = cuhk03_np_table(path, boxes)
    assert capsys.readouterr().out==''
    assert {s:(len(o),o.pid.nunique()) for s,o in df.groupby('split')}=={'train':(train,767), 'query':(1400,700), 'gallery':(gallery,700)}
    assert set(df.cam)=={1,2} and not set(df.pid[df.split=='train']) & set(df.pid[df.split!='train'])
    assert dataset_table(path).attrs['name'].startswith('CUHK03-NP')

def test_market_is_recognised(market):
    from pyramidreid.data.datasets import dataset_table, market_table
    assert dataset_table(market).equals(market_table(market))
    with pytest.raises(FileNotFoundError, match='is market1501: pass that path'): dataset_table(market.parent)

def test_every_image_of_two_sets_trains_together(market):
    from pyramidreid.data.datasets import cuhk03_np_table, market_table
    from pyramidreid.data.tables import join_tables, train_on_all
    if not (market.parent/'cuhk03-np'/'detected').exists(): pytest.skip('no CUHK03-NP')
    every = train_on_all(market_table(market))
    assert (len(every),every.pid.nunique())==(12936+3368+15913-2798,1501)
    df = join_tables(every, cuhk03_np_table(market.parent/'cuhk03-np'), valid=1)
    assert df[df.split=='train'].pid.nunique()==1501+767 and (df.split=='query').sum()==1400 and df.cam.nunique()==6+2

def test_loaders(market):
    from pyramidreid.data.loaders import ReIDDataLoaders
    dls = ReIDDataLoaders.from_market(market, p=4, k=4, size=(96,48), num_workers=0)
    x,y = dls.one_batch()
    assert x.shape==(16,3,96,48) and len(y[:,0].unique())==4 and dls.c==751

def test_every_query_has_a_match_under_the_protocol(market):
    import torch

    from pyramidreid.data.datasets import market_table
    from pyramidreid.evaluation.retrieval import evaluate
    df = market_table(market)
    q,g = df[df.split=='query'],df[df.split=='gallery']
    gen = torch.Generator().manual_seed(0)
    card = evaluate(torch.randn(len(q),8,generator=gen), torch.randn(len(g),8,generator=gen), q.pid, g.pid, q.cam, g.cam)
    assert (card.n_query_valid,card.n_gallery,card.n_junk,card.n_distractor)==(3368,15913,3819,2798)
    assert card.mAP<0.01
