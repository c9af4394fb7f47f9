"Market-1501 as published. Reads the folder that PYRAMIDREID_DATA names, and skips without it."
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
    from pyramidreid.tables import market_table
    df = market_table(market)
    assert capsys.readouterr().out==''
    count = lambda rows: (len(rows),rows.pid.nunique())
    assert count(df[df.split=='train'])==(12936,751)
    assert count(df[df.split=='query'])==(3368,750)
    gallery = df[df.split=='gallery']
    assert (gallery.pid==-1).sum()==3819 and (gallery.pid==0).sum()==2798
    assert len(gallery[gallery.pid!=-1])==15913
    assert df.cam.nunique()==6

def test_loaders(market):
    from pyramidreid.data import ReIDDataLoaders
    dls = ReIDDataLoaders.from_market(market, p=4, k=4, size=(96,48), num_workers=0)
    x,y = dls.one_batch()
    assert x.shape==(16,3,96,48) and len(y[:,0].unique())==4 and dls.c==751

def test_every_query_has_a_match_under_the_protocol(market):
    import torch
    from pyramidreid.evaluation import evaluate
    from pyramidreid.tables import market_table
    df = market_table(market)
    q,g = df[df.split=='query'],df[df.split=='gallery']
    gen = torch.Generator().manual_seed(0)
    card = evaluate(torch.randn(len(q),8,generator=gen), torch.randn(len(g),8,generator=gen), q.pid, g.pid, q.cam, g.cam)
    assert (card.n_query_valid,card.n_gallery,card.n_junk,card.n_distractor)==(3368,15913,3819,2798)
    assert card.mAP<0.01
