"The published sets: each read from a tiny folder in its exact layout, and what goes wrong with real folders"
import errno
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import pyramidreid.data.cuhk03 as cuhk03
from pyramidreid.data.cuhk03 import *
from pyramidreid.data.datasets import *
from pyramidreid.data.datasets import _finish
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.data.tables import encode_table, join_tables, train_on_all

h5py,sio = pytest.importorskip('h5py'),pytest.importorskip('scipy.io')
BOXES = dict(train='bounding_box_train', query='query', gallery='bounding_box_test')
COLS = ['fn','pid','cam','split']

def touch(path, *names):
    for o in names:
        (path/o).parent.mkdir(parents=True, exist_ok=True)
        (path/o).touch()
    return path

def draw(path, *names):
    "Images of 8×4 pixels"
    for i,o in enumerate(names):
        (path/o).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4,8), (7*i%255,90,120)).save(path/o)
    return path

def facts(df): return sorted((f.name,p,c,s) for f,p,c,s in df[COLS].itertuples(index=False))
def rename(o): return o.replace('/','_')

NAMES = {
    'market1501':[('0002_c1s1_000451_03.jpg','train',2,1), ('0003_c6s4_000451_01.jpg','query',3,6),
                  ('0003_c2s1_000001_00.jpg','gallery',3,2), ('-1_c1s1_000401_03.jpg','gallery',-1,1), ('0000_c4s6_014991_01.jpg','gallery',0,4)],
    'dukemtmc':[('0001_c2_f0046182.jpg','train',1,2), ('0005_c8_f0046985.jpg','query',5,8), ('7140_c3_f0200013.jpg','gallery',7140,3)],
    'cuhk03_np':[('0003_c1_22.png','train',3,1), ('0001_c2_10.png','query',1,2), ('1467_c1_1.png','gallery',1467,1)]}
NAMES['occluded_duke'] = NAMES['dukemtmc']

def boxes(path, key, make=touch, sub=''): return make(path, *[f'{sub}{BOXES[split]}/{f}' for f,split,*_ in NAMES[key]])
def expected(key): return sorted((f,p,c,s) for f,s,p,c in NAMES[key])

MSMT = dict(train=[('0000/0000_000_01_0303morning_0008_0.jpg',0), ('0000/0000_001_14_0303noon_0010_1_ex.jpg',0)], val=[('1040/1040_000_07_0302afternoon_0008_0.jpg',1040)],
            query=[('0000/0000_002_15_0113afternoon_0001_0.jpg',0)], gallery=[('0000/0000_000_01_0303morning_0008_0.jpg',0), ('3059/3059_004_12_0303morning_0008_0.jpg',3059)])
def msmt17(path, v=1, make=touch, end='\n', tail=''):
    for part,lines in MSMT.items():
        folder = ('test' if part in ('query','gallery') else 'train') if v==1 else ('mask_test_v2' if part in ('query','gallery') else 'mask_train_v2')
        make(path, *[f'{folder}/{f}' for f,_ in lines])
        (path/f'list_{part}.txt').write_bytes((end.join(f'{f} {p}' for f,p in lines)+end+tail).encode())
    return path

def bodies(path, make=touch):
    "The three sets of partial and occluded people, below `path`"
    make(path/'Partial-REID_Dataset', *[f'{k}_body_images/{p:03d}_{i:03d}.jpg' for k in ('partial','whole','occluded') for p in (1,60) for i in (1,2)])
    make(path/'Occluded_REID', *[f'{k}_body_images/{p:03d}/{p:03d}_{i:02d}.tif' for k in ('occluded','whole') for p in (1,200) for i in (1,5)])
    make(path/'P-DukeMTMC-reid', *[f'{t}/{k}_body_images/{p:04d}/{p:04d}_c{c}_f0046182.jpg' for t,p in (('train',1),('train',3),('test',2)) for k,c in (('occluded',1),('whole',2))])
    return path

# each set in its layout

def test_market_with_what_lies_around_in_the_original(tmp_path):
    path = boxes(tmp_path/'Market-1501-v15.09.15', 'market1501')
    touch(path, 'bounding_box_train/Thumbs.db', 'query/Thumbs.db', 'bounding_box_test/.DS_Store', 'query/._0003_c6s4_000451_01.jpg', 'readme.txt', 'gt_bbox/0001_c1s1_001051_00.jpg', 'gt_query/0001_c1s1_001051_00_good.mat')
    df = market_table(path)
    assert list(df.columns)==COLS and facts(df)==expected('market1501') and df.cam.dtype==df.pid.dtype==np.int64
    assert df.attrs==dict(name='Market-1501', counts=dict(train=(12936,751), query=(3368,750), gallery=(15913,751)))

@pytest.mark.parametrize('folder,name,known', [('Market-1501-v15.09.15','Market-1501',True), ('market1501','Market-1501',True), ('Market_1501','Market-1501',True), ('street','street',False)])
def test_only_market_is_called_so_and_compared(tmp_path, capsys, folder, name, known):
    df = market_table(boxes(tmp_path/folder, 'market1501'))
    assert df.attrs['name']==name and bool(df.attrs['counts'])==known
    out = capsys.readouterr().out
    assert ('Market-1501 gallery: 2 images of 2 identities, published 15,913 of 751' in out)==known and len(out.splitlines())==3*known

def test_the_folder_one_stands_in_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(boxes(tmp_path/'street', 'market1501'))
    assert market_table('.').attrs['name']=='street'

@pytest.mark.parametrize('folder', ['with space','Straße des 17. Juni','市场','a.b'])
@pytest.mark.parametrize('key,read', [('market1501',market_table),('dukemtmc',duke_table),('cuhk03_np',cuhk03_np_table)])
def test_folders_of_any_name_and_loud_suffixes(tmp_path, folder, key, read):
    path = boxes(tmp_path/folder, key, sub='detected/' if key=='cuhk03_np' else '')
    for f in [f for f in path.rglob('*') if f.is_file()]: f.rename(f.with_suffix(f.suffix.upper()))
    assert [(f.rsplit('.')[0],*o) for f,*o in facts(read(str(path)))]==[(f.rsplit('.')[0],*o) for f,*o in expected(key)]

@pytest.mark.parametrize('key,read,name,train', [('dukemtmc',duke_table,'DukeMTMC-reID',(16522,702)), ('occluded_duke',occluded_duke_table,'Occluded-Duke',(15618,702))])
def test_duke(tmp_path, key, read, name, train):
    df = read(boxes(tmp_path/'x', key))
    assert facts(df)==expected(key) and df.attrs['name']==name and df.attrs['counts']['train']==train and df.attrs['counts']['gallery']==(17661,1110)

def test_cuhk03_np(tmp_path):
    path = boxes(tmp_path/'cuhk03-np', 'cuhk03_np', sub='labeled/')
    with pytest.raises(FileNotFoundError, match='CUHK03-NP detected is not at.*detected'): cuhk03_np_table(path)
    boxes(path, 'cuhk03_np', sub='detected/')
    for o,n in (('detected',7365),('labeled',7368)):
        df = cuhk03_np_table(path, boxes=o)
        assert facts(df)==expected('cuhk03_np') and df.attrs['name']==f'CUHK03-NP {o}' and df.attrs['counts']['train']==(n,767)
        assert all(f.parent.parent.name==o for f in df.fn)
    with pytest.raises(ValueError, match="boxes='drawn'.*'detected' and 'labeled'"): cuhk03_np_table(path, boxes='drawn')

@pytest.mark.parametrize('v', [1,2])
@pytest.mark.parametrize('end,tail', [('\n',''), ('\r\n',''), ('\n','\n\n'), ('\r\n','\r\n  \r\n')])
def test_msmt17(tmp_path, v, end, tail):
    "Training is train and val; test people are others though their numbers are the same; the camera is the third field"
    df = msmt17_table(msmt17(tmp_path/'MSMT17', v, end=end, tail=tail))
    assert [(p,c,s) for p,c,s in df[['pid','cam','split']].itertuples(index=False)]==[
        (0,1,'train'),(0,14,'train'),(1040,7,'train'),(10000,15,'query'),(10000,1,'gallery'),(13059,12,'gallery')]
    assert df.attrs['name']==f'MSMT17 V{v}' and df.attrs['counts']==dict(train=(32621,1041), query=(11659,3060), gallery=(82161,3060))
    assert all(f.exists() for f in df.fn) and df.pid.dtype==np.int64
    assert not set(df.pid[df.split=='train']) & set(df.pid[df.split!='train'])

def test_sets_of_occluded_and_partial_people(tmp_path):
    bodies(tmp_path)
    df = dataset_table(tmp_path/'Partial-REID_Dataset', 'partial_reid')
    assert facts(df)==sorted((f'{p:03d}_{i:03d}.jpg',p,None,s) for s in ('query','gallery') for p in (1,60) for i in (1,2))
    assert {f.parent.name for f in df.fn[df.split=='query']}=={'partial_body_images'}
    df = dataset_table(tmp_path/'Occluded_REID', 'occluded_reid')
    assert facts(df)==sorted((f'{p:03d}_{i:02d}.tif',p,None,s) for s in ('query','gallery') for p in (1,200) for i in (1,5))
    df = dataset_table(tmp_path/'P-DukeMTMC-reid', 'p_dukemtmc')
    assert df.groupby('split').pid.unique().map(sorted).to_dict()=={'train':[1,3], 'query':[2], 'gallery':[2]} and (df.split=='train').sum()==4
    assert df.cam.isna().all()
    for f in [f for f in (tmp_path/'P-DukeMTMC-reid').rglob('*.jpg')]: f.rename(f.with_name(f.name.replace('_f0046182','')))
    assert dataset_table(tmp_path/'P-DukeMTMC-reid').attrs['name']=='P-DukeMTMC-reID'

def test_ids_with_more_digits(tmp_path):
    path = boxes(tmp_path/'x', 'market1501')
    touch(path, 'query/123456_c12s1_000451_03.jpg')
    df = market_table(path)
    assert (123456,12) in set(zip(df.pid, df.cam))

def test_distractors(tmp_path):
    path = boxes(tmp_path/'Market-1501', 'market1501')
    more = touch(tmp_path/'distractors_500k', 'xyz.jpg', '0000_c5s3_000001_00.jpg', '12.JPG', 'Thumbs.db')
    df = market_table(path, distractors=more)
    new = df[5:]
    assert len(new)==3 and (new.pid==0).all() and set(new.split)=={'gallery'} and sorted(new.cam.dropna())==[5] and df.index.is_unique
    assert df.attrs['name']=='Market-1501 + 3 distractors' and df.attrs['counts']['gallery']==(15916,751) and df.attrs['counts']['train']==(12936,751)
    coded,_,cams = encode_table(df)
    assert cams==[1,2,4,5,6] and coded[coded.pid==0].label.nunique()==1
    assert market_table(boxes(tmp_path/'street', 'market1501'), more).attrs['counts']=={}
    with pytest.raises(FileNotFoundError, match='distractors_500k'): market_table(path, distractors=tmp_path/'nowhere')

def test_counts_are_printed_where_they_differ_and_only_there(capsys):
    df = pd.DataFrame(dict(pid=[1,1,2,-1,0], split=['train','train','query','gallery','gallery']))
    _finish(df, 'X', dict(train=(2,1), query=(1,1), gallery=(1,1)))
    assert capsys.readouterr().out=='' and df.attrs['name']=='X'
    _finish(df, 'X', dict(train=(2,2), query=(1000,1), gallery=(1,1)))
    assert capsys.readouterr().out=='X train: 2 images of 1 identities, published 2 of 2\nX query: 1 images of 1 identities, published 1,000 of 1\n'

# folders that are not the set

READERS = dict(market1501=market_table, dukemtmc=duke_table, occluded_duke=occluded_duke_table, cuhk03_np=cuhk03_np_table, msmt17=msmt17_table)
def build(key, path): return msmt17(path) if key=='msmt17' else boxes(path, key, sub='detected/' if key=='cuhk03_np' else '')

@pytest.mark.parametrize('key', READERS)
def test_a_missing_set_says_where_to_get_it_and_how_it_lies(tmp_path, key):
    read = READERS[key]
    with pytest.raises(FileNotFoundError) as e: read(tmp_path/'nowhere')
    msg = str(e.value)
    s = next(s for k,s in reid_sets.items() if k.startswith(key))
    assert str(tmp_path/'nowhere') in msg and s.home in msg and s.terms in msg and s.example in msg
    assert all(f'\n  {o}' in msg for o in s.needs()) and 'It seems' not in msg
    if 'duke' in key: assert 'withdrew DukeMTMC' in msg
    assert str(tmp_path/'nowhere'/s.needs()[-1]) in msg
    path = build(key, tmp_path/'data'/'set')
    for wrong in (path.parent, path/s.needs()[0].split('/')[0] if key!='msmt17' else path/'train'):
        with pytest.raises(FileNotFoundError) as e: read(wrong)
        assert f'It seems to be at {path}: pass that path' in str(e.value)

def test_a_missing_or_empty_part_is_named_and_the_others_are_not(tmp_path):
    path = boxes(tmp_path/'x', 'dukemtmc')
    for f in (path/'query').iterdir(): f.unlink()
    for _ in range(2):
        with pytest.raises(FileNotFoundError) as e: duke_table(path)
        assert f'Missing or empty: {path/"query"}.\n' in str(e.value)
        if (path/'query').exists(): (path/'query').rmdir()
    with pytest.raises(FileNotFoundError, match='is not at'): duke_table(path/'bounding_box_train'/'0001_c2_f0046182.jpg')

def test_both_versions_of_msmt17_are_looked_for(tmp_path, monkeypatch):
    path = msmt17(tmp_path/'data'/'MSMT17_V2', 2)
    with pytest.raises(FileNotFoundError) as e: msmt17_table(path.parent)
    assert f'It seems to be at {path}: pass that path' in str(e.value) and 'or, for MSMT17 V2:' in str(e.value) and '\n  mask_test_v2/' in str(e.value) and '\n  test/' in str(e.value)
    monkeypatch.chdir(path/'mask_train_v2')
    with pytest.raises(FileNotFoundError, match=re.escape(f'It seems to be at {path}')): msmt17_table('.')

def test_wrong_file_names(tmp_path):
    "Market's names are not Duke's, nor the other way around; a holiday picture is nobody's"
    with pytest.raises(ValueError, match='5 of 5 file names are no names of DukeMTMC-reID'): duke_table(boxes(tmp_path/'m', 'market1501'))
    path = touch(boxes(tmp_path/'d', 'dukemtmc'), 'query/holiday.jpg')
    with pytest.raises(ValueError, match='1 of 4 file names.*0001_c2_f0046182.jpg.*holiday.jpg'): duke_table(path)
    path = touch(msmt17(tmp_path/'s'), 'train/0000/me.jpg')
    (path/'list_val.txt').write_text('0000/me.jpg 0\n')
    with pytest.raises(ValueError, match='1 of 6 file names.*MSMT17 V1.*me.jpg'): msmt17_table(path)

def test_lists_that_are_wrong(tmp_path):
    path = msmt17(tmp_path/'MSMT17')
    lst,whole = path/'list_val.txt',(path/'list_val.txt').read_text()
    for text in ('', '\n\n'):
        lst.write_text(text)
        with pytest.raises(FileNotFoundError, match=re.escape(f'Missing or empty: {lst}.')): msmt17_table(path)
    for line in ('0000/x.jpg', '0000/x.jpg zero', '0000/x.jpg -1'):
        lst.write_text(whole+line+'\n')
        with pytest.raises(ValueError) as e: msmt17_table(path)
        assert f'1 of 2 lines of {lst}' in str(e.value) and line in str(e.value)
    lst.write_text(whole+'9999/9999_000_01_0303morning_0008_0.jpg 9\n'+'9998/9998_000_01_0303morning_0008_0.jpg 9\n')
    with pytest.raises(FileNotFoundError) as e: msmt17_table(path)
    assert f'2 of the 3 images that {lst} names' in str(e.value) and '9999_000_01' in str(e.value)
    lst.write_bytes(b'\xef\xbb\xbf'+whole.encode())
    assert len(msmt17_table(path))==6
    lst.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f'Missing or empty: {lst}.')): msmt17_table(path)

# any of them

def test_any_set_is_recognised(tmp_path):
    bodies(tmp_path)
    boxes(tmp_path/'Market-1501-v15.09.15', 'market1501'), boxes(tmp_path/'DukeMTMC-reID', 'dukemtmc'), boxes(tmp_path/'Occluded_Duke', 'occluded_duke')
    boxes(tmp_path/'np', 'cuhk03_np', sub='detected/'), boxes(tmp_path/'np2', 'cuhk03_np', sub='labeled/'), msmt17(tmp_path/'a', 1), msmt17(tmp_path/'b', 2)
    boxes(tmp_path/'street', 'market1501')
    for folder,name in {'Market-1501-v15.09.15':'Market-1501', 'DukeMTMC-reID':'DukeMTMC-reID', 'Occluded_Duke':'Occluded-Duke', 'np':'CUHK03-NP detected', 'np2':'CUHK03-NP labeled',
                        'a':'MSMT17 V1', 'b':'MSMT17 V2', 'Partial-REID_Dataset':'Partial-REID', 'Occluded_REID':'Occluded-REID', 'P-DukeMTMC-reid':'P-DukeMTMC-reID', 'street':'street'}.items():
        assert dataset_table(str(tmp_path/folder)).attrs['name']==name
    with pytest.raises(FileNotFoundError, match='It looks as if .*/np is cuhk03_np_detected: pass that path'): dataset_table(tmp_path/'np'/'detected')

def test_counts_tell_duke_from_occluded_duke(tmp_path):
    "Same layout and names, and a folder called anything"
    path = touch(tmp_path/'x', *[f'bounding_box_train/{i:04d}_c1_f0046182.jpg' for i in range(2210)], 'bounding_box_test/0001_c1_f0046182.jpg', *[f'query/{i:04d}_c1_f0046182.jpg' for i in range(2210)])
    assert dataset_table(path).attrs['name']=='Occluded-Duke'
    touch(path, *[f'query/{i:04d}_c1_f0046182.jpg' for i in range(2228)])
    assert dataset_table(path).attrs['name']=='DukeMTMC-reID'

def test_sets_by_key(tmp_path):
    path = boxes(tmp_path/'np', 'cuhk03_np', sub='labeled/')
    assert dataset_table(path, 'cuhk03_np').attrs['name']==dataset_table(path, 'cuhk03_np_labeled').attrs['name']=='CUHK03-NP labeled'
    assert dataset_table(msmt17(tmp_path/'m', 2), 'msmt17').attrs['name']=='MSMT17 V2'
    with pytest.raises(FileNotFoundError, match='MSMT17 V1'): dataset_table(tmp_path/'m', 'msmt17_v1')
    with pytest.raises(ValueError) as e: dataset_table(path, 'viper')
    assert "'viper'" in str(e.value) and all(k in str(e.value) for k in (*reid_sets, 'cuhk03'))

def test_an_unknown_folder_lists_the_sets(tmp_path):
    touch(tmp_path/'f', 'ann/1.jpg')
    with pytest.raises(FileNotFoundError) as e: dataset_table(tmp_path/'f')
    assert all(k in str(e.value) for k in (*reid_sets, 'cuhk03')) and 'folder_table' in str(e.value)
    with pytest.raises(FileNotFoundError, match='none of the sets'): dataset_table(tmp_path/'f'/'ann'/'1.jpg')
    with pytest.raises(FileNotFoundError, match='no .*nowhere'): dataset_table(tmp_path/'nowhere')

# several sets

@pytest.fixture
def pair(tmp_path): return market_table(boxes(tmp_path/'Market-1501', 'market1501')),duke_table(boxes(tmp_path/'Duke', 'dukemtmc'))

def test_join_keeps_people_and_cameras_apart(pair):
    df = join_tables(*pair, valid='Market-1501')
    assert df.groupby('split').pid.unique().map(sorted_text).to_dict()=={'train':['DukeMTMC-reID/1','Market-1501/2'], 'query':['Market-1501/3'], 'gallery':['-1','Market-1501/0','Market-1501/3']}
    assert df[df.pid==-1].shape[0]==1 and set(df.cam[df.split=='train'])=={'Market-1501/1','DukeMTMC-reID/2'} and df.index.is_unique
    assert df.attrs['name']=='Market-1501 + DukeMTMC-reID, validated on Market-1501'
    assert join_tables(*pair, valid=0).equals(df)
    assert set(join_tables(*pair, valid=1).pid)=={'Market-1501/2','DukeMTMC-reID/1','DukeMTMC-reID/5','DukeMTMC-reID/7140'}
    held = join_tables(*pair)
    assert held.split.isna().all() and set(held.pid)=={'Market-1501/2','DukeMTMC-reID/1'}
    assert pair[0].attrs['name']=='Market-1501' and pair[0].pid.dtype==np.int64

def sorted_text(o): return sorted(map(str, o))

def test_join_of_other_tables(pair):
    "Without splits, with unknown cameras, with names in capitals, with rows left out, and with names of their own"
    own = pd.DataFrame(dict(fn=['a','b'], pid=['ann','-1'], cam=[None,None], split=[None,None]))
    loud = pair[0].assign(split=pair[0].split.str.upper()).drop(index=0)
    df = join_tables(own, loud, valid=1)
    assert df.pid[:2].tolist()==['set 1/ann',-1] and df.cam[:2].isna().all() and df.split[:2].tolist()==['train','train']
    assert set(df.split)=={'train','query','gallery'} and len(df)==2+4
    coded,_,_ = encode_table(join_tables(own, pair[1], valid=1))
    assert sorted(coded.label[coded.split=='train'])==[0,1] and list(coded.camera[coded.split=='train'])==[-1,0]

def test_join_errors(pair):
    with pytest.raises(ValueError, match="'Market-1501' names two tables.*attrs"): join_tables(pair[0], pair[0])
    for valid in ('Duke',2,-3,1.5):
        with pytest.raises(ValueError, match="none of the joined tables: 'Market-1501', 'DukeMTMC-reID'"): join_tables(*pair, valid=valid)
    with pytest.raises(ValueError, match='DukeMTMC-reID has no queries'): join_tables(pair[0], train_of(pair[1]), valid=1)
    with pytest.raises(ValueError, match='No tables'): join_tables()

def train_of(df): return df[df.split=='train']

def test_train_on_all(tmp_path, pair):
    df = train_on_all(pair[0])
    assert set(df.split)=={'train'} and sorted(df.pid)==[2,3,3] and df.attrs['name']=='Market-1501, all images'
    df = train_on_all(msmt17_table(msmt17(tmp_path/'m')))
    assert sorted(set(df.pid))==[0,1040,10000,13059] and len(df)==6 # person 0 of MSMT17 is a person
    df = train_on_all(join_tables(*pair, valid=0))
    assert set(df.pid)=={'Market-1501/2','Market-1501/3','DukeMTMC-reID/1'}

# loaders

def test_factories(tmp_path):
    "Two training people, a query and its match in each; every factory shows its own arguments and those of `from_table`"
    kw = dict(p=2, k=2, size=(16,8), num_workers=0)
    def market(path, form, sub=''): return draw(path, *[f'{sub}{BOXES[s]}/{form.format(p,c)}' for s,p,c in (('train',1,1),('train',3,2),('query',2,1),('gallery',2,2))])
    duke = market(tmp_path/'duke', '{:04d}_c{}_f0046182.jpg')
    assert ReIDDataLoaders.from_duke(duke, **kw).data_name=='DukeMTMC-reID' and ReIDDataLoaders.from_occluded_duke(duke, **kw).data_name=='Occluded-Duke'
    dls = ReIDDataLoaders.from_cuhk03_np(market(tmp_path/'np', '{:04d}_c{}_1.png', sub='labeled/'), boxes='labeled', **kw)
    assert dls.data_name=='CUHK03-NP labeled' and dls.one_batch()[0].shape==(4,3,16,8) and dls.path==tmp_path/'np'
    dls = ReIDDataLoaders.from_msmt17(msmt17(tmp_path/'m', 2, make=draw), **kw)
    assert (dls.data_name,dls.c,list(dls.pids))==('MSMT17 V2',2,[0,1040,10000,13059])
    dls = ReIDDataLoaders.from_market(market(tmp_path/'s', '{:04d}_c{}s1_000001_01.jpg'), distractors=draw(tmp_path/'more','x.jpg','y.jpg'), **kw)
    assert dls.data_name=='s + 2 distractors' and len(dls.valid_ds)==4 and len([b for b in dls.valid])==1
    for f in ('market','duke','occluded_duke','cuhk03_np','msmt17','cuhk03'):
        pars = inspect.signature(getattr(ReIDDataLoaders, f'from_{f}')).parameters
        assert {'p','k','size','valid_pct','on_bad'} <= set(pars) and 'df' not in pars

# CUHK03's MATLAB file

rng = np.random.default_rng(0)
def noise(h, w): return rng.integers(0, 256, (h,w,3), dtype=np.uint8)

def write_mat(fn, cells, testsets):
    "`cells[boxes][pair][person]`: ten images (height × width × 3) or None, stored as MATLAB 7.3 does"
    fn.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(fn, 'w', userblock_size=512) as f:
        refs = f.create_group('#refs#')
        def put(x, empty=False):
            d = refs.create_dataset(f'r{len(refs)}', data=x)
            if empty: d.attrs['MATLAB_empty'] = np.uint8(1)
            return d.ref
        for b,pairs in cells.items():
            f[b] = np.empty((1,len(pairs)), dtype=h5py.ref_dtype)
            for i,people in enumerate(pairs):
                x = np.empty((10,len(people)), dtype=h5py.ref_dtype)
                for j,images in enumerate(people):
                    for k,im in enumerate(images): x[k,j] = put(np.zeros(2, np.uint64), True) if im is None else put(im.transpose(2,1,0))
                d = f[b]
                d[0,i] = put(x)
        f['testsets'] = np.array([[put(np.array(t, float).T) for t in testsets]], dtype=h5py.ref_dtype)
    with open(fn, 'r+b') as o: o.write(b'MATLAB 7.3 MAT-file'.ljust(512))

def people(*n): return [[noise(6+i, 3+i) if i%5<m else None for i in range(10)] for m in n]

@pytest.fixture
def mat(tmp_path):
    "Three people in pair 1 and one in pair 2, with 1 to 5 images for each camera; person 3 of pair 1 was seen by one camera only"
    detected = [people(2,5,1), people(3)]
    detected[0][2][5:] = [None]*5
    cells = dict(detected=detected, labeled=[people(2,4,1), people(3)])
    write_mat(tmp_path/'cuhk03_release'/'cuhk-03.mat', cells, [[(1,2)], [(1,3),(2,1)]])
    fn = tmp_path/'cuhk03_release'/'cuhk-03.mat'
    for b in cells:
        names = sorted(f'{p+1}_{i+1:03d}_{1+k//5}_{k+1:02d}.png' for p,o in enumerate(cells[b]) for i,ims in enumerate(o) for k,im in enumerate(ims) if im is not None)
        who = [tuple(n.split('_')[:2]) for n in names]
        ids = [sorted(set(who)).index(w)+1 for w in who]
        idx = lambda *ids_: np.array([[i+1] for i,w in enumerate(ids) if w in ids_], np.uint16)
        q = idx(4)[:1]
        sio.savemat(fn.with_name(f'cuhk03_new_protocol_config_{b}.mat'), dict(filelist=np.array([[n] for n in names], dtype=object), labels=np.array([[i] for i in ids], np.uint16),
                    camId=np.array([[int(n[6])] for n in names], np.uint8), train_idx=idx(1,2), query_idx=q, gallery_idx=idx(4)[1:]))
    return fn,cells

def test_images_come_out_of_the_mat_as_they_were(mat):
    fn,cells = mat
    for b in ('detected','labeled'):
        out = extract_cuhk03(fn, b, progress=False)
        assert out==fn.parent/'cuhk-03-png'/b
        want = {f'{p+1}_{i+1:03d}_{1+k//5}_{k+1:02d}.png':im for p,o in enumerate(cells[b]) for i,ims in enumerate(o) for k,im in enumerate(ims) if im is not None}
        assert {f.name for f in out.glob('*.png')}==set(want)
        for f in out.glob('*.png'): assert np.array_equal(np.array(Image.open(f)), want[f.name])
    assert sorted(o.name for o in out.parent.iterdir())==['detected','labeled']

def test_the_new_protocol(mat):
    fn,_ = mat
    for b,n in (('detected',(4+10,1,5)),('labeled',(4+8,1,5))):
        df = cuhk03_table(fn, b, progress=False)
        assert tuple((df.split==s).sum() for s in ('train','query','gallery'))==n and df.attrs['name']==f'CUHK03-NP {b}'
        assert df.attrs['counts']==reid_sets[f'cuhk03_np_{b}'].counts and df.columns.tolist()==COLS
        assert set(df.pid[df.split=='train'])=={1,2} and set(df.pid[df.split!='train'])=={4}
        assert all(f.exists() and int(f.name.split('_')[2])==c for f,c in zip(df.fn, df.cam))

def test_the_classic_protocol(mat, capsys):
    fn,_ = mat
    df = cuhk03_table(fn.parent, protocol='classic', split=1, progress=False)
    assert df.groupby('split').pid.unique().map(sorted).to_dict()=={'train':[1001,1002], 'query':[1003,2001], 'gallery':[2001]}
    assert set(df.cam[df.split=='query'])=={1} and set(df.cam[df.split=='gallery'])=={2} and len(df)==4+10+1+6
    assert df.attrs==dict(name='CUHK03 classic split 1 detected', counts={}) and capsys.readouterr().out==''
    assert set(cuhk03_table(fn, protocol='classic', progress=False).query('split!="train"').pid)=={1002}
    for split in (2,-1):
        with pytest.raises(ValueError, match='splits 0 to 1'): cuhk03_table(fn, protocol='classic', split=split, progress=False)

def test_unpacked_once(mat, monkeypatch, tmp_path):
    fn,_ = mat
    df = cuhk03_table(fn, progress=False)
    with monkeypatch.context() as m:
        m.setattr(h5py, 'File', lambda *a, **k: pytest.fail('opened again'))
        assert cuhk03_table(fn, progress=False).equals(df)
    df.fn[0].unlink()
    with pytest.raises(FileExistsError, match='delete it'): cuhk03_table(fn, progress=False)
    assert cuhk03_table(fn, dest=tmp_path/'else where', progress=False).fn[0].parent==tmp_path/'else where'/'detected'

@pytest.mark.parametrize('stop', [KeyboardInterrupt(), OSError(errno.ENOSPC, 'No space left on device')])
def test_an_interrupted_unpacking_leaves_nothing(mat, monkeypatch, stop):
    fn,_ = mat
    saved,save = [],Image.Image.save
    def some(self, f, *args, **kwargs):
        if len(saved)==5: raise stop
        saved.append(f)
        save(self, f, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', some)
        with pytest.raises(type(stop)) as e: extract_cuhk03(fn, progress=False)
        assert e.value is stop
    assert not list((fn.parent/'cuhk-03-png').iterdir())
    assert len(list(extract_cuhk03(fn, progress=False).glob('*.png')))==4+10+1+6

def test_files_that_are_no_mat(mat, tmp_path):
    fn,_ = mat
    data = fn.read_bytes()
    for what,content in dict(cut=data[:len(data)//2], text=b'dear diary', empty=b'').items():
        bad = tmp_path/what/'cuhk-03.mat'
        bad.parent.mkdir()
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f'{bad} is no cuhk-03.mat')): cuhk03_table(bad, protocol='classic', progress=False)
        assert [o for o in bad.parent.rglob('*') if o.is_file()]==[bad]
    with h5py.File(bad, 'w') as f: f['detected'] = 1
    with pytest.raises(ValueError, match='is no cuhk-03.mat'): cuhk03_table(bad, protocol='classic', progress=False)

def test_no_mat_and_no_configuration(mat, tmp_path):
    fn,_ = mat
    for path in (tmp_path, tmp_path/'x.mat'):
        with pytest.raises(FileNotFoundError) as e: cuhk03_table(path)
        assert 'cuhk-03.mat' in str(e.value) and 'CUHK_identification' in str(e.value) and 'Expected' in str(e.value)
    config,wrong = (fn.with_name(f'cuhk03_new_protocol_config_{b}.mat') for b in ('detected','labeled'))
    config.rename(tmp_path/'moved.mat')
    with pytest.raises(FileNotFoundError) as e: cuhk03_table(fn, progress=False)
    assert config.name in str(e.value) and 'person-re-ranking' in str(e.value) and not (fn.parent/'cuhk-03-png').exists()
    assert len(cuhk03_table(fn, config=tmp_path/'moved.mat', progress=False))==20
    config.write_bytes(b'no mat')
    with pytest.raises(ValueError, match='cannot be read as the new protocol'): cuhk03_table(fn, progress=False)
    sio.savemat(config, dict(filelist=1))
    with pytest.raises(ValueError, match='cannot be read as the new protocol.*KeyError'): cuhk03_table(fn, progress=False)
    sio.savemat(config, dict(filelist=np.array([['9_001_1_01.png']], dtype=object), labels=[[1]], camId=[[1]], train_idx=[[1]], query_idx=[[1]], gallery_idx=[[1]]))
    with pytest.raises(ValueError, match='3 of the 3 images .*9_001_1_01.png'): cuhk03_table(fn, progress=False)

def test_wrong_words_and_a_missing_extra(mat, monkeypatch):
    fn,_ = mat
    with pytest.raises(ValueError, match="boxes='drawn'"): cuhk03_table(fn, 'drawn')
    with pytest.raises(ValueError, match="protocol='old'"): cuhk03_table(fn, protocol='old')
    for module in ('h5py','scipy.io'):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=re.escape("pyramidreid[mat]")): cuhk03_table(fn, progress=False)

def test_the_mat_is_a_set_like_others(mat):
    fn,_ = mat
    assert dataset_table(fn.parent).equals(dataset_table(fn)) and dataset_table(fn, 'cuhk03').attrs['name']=='CUHK03-NP detected'
    dls = ReIDDataLoaders.from_cuhk03(fn, protocol='classic', p=2, k=2, size=(16,8), num_workers=0)
    assert dls.c==3 and dls.path==fn.parent and dls.data_name=='CUHK03 classic split 0 detected'
