"Tables of images: how splits and ids are read, how queries are chosen and people held out"
import random
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from reference import plain_hold_out, plain_queries

from pyramidreid.core import ReIDWarning, Role
from pyramidreid.data.datasets import market_table
from pyramidreid.data.doctor_report import doctor
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.data.tables import (
    check_match,
    encode_table,
    hold_out,
    is_junk,
    join_tables,
    queries_and_gallery,
    read_splits,
    rows_to_evaluate,
    train_on_all,
)

SMALL = dict(p=2, k=2, size=(48,24), num_workers=0)

def make_table(*images, split=None):
    "A table of images given as pairs of person and camera"
    rows = [(Path(f'{i}.jpg'), pid, cam, split) for i,(pid,cam) in enumerate(images)]
    return pd.DataFrame(rows, columns=['fn','pid','cam','split']).astype(object)

def seen_by(cameras, people):
    "Pairs of person and camera: each of `people` twice from each of `cameras`"
    return [(pid,cam) for pid in people for cam in cameras for _ in range(2)]

def pids_of(df, *splits): return set(df.pid[df.split.isin(splits)])
def messages(caught): return [str(o.message) for o in caught if o.category is ReIDWarning]

@pytest.fixture
def df(people):
    df = market_table(people)
    df.attrs['name'] = 'street'
    return df

@pytest.fixture
def written(df):
    "The same table with splits as people write them"
    ways = dict(train=['Train','training '], query=[' QUERY','probe'], gallery=['Gallery','gallery ','GALLERY'])
    return df.assign(split=[ways[split][i%len(ways[split])] for i,split in enumerate(df.split)])

# Splits

@pytest.mark.parametrize('text,role', [('train',Role.TRAIN), (' Training',Role.TRAIN), ('QUERY ',Role.QUERY),
    ('Probe',Role.QUERY), ('gallery\t',Role.GALLERY), ('GALLERY',Role.GALLERY)])
def test_roles_as_people_write_them(text, role): assert Role.of(text) is role

@pytest.mark.parametrize('text', ['test','Test ','val','valid','VALIDATION','testing'])
def test_a_split_that_does_not_say_what_is_a_query(text):
    with pytest.raises(ValueError, match=r"neither which images are queries.*`queries_and_gallery`"): Role.of(text)

def test_read_splits():
    splits = pd.Series(['train','Probe',' gallery '], index=[5,3,3])
    assert read_splits(splits).equals(pd.Series(['train','query','gallery'], index=[5,3,3], dtype=object))
    for none in ([None,None], [np.nan,' '], ['','']): assert read_splits(pd.Series(none)).tolist()==[None,None]
    assert read_splits(pd.Series([], dtype=object)).tolist()==[]

def test_an_unknown_split_is_an_error_that_counts_what_is_there():
    splits = pd.Series(['train']*3+['Test']*2+['street'])
    with pytest.raises(ValueError, match=r"'Test' is not.*'train' \(3\), 'Test' \(2\), 'street' \(1\)"):
        read_splits(splits)
    with pytest.raises(ValueError, match=r"2 of 3 images have no split.*'query' \(1\)"):
        read_splits(pd.Series(['query','',None]))

def test_rows_to_evaluate(df, written):
    expected = df[df.split!='train']
    assert rows_to_evaluate(written).equals(expected.assign(split=expected.split.astype(object)))
    with pytest.raises(ValueError, match=r"street has no query and no gallery image: the splits are 'train' .\d+."):
        rows_to_evaluate(df[df.split=='train'])
    with pytest.raises(ValueError, match="no column 'split'.*'fn', 'pid', 'cam'"):
        rows_to_evaluate(df.drop(columns='split'))

def encode(df): return encode_table(df)[0]
def hold_some_out(df): return hold_out(df, .5)
def join(df): return join_tables(df, valid=0)
def load(df): return pd.concat([o.items for o in ReIDDataLoaders.from_table(df, **SMALL).loaders])
def load_df(df):
    dls = ReIDDataLoaders.from_df(df, cam_col='cam', split_col='split', **SMALL)
    return pd.concat([dls.train.items, dls.valid.items])
def examine(df): return doctor(df, files=False).images

WAYS_IN = [encode, hold_some_out, join, train_on_all, rows_to_evaluate, load, load_df, examine]

@pytest.mark.parametrize('way', WAYS_IN)
def test_every_way_in_reads_splits_alike(df, written, way):
    expected,got = way(df),way(written)
    assert got.split.tolist()==expected.split.tolist() and got.fn.tolist()==expected.fn.tolist()

@pytest.mark.parametrize('way', [way for way in WAYS_IN if way is not examine])
@pytest.mark.parametrize('split', ['test','street'])
def test_no_way_in_drops_unknown_splits(df, way, split):
    n = (df.split=='gallery').sum()
    with pytest.raises(ValueError, match=rf"'{split}' is not a valid role.*'{split}' \({n}\)"):
        way(df.assign(split=df.split.replace('gallery', split)))

def test_test_loader_reads_splits(make_dls, df, written):
    dls = make_dls()
    got,expected = (dls.test_dl(o, with_labels=True).items for o in (written, df))
    assert got[['split','role']].equals(expected[['split','role']])
    with pytest.raises(ValueError, match=r"'Test'"):
        dls.test_dl(df.assign(split=df.split.replace('query', 'Test')), with_labels=True)

def test_evaluation_on_a_table_as_people_write_it(trained, df, written):
    expected,got = (trained.evaluate_on({'street': o}) for o in (df, written))
    assert got.equals(expected)
    with pytest.raises(ValueError, match="street: 'test' is not a valid role"):
        trained.evaluate_on({'street': df.assign(split=df.split.replace('gallery', 'test'))})

def test_doctor_lists_unknown_splits(df):
    report = doctor(df.assign(split=df.split.replace('query', 'Test')), files=False)
    assert report.findings.severity['unknown_split']=='error'
    assert 'queries_and_gallery' in report.findings.todo['unknown_split']
    assert set(report['unknown_split'].split)=={'Test'} and len(report['unknown_split'])==(df.split=='query').sum()

def test_encoding_needs_splits(df):
    with pytest.raises(ValueError, match="no split.*hold_out"): encode_table(df.assign(split=None))

# Ids

@pytest.mark.parametrize('pid', ['-1','-1 ',' -1','-1.0',-1,-1.,np.int64(-1)])
def test_junk(pid): assert is_junk(pd.Series([pid,1], dtype=object)).tolist()==[True,False]

@pytest.mark.parametrize('change', [str, lambda pid: f'{pid} '])
def test_ids_written_in_two_ways(df, change):
    pids = df.pid.map(str) if change is not str else df.pid
    some = [change(pid) if pid not in (-1,'-1') and i%2 else pid for i,pid in enumerate(pids)]
    with pytest.warns(ReIDWarning, match='person ids are written in two ways'): encode_table(df.assign(pid=some))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        encode_table(df)

def test_doctor_lists_ids_that_are_a_number_and_a_text():
    report = doctor(make_table((1,'7'), ('1',7), (2,'b'), ('-1','b'), (-1,'b'), (None,None)), files=False)
    assert report.findings.severity['number_and_text']=='warning'
    assert report['number_and_text'].which.tolist()==["pid 1 and '1'", "pid '-1' and -1", "cam '7' and 7"]

def test_cameras_written_in_two_ways(df):
    "Camera 1 and camera '1' would count as two, and every image of the same camera as a match"
    cams = [str(cam) if i%2 else cam for i,cam in enumerate(df.cam)]
    with pytest.warns(ReIDWarning, match='4 camera ids are written in two ways'): encode_table(df.assign(cam=cams))

def test_whole_floats_of_a_table_become_integers(df):
    "As pandas reads numbers beside a missing one"
    gaps = df.assign(cam=df.cam.where(df.index!=0).astype(float), pid=df.pid.astype(float))
    dls = ReIDDataLoaders.from_df(gaps, cam_col='cam', split_col='split', **SMALL)
    assert [type(o) for o in dls.cams]==[int]*4 and {type(o) for o in dls.pids}=={int}
    assert (pd.concat([dls.train.items, dls.valid.items]).camera==-1).sum()==1

def test_columns_that_are_not_used(df):
    "Test people would be trained with"
    with pytest.warns(ReIDWarning) as caught: ReIDDataLoaders.from_df(df, **SMALL)
    assert [o.split("'")[1] for o in messages(caught) if 'is not used' in o]==['split','cam']
    with pytest.warns(ReIDWarning) as caught: # for few people held out
        ReIDDataLoaders.from_df(df[df.split=='train'], cam_col='cam', **SMALL)
    assert not any('is not used' in o for o in messages(caught))

@pytest.mark.parametrize('way', [hold_some_out, join, encode, queries_and_gallery])
def test_a_missing_person_id_is_an_error_everywhere(df, way):
    pids = df.pid.astype(object).where(df.index!=4, None)
    with pytest.raises(ValueError, match=f'1 images have no person id, the first is {df.fn[4]}'):
        way(df.assign(pid=pids))

def test_joined_tables(df):
    other = df.assign(pid=df.pid.astype(float))
    other.attrs['name'] = 'station'
    assert {o for o in join_tables(df, other).pid if o!=-1}=={
        f'{name}/{pid}' for name in ('street','station') for pid in df.pid[df.split=='train'] if pid!=-1}
    test_only = df[df.split!='train']
    test_only.attrs['name'] = 'station'
    with pytest.raises(ValueError, match=r"station has no training images.*'query' \(\d+\).*train_on_all"):
        join_tables(df, test_only)
    join_tables(df, test_only, valid='station')

def test_distractors_as_text(df):
    "As in file names and CSV files: 0000"
    text = df.assign(pid=[str(pid) if pid<0 else f'{pid:04}' for pid in df.pid])
    assert (df.pid==0).any()
    assert train_on_all(text).fn.tolist()==train_on_all(df).fn.tolist()
    assert '0000' not in set(train_on_all(text).pid)

# Choosing queries

def random_table(rng, cams):
    images = []
    for pid in range(rng.randrange(4, 30)):
        images += [(pid, rng.choice(cams)) for _ in range(rng.randrange(1, 9))]
    rng.shuffle(images)
    return make_table(*images)

CAMERAS = [[1,2,3], ['a','b'], [None], [1,'b',None]]

@pytest.mark.parametrize('cams', CAMERAS)
@pytest.mark.parametrize('seed', range(8))
def test_every_query_has_a_match(cams, seed):
    df = random_table(random.Random(seed), cams)
    chosen = queries_and_gallery(df, seed)
    assert chosen.drop(columns='split').equals(df.drop(columns='split')) and set(chosen.split)=={'query','gallery'}
    queries,gallery = (chosen[chosen.split==split] for split in ('query','gallery'))
    for query in queries.itertuples():
        same = gallery[gallery.pid==query.pid]
        assert ((same.cam!=query.cam) | same.cam.isna() | (query.cam is None)).any()
    able = []
    for pid,rows in df.groupby('pid', sort=False):
        views = len(set(rows.cam.dropna()))+rows.cam.isna().sum()
        if views>1: able.append(pid)
    assert set(queries.pid)==set(able) and len(able)>1
    if cams!=CAMERAS[-1]: assert sorted(queries.index)==sorted(plain_queries(df, able, random.Random(seed)))

def test_queries_by_hand():
    df = make_table(('ann','door'), ('ann','door'), ('ann','hall'), ('bob','door'), ('bob','hall'), ('cy','door'),
                    ('cy','door'), ('-1','door'), ('-1','hall'))
    for seed in range(5):
        chosen = queries_and_gallery(df, seed).split.tolist()
        assert chosen[:2] in (['query','gallery'], ['gallery','query']) and chosen[2]=='gallery'
        assert sorted(chosen[3:5])==['gallery','query']
        assert chosen[5:]==['gallery']*4 # seen by one camera only, and junk

def test_no_query_has_a_match():
    one_camera = make_table(*seen_by(['door'], range(5)))
    with pytest.raises(ValueError, match="0 of 5 identities have images of two cameras .camera 'door' is the only one"):
        queries_and_gallery(one_camera)
    with pytest.raises(ValueError, match='0 of 3 identities have two images'):
        queries_and_gallery(make_table((1,None), (2,None), (3,None)))
    assert Counter(queries_and_gallery(one_camera.drop(columns='cam')).split)==dict(query=5, gallery=5)

def test_chosen_queries_can_be_evaluated(df):
    test = df[df.split!='train'].drop(columns='split')
    check_match(encode_table(queries_and_gallery(test))[0])

# Holding people out

@pytest.mark.parametrize('cams', CAMERAS[:3])
@pytest.mark.parametrize('seed', range(6))
def test_the_same_people_and_queries_as_ever_where_everyone_can_match(cams, seed):
    "A change would make results incomparable"
    rng,images = random.Random(seed),[]
    for pid in range(30):
        more = [rng.choice(cams) for _ in range(rng.randrange(4))]
        images += [(pid, cam) for cam in cams[:2]*2+more]
    rng.shuffle(images)
    df,pct = make_table(*images),rng.choice([.2,.3,.5,.9])
    assert hold_out(df, pct, seed).split.tolist()==plain_hold_out(df, pct, seed).tolist()

def test_the_fraction_is_of_those_who_can_match():
    df = make_table(*seen_by([1,2], range(15)), *seen_by([1], range(15, 100)))
    with pytest.warns(ReIDWarning) as caught: held = hold_out(df, .2)
    able = set(range(15))
    assert len(pids_of(held, 'query','gallery'))==3 and pids_of(held, 'query','gallery') < able
    assert pids_of(held, 'train')==set(range(100))-pids_of(held, 'query','gallery')
    assert len(messages(caught))==1
    assert messages(caught)[0].startswith("15 of 100 identities have images of two cameras; 3 of these are held out. ")
    assert held.attrs['held_out']=='20% of the 15 training identities with a possible match held out'
    assert len(held)==len(df)

def test_the_loaders_say_of_whom_the_fraction_is(df):
    train = df[df.split=='train']
    few = train[(train.pid.isin(train.pid.unique()[:4])) | (train.cam==1)]
    few.attrs['name'] = 'street'
    able = (few.groupby('pid').cam.nunique()>1).sum()
    dls = ReIDDataLoaders.from_table(few, valid_pct=.5, **SMALL)
    assert 4<=able<train.pid.nunique()
    assert dls.data_name==f'street, 50% of the {able} training identities with a possible match held out'

@pytest.mark.parametrize('n,pct,parts', [(40,.5,[]), (40,.2,['8 of these are held out. Results']),
    (3,.5,['2 of these are held out and 1 are left', 'Results']), (12,.95,['11 of these are held out and 1 are left'])])
def test_too_few_on_either_side(n, pct, parts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        hold_out(make_table(*seen_by([1,2], range(n))), pct)
    assert len(messages(caught))==len(parts)
    for message,part in zip(messages(caught), parts): assert part in message

def test_an_image_of_an_unknown_camera_is_a_possible_match():
    df = make_table((1,'door'), (1,None), (2,'door'), (2,'door'), (3,None), (3,None))
    held = hold_out(df, .9)
    assert pids_of(held, 'query','gallery')=={1,3} and pids_of(held, 'train')=={2}
    check_match(encode_table(held)[0])

def test_one_camera_is_named():
    with pytest.raises(ValueError, match="0 of 5 .*camera 3 is the only one.*at least two must have"):
        hold_out(make_table(*seen_by([3], range(5))))

def test_nobody_to_hold_out(df):
    with pytest.raises(ValueError, match=r"no training images to hold people out of.*'query' \(\d+\), 'gallery'"):
        hold_out(df[df.split!='train'])

def test_20_000_people():
    rng = random.Random(0)
    df = make_table(*((pid, cam) for pid in range(20_000) for cam in (1,2,rng.randrange(6))), split='train')
    held = hold_out(df, .2)
    assert len(pids_of(held, 'query','gallery'))==4000
