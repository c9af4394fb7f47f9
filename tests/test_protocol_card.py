"What the cards show, what a file keeps of them, comparisons, and whether bootstrap intervals hold what they should"
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import tensor

from pyramidreid.core import Role
from pyramidreid.evaluation.protocol_card import *
from pyramidreid.evaluation.protocols import *
from pyramidreid.evaluation.retrieval import *

DIST,PIDS = [[.1,.2,.3,.4]]*3,([1,2,9],[1,2,2,-1])
ABOUT = {'data':'märket 行人', 'size':(384,128), 'file':Path('a/b'), 'none':None, 'nan':math.nan, 'inf':math.inf,
         'np':np.float32(.5), 'n':np.int64(3), 'array':np.arange(2), 'tensor':tensor([1.,math.nan]),
         'nested':{'p':Path('c'), 1:(np.int64(2),[math.nan])}, 5:'five', 'role':Role, 'on':True}

def whole(**kwargs): return evaluate_distances(DIST, *PIDS, **kwargs)
def single(**kwargs): return evaluate_single_shot(DIST, *PIDS, **kwargs)
def names_in(folder): return [o.name for o in folder.iterdir()]

# files

@pytest.mark.parametrize('make', [whole,single])
def test_round_trip(make, tmp_path):
    card,file = make(about=ABOUT),tmp_path/'no'/'such'/'yet'/'card.json'
    text = card.to_json(file)
    assert file.read_text(encoding='utf-8')==text and 'märket 行人' in text and names_in(file.parent)==['card.json']
    json.loads(text, parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))
    for src in (file,str(file),text,f'\n {text}'):
        for cls in (Card,type(card)):
            back = cls.from_json(src)
            assert type(back) is type(card)
            assert back.to_json()==text and repr(back)==repr(card)

@pytest.mark.parametrize('make', [whole,single])
def test_a_card_from_a_file_serves_like_the_original(make):
    card = make(about=ABOUT)
    back = Card.from_json(card.to_json())
    assert back.cmc.dtype==torch.float64
    assert compare_cards([card,back]).shape[1]==len(card.metrics())+1, 'that cameras are unknown'
    if make is whole:
        assert back.ap[2].isnan() and back.first_rank.dtype==torch.int64
        assert bootstrap(back).equals(bootstrap(card))

def test_a_card_of_another_kind():
    with pytest.raises(ValueError, match='its kind is not ReIDResult'): ReIDResult.from_json(single().to_json())

@pytest.mark.parametrize('content,says', [
    (b'',''), (b'{"mAP":1}','kind'), (b'[1, 2]','kind'), (b'null','kind'), (b'"ReIDResult"','kind'),
    (b'{"card":["ReIDResult"]}','kind'), (b'{"card":"Nobody"}','kind'),
    (b'{"card":"ReIDResult"}','no mAP, mAP_trapezoid'), (b'\x80\xff\x00','codec'), (b'\xef\xbb\xbf{}','BOM')])
def test_foreign_files(tmp_path, content, says):
    file = tmp_path/'theirs.json'
    file.write_bytes(content)
    for src in (file,str(file)):
        with pytest.raises(ValueError, match=f'theirs.json is not a valid protocol card.*{says}'): Card.from_json(src)

@pytest.mark.parametrize('field,value', [
    ('cmc',3), ('cmc',['a']), ('ap',None), ('ap',[[1],2]), ('mAP','much'), ('mAP',None), ('n_query',[]),
    ('about',None), ('about','x'), ('first_rank',{'a':1})])
def test_damaged_fields(tmp_path, field, value):
    file = tmp_path/'mine.json'
    file.write_text(json.dumps({**json.loads(whole().to_json()), field:value}))
    with pytest.raises(ValueError, match='mine.json is a damaged protocol card'): Card.from_json(file)

def test_truncated_file(tmp_path):
    file = tmp_path/'mine.json'
    text = whole().to_json()
    file.write_text(text[:len(text)//2])
    with pytest.raises(ValueError, match='mine.json is not a valid protocol card'): Card.from_json(file)

def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.json'): Card.from_json(tmp_path/'none.json')

@pytest.mark.parametrize('error', [OSError('disk full'),KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    file,write_text = tmp_path/'card.json',Path.write_text
    text = whole().to_json(file)
    def write_some(self, text, **kwargs):
        write_text(self, text[:20], **kwargs)
        raise error
    with monkeypatch.context() as m:
        m.setattr(Path, 'write_text', write_some)
        for path in (file,tmp_path/'new.json'):
            with pytest.raises(type(error)): single().to_json(path)
    assert file.read_text()==text and names_in(tmp_path)==['card.json']

# what a card shows

def test_context_hides_neither_metrics_nor_choices():
    card = whole(about={'rank-1':'100 %', 'distance':'the best', 'flip':'none'})
    shown = card.card()['']
    assert (shown['rank-1'],shown['about: rank-1'])==('50.00 %','100 %')
    assert (shown['distance'],shown['about: distance'])==('as given','the best')
    assert shown['flip']=='none'
    columns = list(compare_cards([card,whole()]).columns[6:])
    assert columns==['same person, same camera','about: rank-1','about: distance','flip']

def test_words():
    card = whole(about={'html':'<b>', 'long':'x'*90})
    expected = ['(positions 2)','2 of 3','3, of which 0 distractors','junk dropped','x'*90]
    for words in expected: assert words in repr(card)
    assert '&lt;b&gt;' in card._repr_html_() and 'x'*90 in card._repr_html_()

def test_a_long_list_of_queries_is_cut():
    card = evaluate_distances(np.zeros((20,2)), [1]+[5]*19, [1,2])
    shown = card.card().loc['queries left out, no match','']
    assert shown=='19 (positions 1, 2, 3, 4, 5, 6, 7, 8, …)'

def test_cards_are_equal_by_identity():
    card = whole()
    assert card==card and card!=whole()
    assert card in [whole(),card] and len({card,whole()})==2

# comparisons

def test_one_card():
    for cards in ([whole()],{'only':whole()}):
        table = compare_cards(cards)
        assert table.shape==(1,7) and table['rank-1'].tolist()==[50]
    with pytest.raises(ValueError, match='no cards'): compare_cards([])

def test_cards_of_two_kinds():
    table = compare_cards({'whole':whole(), 'single':single()})
    in_whole,in_single = table.loc['whole'],table.loc['single']
    assert in_whole['rank-1']==50 and np.isnan(in_whole['mAP (one match: mean of 1/rank)'])
    assert np.isnan(in_single['mINP'])
    assert in_whole['protocol']=='' and '100 trials' in in_single['protocol'] and in_single['junk dropped']==''
    assert 'distance' not in table and 'queries counted' not in table

def test_equal_cards_of_equal_names():
    card = whole(about={'data':'x'})
    table = compare_cards([card,card,whole(about={'data':'y'})])
    assert list(table.index)==[0,1,2] and table['data'].tolist()==['x','x','y'] and table.shape==(3,8)
    assert compare_cards({('r',1):card, ('r',2):card}).shape==(2,7)

def test_unknown_cameras_are_said_where_the_metrics_stand():
    unknown = whole()
    known = evaluate_distances(DIST, *PIDS, [1,1,1], [2,2,2,2])
    says = 'cameras unknown, so not comparable with camera-aware results: images from the query\'s own camera count'
    html,words = unknown._repr_html_().replace('&#x27;', "'"),unknown.words()['same person, same camera']
    assert all(says in shown for shown in (str(unknown),html,words))
    assert unknown.card().index[len(unknown.metrics())]=='same person, same camera', 'right below the metrics'
    assert says not in str(known) and known.words()['same person, same camera']=='left out'
    for cards in ([unknown],[unknown,unknown],[unknown,known],[single(),unknown],[single()]):
        assert compare_cards(cards)['same person, same camera'].str.startswith(says).any()
    assert says in str(single())
    assert 'same person, same camera' not in compare_cards([known,known])

def test_a_card_of_an_earlier_version():
    "Without what else was left out"
    values = json.loads(whole().to_json())
    del values['left_out']
    assert repr(Card.from_json(json.dumps(values)))==repr(whole())

# bootstrap

def card_of(first_rank, **kwargs):
    "A card of queries whose only match has these ranks"
    first_rank = torch.as_tensor(first_rank)
    ap = torch.where(first_rank>0, 1/first_rank.double(), torch.nan)
    return replace(whole(), ap=ap, inp=ap, first_rank=first_rank, mAP=ap.nanmean().item(),
                   n_query=len(first_rank), n_query_valid=int((first_rank>0).sum()), **kwargs)

def test_coverage():
    "Nine in ten of the 90 % intervals hold the mean of the population, more or less"
    rng = np.random.default_rng(0)
    population = {'mAP':.6+.4/4, 'rank-1':.6, 'rank-5':1.}
    held = dict.fromkeys(population, 0)
    for i in range(150):
        intervals = bootstrap(card_of(np.where(rng.random(120)<.6, 1, 4)), level=.9, n=150, seed=i)
        for metric,mean in population.items():
            held[metric] += intervals.loc[metric,'low']-.01 <= 100*mean <= intervals.loc[metric,'high']+.01
    assert held['rank-5']==150
    assert all(.83<held[metric]/150<.97 for metric in ('mAP','rank-1'))

def test_intervals_of_a_difference():
    first = tensor([1]*30+[7]*10+[0]*5)
    worse,better = card_of(first),card_of(torch.where(first==7, 2, first))
    gain = bootstrap(better, minus=worse)
    assert gain.loc['rank-5','value']==25 and gain.loc['rank-1'].tolist()==[0,0,0] and gain.loc['mAP','low']>0
    assert (bootstrap(worse, minus=worse)==0).all(None)

def test_seed_and_level():
    card = card_of([1]*30+[7]*10+[0]*5)
    wide,narrow = bootstrap(card),bootstrap(card, level=.5)
    assert wide.equals(bootstrap(card)) and not wide.equals(bootstrap(card, seed=1))
    assert (narrow.high-narrow.low).sum()<(wide.high-wide.low).sum()

@pytest.mark.parametrize('other', [
    dict(first_rank=[1,1,0]), dict(first_rank=[1,1]), dict(first_rank=[1,0,1,1]), dict(n_gallery=7),
    dict(n_distractor=1), dict(n_junk=0), dict(cameras=True)])
def test_cards_of_other_queries(other):
    other = card_of(**{'first_rank':[1,0,2], **other})
    card = card_of([1,0,1])
    with pytest.raises(ValueError, match='not of the same queries and gallery'): bootstrap(card, minus=other)

def test_one_query():
    intervals = bootstrap(card_of([0,2,0]))
    assert intervals.loc['mAP'].tolist()==[50,50,50]
    assert intervals.loc['rank-1'].tolist()==[0,0,0]
    assert intervals.loc['mINP'].tolist()==[50,50,50]

@pytest.mark.parametrize('level', [0,1,-.1,95,math.nan])
def test_invalid_levels(level):
    with pytest.raises(ValueError, match='level='): bootstrap(whole(), level=level)
