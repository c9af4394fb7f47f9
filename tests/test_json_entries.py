"Cards and calibrations from strangers: each entry is checked, and an error names it"
import copy
import json
import os
import random

import pytest

from pyramidreid.evaluation.openset import Calibration
from pyramidreid.evaluation.protocol_card import Card
from pyramidreid.evaluation.protocols import evaluate_single_shot
from pyramidreid.evaluation.retrieval import evaluate_distances
from pyramidreid.training.threshold_calibration import calibrate_distances

DIST,PIDS = [[.1,.2,.3,.4]]*3,([1,2,9],[1,2,2,-1])

MADE = {'evaluation':evaluate_distances(DIST, *PIDS, about={'data':'three','size':[384,128]}),
        'single shot':evaluate_single_shot(DIST, *PIDS), 'calibration':calibrate_distances(DIST, *PIDS, far=.5)}
READERS = {'evaluation':Card, 'single shot':Card, 'calibration':Calibration}

def read(kind, values): return READERS[kind].from_json(json.dumps(values))
def values_of(kind): return json.loads(MADE[kind].to_json())

@pytest.mark.parametrize('kind', MADE)
def test_what_was_written_is_read(kind):
    assert READERS[kind].from_json(MADE[kind].to_json()).to_json()==MADE[kind].to_json()

WRONG = {
    'evaluation':[dict(mAP=7), dict(mAP='0.5'), dict(mAP=True), dict(mINP=-.1), dict(cmc=[1.5]), dict(cmc=[]),
        dict(cmc='1'), dict(ap=[0,1]), dict(first_rank=[1,-1,0]), dict(first_rank=[1,.5,0]), dict(inp=[[1]]*3),
        dict(first_rank=[1,10**30,0]), dict(n_query=3.7), dict(n_query=4), dict(n_query_valid=3), dict(n_junk=-1),
        dict(n_tied='1'), dict(cameras='no'), dict(cameras=0), dict(distance=['cosine']), dict(distance=None),
        dict(about=[['a','b']]), dict(left_out=[])],
    'single shot':[dict(trials=0), dict(std=[.1]), dict(seed='x'), dict(n_ids=-3), dict(n_query_valid=99),
        dict(cmc=[None,'a'])],
    'calibration':[dict(impostor=['1']), dict(impostor=5), dict(person=[.5]), dict(place=[0]), dict(place=[1.5]),
        dict(genuine=[None]), dict(pairs=[[.5,2,0]]), dict(pairs=[[.5,.1]]), dict(pairs=[.1,.2,.3]),
        dict(n_gallery='many'), dict(n_gallery=-5), dict(n_ids=None), dict(unknown='perhaps'), dict(unknown=['hide']),
        dict(cameras='false'), dict(distance=3), dict(far='0.1'), dict(far=2), dict(level=95), dict(level=True),
        dict(about='street'), dict(found=[10**25])]}

@pytest.mark.parametrize('kind,change', [(kind,change) for kind in WRONG for change in WRONG[kind]])
def test_a_wrong_entry_is_named(kind, change):
    with pytest.raises(ValueError, match=next(iter(change))) as error: read(kind, values_of(kind) | change)
    assert 'Give what `to_json` wrote' in str(error.value)

@pytest.mark.parametrize('kind', MADE)
def test_text_that_is_not_json(kind):
    text = MADE[kind].to_json()
    cls = READERS[kind]
    for bad in ('{"a":'*100_000, '{"a":'+'['*100_000, text.replace('"about": {', '"about": {"x": NaN, '),
                text.replace('"about": {', '"about": {"x": '+'9'*5000+'1e9e, '), text[:-2], '{}'):
        with pytest.raises(ValueError): cls.from_json(bad)

VALUES = [None,True,False,0,1,-1,.5,-1.5,2,1e308,10**19,10**40,'','1','hide','x'*100,
          [],[0],[None],['a'],[[1,2]],[[1,.5,.5]],{},{'a':1}]

def mutated(rng, values):
    "The values with an entry, or an item of a list, replaced, removed or doubled"
    values = copy.deepcopy(values)
    for _ in range(rng.choice([1,1,2,4])):
        name = rng.choice(list(values))
        value,kind = values[name],rng.randrange(4)
        if isinstance(value, list) and value and kind<3:
            i = rng.randrange(len(value))
            if kind==0:   value[i] = rng.choice(VALUES)
            elif kind==1: value.pop(i)
            else:         value.insert(i, copy.deepcopy(value[i]))
        elif kind==3 and len(values)>1: del values[name]
        else: values[name] = copy.deepcopy(rng.choice(VALUES))
    return values

@pytest.mark.parametrize('kind', MADE)
def test_mutated_files(kind):
    "What is read is of use: it prints, is written and is read again; all else is a ValueError"
    rng,n_read = random.Random(kind),0
    for _ in range(600):
        values = mutated(rng, values_of(kind))
        try: back = read(kind, values)
        except ValueError: continue
        n_read += 1
        text = back.to_json()
        assert repr(READERS[kind].from_json(text))==repr(back)
        assert back.card().shape[1]==1
        if kind=='evaluation': assert 0<=back.rank1<=1
        if kind=='calibration': assert len(back.table())==4
    assert 20<n_read<400

@pytest.mark.parametrize('reader', [Card,Calibration])
def test_a_file_of_a_terabyte_is_not_read(tmp_path, reader):
    with open(tmp_path/'card.json', 'wb') as f: f.truncate(2**40) # it has no blocks on the disk
    with pytest.raises(ValueError, match='card.json has 1,099,511,627,776 bytes, more than the 536,870,912 allowed'):
        reader.from_json(tmp_path/'card.json')

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
@pytest.mark.parametrize('reader', [Card,Calibration])
def test_a_pipe_is_not_waited_for(tmp_path, reader):
    os.mkfifo(tmp_path/'card.json')
    with pytest.raises(ValueError, match='card.json is not a regular file but .*: give the path of a JSON file'):
        reader.from_json(tmp_path/'card.json')
