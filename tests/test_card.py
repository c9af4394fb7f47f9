"What is on the cards, what a file keeps of it, cards side by side, and whether the intervals of the bootstrap hold what they should"
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import tensor

from pyramidreid.core import Role
from pyramidreid.evaluation.card import *
from pyramidreid.evaluation.protocols import *
from pyramidreid.evaluation.retrieval import *

D,IDS = [[.1,.2,.3,.4]]*3,([1,2,9],[1,2,2,-1])
def whole(**kwargs): return evaluate_distances(D, *IDS, **kwargs)
def single(**kwargs): return evaluate_single_shot(D, *IDS, **kwargs)
about = {'data':'märket 行人', 'size':(384,128), 'file':Path('a/b'), 'none':None, 'nan':math.nan, 'inf':math.inf, 'np':np.float32(.5), 'n':np.int64(3),
         'array':np.arange(2), 'tensor':tensor([1.,math.nan]), 'nested':{'p':Path('c'), 1:(np.int64(2),[math.nan])}, 5:'five', 'role':Role, 'on':True}

# to a file and back

@pytest.mark.parametrize('make', [whole,single])
def test_round_trip(make, tmp_path):
    res,f = make(about=about),tmp_path/'no'/'such'/'yet'/'card.json'
    text = res.to_json(f)
    json.loads(text, parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))
    assert f.read_text(encoding='utf-8')==text and 'märket 行人' in text and [o.name for o in f.parent.iterdir()]==['card.json']
    for src in (f,str(f),text,f'\n {text}'):
        for cls in (Card,type(res)):
            back = cls.from_json(src)
            assert type(back) is type(res) and back.to_json()==text and repr(back)==repr(res)
    assert back.cmc.dtype==torch.float64 and compare_cards([res,back]).shape[1]==len(res.figures())
    if make is whole: assert back.ap[2].isnan() and back.first_rank.dtype==torch.int64 and bootstrap(back).equals(bootstrap(res))

def test_a_card_of_another_kind():
    with pytest.raises(ValueError, match='of a kind asked for .ReIDResult.'): ReIDResult.from_json(single().to_json())

@pytest.mark.parametrize('text,says', [('',''), ('{"mAP":1}','kind'), ('[1, 2]','kind'), ('null','kind'), ('"ReIDResult"','kind'), ('{"card":["ReIDResult"]}','kind'),
    ('{"card":"Nobody"}','kind'), ('{"card":"ReIDResult"}','no mAP, mAP_trapezoid'), (b'\x80\xff\x00','codec'), (b'\xef\xbb\xbf{}','BOM')])
def test_foreign_files(tmp_path, text, says):
    f = tmp_path/'theirs.json'
    f.write_bytes(text.encode() if isinstance(text, str) else text)
    for src in (f,str(f)):
        with pytest.raises(ValueError, match=f'theirs.json is no protocol card.*{says}'): Card.from_json(src)

@pytest.mark.parametrize('field,value', [('cmc',3), ('cmc',['a']), ('ap',None), ('ap',[[1],2]), ('mAP','much'), ('mAP',None), ('n_query',[]), ('about',None), ('about','x'), ('first_rank',{'a':1})])
def test_damaged_files(tmp_path, field, value):
    f = tmp_path/'mine.json'
    text = whole().to_json(f)
    f.write_text(text[:len(text)//2])
    with pytest.raises(ValueError, match='mine.json is no protocol card'): Card.from_json(f)
    f.write_text(json.dumps({**json.loads(text), field:value}))
    with pytest.raises(ValueError, match='mine.json is a damaged protocol card'): Card.from_json(f)

def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.json'): Card.from_json(tmp_path/'none.json')

@pytest.mark.parametrize('error', [OSError('disk full'),KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    f,write = tmp_path/'card.json',Path.write_text
    old = whole().to_json(f)
    def half(self, text, **kwargs):
        write(self, text[:20], **kwargs)
        raise error
    with monkeypatch.context() as m:
        m.setattr(Path, 'write_text', half)
        for to in (f,tmp_path/'new.json'):
            with pytest.raises(type(error)): single().to_json(to)
    assert f.read_text()==old and [o.name for o in tmp_path.iterdir()]==['card.json']

# what it says

def test_context_hides_neither_figures_nor_choices():
    res = whole(about={'rank-1':'100 %', 'distance':'the best', 'flip':'none'})
    t = res.card()['']
    assert t['rank-1']=='50.00 %' and t['distance']=='as given' and t['about: rank-1']=='100 %' and t['about: distance']=='the best' and t['flip']=='none'
    assert list(compare_cards([res,whole()]).columns[6:])==['about: rank-1','about: distance','flip']

def test_words():
    res = whole(about={'html':'<b>', 'long':'x'*90})
    for s in ('(positions 2)','2 of 3','3, of which 0 distractors','junk dropped','x'*90): assert s in repr(res)
    assert '&lt;b&gt;' in res._repr_html_() and 'x'*90 in res._repr_html_()
    many = evaluate_distances(np.zeros((20,2)), [1]+[5]*19, [1,2])
    assert many.card().loc['queries left out, no match',''].startswith('19 (positions 1, 2, 3, 4, 5, 6, 7, 8, …)')

def test_cards_are_compared_by_identity():
    a = whole()
    assert a==a and a!=whole() and a in [whole(),a] and len({a,whole()})==2

# side by side

def test_one_card():
    for cards in ([whole()],{'only':whole()}):
        t = compare_cards(cards)
        assert t.shape==(1,6) and t['rank-1'].tolist()==[50]
    with pytest.raises(ValueError, match='no cards'): compare_cards([])

def test_cards_of_two_kinds():
    t = compare_cards({'w':whole(), 's':single()})
    assert t.loc['w','rank-1']==50 and np.isnan(t.loc['s','mINP']) and np.isnan(t.loc['w','mAP (one match: mean of 1/place)'])
    assert t.loc['w','protocol']=='' and '100 trials' in t.loc['s','protocol'] and t.loc['s','junk dropped']==''
    assert 'distance' not in t and 'queries counted' not in t

def test_equal_cards_of_equal_names():
    a = whole(about={'data':'x'})
    t = compare_cards([a,a,whole(about={'data':'y'})])
    assert list(t.index)==[0,1,2] and t['data'].tolist()==['x','x','y'] and t.shape==(3,7)
    assert compare_cards({('r',1):a, ('r',2):a}).shape==(2,6)

# how sure

def card_of(first, **kwargs):
    "A card of queries whose only match has these places"
    first = torch.as_tensor(first)
    ap = torch.where(first>0, 1/first.double(), torch.nan)
    return replace(whole(), ap=ap, inp=ap, first_rank=first, mAP=ap.nanmean().item(), n_query=len(first), n_query_valid=int((first>0).sum()), **kwargs)

def test_coverage():
    "Of 90 % intervals about nine in ten hold the figure of the population"
    rng = np.random.default_rng(0)
    truth = {'mAP':.6+.4/4, 'rank-1':.6, 'rank-5':1.}
    held = {k:0 for k in truth}
    for i in range(150):
        b = bootstrap(card_of(np.where(rng.random(120)<.6, 1, 4)), level=.9, n=150, seed=i)
        for k,v in truth.items(): held[k] += b.loc[k,'low']-.01<=100*v<=b.loc[k,'high']+.01
    assert held['rank-5']==150 and all(.83<held[k]/150<.97 for k in ('mAP','rank-1'))

def test_of_a_difference():
    first = tensor([1]*30+[7]*10+[0]*5)
    a,b = card_of(first),card_of(torch.where(first==7, 2, first))
    d = bootstrap(b, minus=a)
    assert d.loc['rank-5','figure']==25 and d.loc['rank-1'].tolist()==[0,0,0] and d.loc['mAP','low']>0
    assert (bootstrap(a, minus=a)==0).all(None) and bootstrap(a).equals(bootstrap(a)) and not bootstrap(a).equals(bootstrap(a, seed=1))
    narrow = bootstrap(a, level=.5)
    assert (narrow.high-narrow.low).sum()<(bootstrap(a).high-bootstrap(a).low).sum()

@pytest.mark.parametrize('other', [dict(first=[1,1,0]), dict(first=[1,1]), dict(first=[1,0,1,1]), dict(n_gallery=7), dict(n_distractor=1), dict(n_junk=0), dict(cameras=True)])
def test_of_other_queries(other):
    with pytest.raises(ValueError, match='not of the same queries and gallery'): bootstrap(card_of([1,0,1]), minus=card_of(**{'first':[1,0,2], **other}))

def test_one_query():
    b = bootstrap(card_of([0,2,0]))
    assert b.loc['mAP'].tolist()==[50,50,50] and b.loc['rank-1'].tolist()==[0,0,0] and b.loc['mINP'].tolist()==[50,50,50]

@pytest.mark.parametrize('level', [0,1,-.1,95,math.nan])
def test_levels(level):
    with pytest.raises(ValueError, match='level='): bootstrap(whole(), level=level)
