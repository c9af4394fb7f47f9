"The published datasets: each read from a tiny folder in its exact layout, and what goes wrong with real folders"
import errno
import inspect
import os
import re
import sys
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pyramidreid.data import cuhk03
from pyramidreid.data.cuhk03 import *
from pyramidreid.data.datasets import *
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.data.registry import attach_counts, reid_sets
from pyramidreid.data.tables import encode_table, join_tables, train_on_all

h5py,sio = pytest.importorskip('h5py'),pytest.importorskip('scipy.io')

COLUMNS = ['fn','pid','cam','split']
FOLDERS = dict(train='bounding_box_train', query='query', gallery='bounding_box_test')

def make_empty(path, *names):
    "Empty files; returns `path`"
    for name in names:
        (path/name).parent.mkdir(parents=True, exist_ok=True)
        (path/name).touch()
    return path

def make_images(path, *names):
    "Images of 8×4 pixels; returns `path`"
    for i,name in enumerate(names):
        (path/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4,8), (7*i%255,90,120)).save(path/name)
    return path

def rows_of(df): return sorted((fn.name, pid, cam, split) for fn,pid,cam,split in df[COLUMNS].itertuples(index=False))
def images_of(df, split): return df[df.split==split]
def pids_by_split(df): return df.groupby('split').pid.unique().map(lambda pids: sorted(pids, key=str)).to_dict()

# File name, person, camera and split of a few images of each dataset in Market-1501's layout
IMAGES = dict(
    market1501=[
        ('0002_c1s1_000451_03.jpg', 2, 1, 'train'),
        ('0003_c6s4_000451_01.jpg', 3, 6, 'query'),
        ('0003_c2s1_000001_00.jpg', 3, 2, 'gallery'),
        ('-1_c1s1_000401_03.jpg', -1, 1, 'gallery'),
        ('0000_c4s6_014991_01.jpg', 0, 4, 'gallery')],
    dukemtmc=[
        ('0001_c2_f0046182.jpg', 1, 2, 'train'),
        ('0005_c8_f0046985.jpg', 5, 8, 'query'),
        ('7140_c3_f0200013.jpg', 7140, 3, 'gallery')],
    cuhk03_np=[
        ('0003_c1_22.png', 3, 1, 'train'),
        ('0001_c2_10.png', 1, 2, 'query'),
        ('1467_c1_1.png', 1467, 1, 'gallery')])
IMAGES['occluded_duke'] = IMAGES['dukemtmc']

def make_boxes(path, key, below=''):
    "The images of a dataset in Market-1501's layout, in `path` or a folder `below` it; returns `path`"
    return make_empty(path, *[f'{below}{FOLDERS[split]}/{name}' for name,_,_,split in IMAGES[key]])

# Images and person ids in each list of MSMT17
MSMT17 = dict(
    train=[('0000/0000_000_01_0303morning_0008_0.jpg', 0), ('0000/0000_001_14_0303noon_0010_1_ex.jpg', 0)],
    val=[('1040/1040_000_07_0302afternoon_0008_0.jpg', 1040)],
    query=[('0000/0000_002_15_0113afternoon_0001_0.jpg', 0)],
    gallery=[('0000/0000_000_01_0303morning_0008_0.jpg', 0), ('3059/3059_004_12_0303morning_0008_0.jpg', 3059)])
MSMT17_FOLDERS = {1: ('train','test'), 2: ('mask_train_v2','mask_test_v2')}

def make_msmt17(path, version=1, make=make_empty, end='\n', tail=''):
    "MSMT17 with lines that end in `end`, and `tail` behind the last; returns `path`"
    train,test = MSMT17_FOLDERS[version]
    for name,images in MSMT17.items():
        folder = test if name in ('query','gallery') else train
        make(path, *[f'{folder}/{fn}' for fn,_ in images])
        text = end.join(f'{fn} {pid}' for fn,pid in images)+end+tail
        (path/f'list_{name}.txt').write_bytes(text.encode())
    return path

def make_bodies(path):
    "The three datasets of partial and occluded people, below `path`"
    partial,occluded,duke = [],[],[]
    for kind in ('partial','whole','occluded'):
        partial += [f'{kind}_body_images/{pid:03d}_{i:03d}.jpg' for pid in (1,60) for i in (1,2)]
    for kind in ('occluded','whole'):
        occluded += [f'{kind}_body_images/{pid:03d}/{pid:03d}_{i:02d}.tif' for pid in (1,200) for i in (1,5)]
    for split,pid in (('train',1), ('train',3), ('test',2)):
        for kind,cam in (('occluded',1), ('whole',2)):
            duke.append(f'{split}/{kind}_body_images/{pid:04d}/{pid:04d}_c{cam}_f0046182.jpg')
    make_empty(path/'Partial-REID_Dataset', *partial)
    make_empty(path/'Occluded_REID', *occluded)
    make_empty(path/'P-DukeMTMC-reid', *duke)

# each dataset in its layout

def test_market_with_what_else_is_in_the_original(tmp_path):
    path = make_boxes(tmp_path/'Market-1501-v15.09.15', 'market1501')
    make_empty(path, 'bounding_box_train/Thumbs.db', 'query/Thumbs.db', 'bounding_box_test/.DS_Store',
               'query/._0003_c6s4_000451_01.jpg', 'readme.txt', 'gt_bbox/0001_c1s1_001051_00.jpg',
               'gt_query/0001_c1s1_001051_00_good.mat')
    df = market_table(path)
    assert list(df.columns)==COLUMNS
    assert rows_of(df)==sorted(IMAGES['market1501'])
    assert df.cam.dtype==df.pid.dtype==np.int64
    counts = dict(train=(12936,751), query=(3368,750), gallery=(15913,751))
    assert df.attrs==dict(name='Market-1501', counts=counts)

@pytest.mark.parametrize('folder', ['Market-1501-v15.09.15','market1501','Market_1501'])
def test_market_is_compared_with_the_published_counts(tmp_path, capsys, folder):
    df = market_table(make_boxes(tmp_path/folder, 'market1501'))
    assert df.attrs['name']=='Market-1501' and df.attrs['counts']
    lines = capsys.readouterr().out.splitlines()
    assert len(lines)==3 and 'Market-1501 gallery: 2 images of 2 identities, published 15,913 of 751' in lines

def test_another_folder_in_its_layout_is_not(tmp_path, capsys):
    df = market_table(make_boxes(tmp_path/'street', 'market1501'))
    assert df.attrs==dict(name='street', counts={})
    assert capsys.readouterr().out==''

def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(make_boxes(tmp_path/'street', 'market1501'))
    assert market_table('.').attrs['name']=='street'

@pytest.mark.parametrize('folder', ['with space','Straße des 17. Juni','市场','a.b'])
@pytest.mark.parametrize('key,read,below', [
    ('market1501',market_table,''), ('dukemtmc',duke_table,''), ('cuhk03_np',cuhk03_np_table,'detected/')])
def test_folders_of_any_name_and_extensions_in_capitals(tmp_path, folder, key, read, below):
    path = make_boxes(tmp_path/folder, key, below=below)
    for fn in [fn for fn in path.rglob('*') if fn.is_file()]: fn.rename(fn.with_suffix(fn.suffix.upper()))
    def without_extension(rows): return [(name.split('.')[0], *rest) for name,*rest in rows]
    assert without_extension(rows_of(read(str(path))))==without_extension(sorted(IMAGES[key]))

@pytest.mark.parametrize('key,read,name,train', [
    ('dukemtmc', duke_table, 'DukeMTMC-reID', (16522,702)),
    ('occluded_duke', occluded_duke_table, 'Occluded-Duke', (15618,702))])
def test_duke(tmp_path, key, read, name, train):
    df = read(make_boxes(tmp_path/'x', key))
    assert rows_of(df)==sorted(IMAGES[key])
    assert df.attrs['name']==name
    assert df.attrs['counts']['train']==train and df.attrs['counts']['gallery']==(17661,1110)

def test_cuhk03_np(tmp_path):
    path = make_boxes(tmp_path/'cuhk03-np', 'cuhk03_np', below='labeled/')
    with pytest.raises(FileNotFoundError, match='CUHK03-NP detected is not at.*detected'): cuhk03_np_table(path)
    make_boxes(path, 'cuhk03_np', below='detected/')
    for boxes,n_train in (('detected',7365), ('labeled',7368)):
        df = cuhk03_np_table(path, boxes=boxes)
        assert rows_of(df)==sorted(IMAGES['cuhk03_np'])
        assert df.attrs['name']==f'CUHK03-NP {boxes}' and df.attrs['counts']['train']==(n_train,767)
        assert {fn.parent.parent.name for fn in df.fn}=={boxes}
    with pytest.raises(ValueError, match="boxes='drawn'.*'detected' and 'labeled'"): cuhk03_np_table(path, 'drawn')

@pytest.mark.parametrize('version', [1,2])
@pytest.mark.parametrize('end,tail', [('\n',''), ('\r\n',''), ('\n','\n\n'), ('\r\n','\r\n  \r\n')])
def test_msmt17(tmp_path, version, end, tail):
    "Training is train and val; test people are others though they have the same ids; the camera is the third field"
    df = msmt17_table(make_msmt17(tmp_path/'MSMT17', version, end=end, tail=tail))
    assert list(df[['pid','cam','split']].itertuples(index=False, name=None))==[
        (0,1,'train'), (0,14,'train'), (1040,7,'train'), (10000,15,'query'), (10000,1,'gallery'), (13059,12,'gallery')]
    assert df.attrs['name']==f'MSMT17 V{version}'
    assert df.attrs['counts']==dict(train=(32621,1041), query=(11659,3060), gallery=(82161,3060))
    assert all(fn.exists() for fn in df.fn) and df.pid.dtype==np.int64

def test_partial_and_occluded_people(tmp_path):
    make_bodies(tmp_path)
    df = dataset_table(tmp_path/'Partial-REID_Dataset', 'partial_reid')
    names = [(f'{pid:03d}_{i:03d}.jpg', pid) for pid in (1,60) for i in (1,2)]
    assert rows_of(df)==sorted((name, pid, None, split) for name,pid in names for split in ('query','gallery'))
    assert {fn.parent.name for fn in images_of(df, 'query').fn}=={'partial_body_images'}
    df = dataset_table(tmp_path/'Occluded_REID', 'occluded_reid')
    names = [(f'{pid:03d}_{i:02d}.tif', pid) for pid in (1,200) for i in (1,5)]
    assert rows_of(df)==sorted((name, pid, None, split) for name,pid in names for split in ('query','gallery'))

def test_p_dukemtmc(tmp_path):
    make_bodies(tmp_path)
    path = tmp_path/'P-DukeMTMC-reid'
    df = dataset_table(path, 'p_dukemtmc')
    assert pids_by_split(df)=={'train':[1,3], 'query':[2], 'gallery':[2]}
    assert len(images_of(df, 'train'))==4 and df.cam.isna().all()
    for fn in list(path.rglob('*.jpg')): fn.rename(fn.with_name(fn.name.replace('_f0046182','')))
    assert dataset_table(path).attrs['name']=='P-DukeMTMC-reID'

def test_ids_with_more_digits(tmp_path):
    path = make_boxes(tmp_path/'x', 'market1501')
    make_empty(path, 'query/123456_c12s1_000451_03.jpg')
    df = market_table(path)
    assert (123456,12) in set(zip(df.pid, df.cam))

@pytest.fixture
def distractors(tmp_path):
    return make_empty(tmp_path/'distractors_500k', 'xyz.jpg', '0000_c5s3_000001_00.jpg', '12.JPG', 'Thumbs.db')

def test_distractors(tmp_path, distractors):
    df = market_table(make_boxes(tmp_path/'Market-1501', 'market1501'), distractors=distractors)
    added = df[5:]
    assert len(added)==3 and (added.pid==0).all() and set(added.split)=={'gallery'}
    assert sorted(added.cam.dropna())==[5] and df.index.is_unique
    assert df.attrs['name']=='Market-1501 + 3 distractors'
    assert df.attrs['counts']==dict(train=(12936,751), query=(3368,750), gallery=(15916,751))
    coded,_,cams = encode_table(df)
    assert cams==[1,2,4,5,6] and coded[coded.pid==0].label.nunique()==1

def test_distractors_of_another_folder_and_missing_ones(tmp_path, distractors):
    path = make_boxes(tmp_path/'street', 'market1501')
    assert market_table(path, distractors).attrs['counts']=={}
    with pytest.raises(FileNotFoundError, match='distractors_500k'): market_table(path, tmp_path/'nowhere')

def test_counts_are_printed_only_where_they_differ(capsys):
    df = pd.DataFrame(dict(pid=[1,1,2,-1,0], split=['train','train','query','gallery','gallery']))
    attach_counts(df, 'X', dict(train=(2,1), query=(1,1), gallery=(1,1)))
    assert capsys.readouterr().out=='' and df.attrs['name']=='X'
    attach_counts(df, 'X', dict(train=(2,2), query=(1000,1), gallery=(1,1)))
    assert capsys.readouterr().out.splitlines()==[
        'X train: 2 images of 1 identities, published 2 of 2',
        'X query: 1 images of 1 identities, published 1,000 of 1']

# folders that are not the dataset

READERS = dict(market1501=market_table, dukemtmc=duke_table, occluded_duke=occluded_duke_table,
               cuhk03_np=cuhk03_np_table, msmt17=msmt17_table)

def make_dataset(key, path):
    if key=='msmt17': return make_msmt17(path)
    return make_boxes(path, key, below='detected/' if key=='cuhk03_np' else '')

def first_record(key): return next(dataset for name,dataset in reid_sets.items() if name.startswith(key))

@pytest.mark.parametrize('key', READERS)
def test_a_missing_dataset_says_where_to_get_it_and_its_layout(tmp_path, key):
    nowhere = tmp_path/'nowhere'
    with pytest.raises(FileNotFoundError) as e: READERS[key](nowhere)
    message = str(e.value)
    dataset = first_record(key)
    for text in (str(nowhere), dataset.home, dataset.terms, dataset.example, str(nowhere/dataset.needs()[-1])):
        assert text in message
    assert all(f'\n  {o}' in message for o in dataset.needs())
    assert 'It seems' not in message
    assert ('withdrew DukeMTMC' in message)==('duke' in key)

@pytest.mark.parametrize('key', READERS)
def test_a_path_one_folder_too_high_or_too_low_is_corrected(tmp_path, key):
    path = make_dataset(key, tmp_path/'data'/'set')
    inside = path/'train' if key=='msmt17' else path/first_record(key).needs()[0].split('/')[0]
    for wrong in (path.parent, inside):
        with pytest.raises(FileNotFoundError) as e: READERS[key](wrong)
        assert f'It seems to be at {path}: pass that path' in str(e.value)

def test_a_missing_or_empty_folder_is_named_and_the_others_are_not(tmp_path):
    path = make_boxes(tmp_path/'x', 'dukemtmc')
    for fn in (path/'query').iterdir(): fn.unlink()
    message = re.escape(f'Missing or empty: {path/"query"}.\n')
    with pytest.raises(FileNotFoundError, match=message): duke_table(path)
    (path/'query').rmdir()
    with pytest.raises(FileNotFoundError, match=message): duke_table(path)
    image = path/'bounding_box_train'/'0001_c2_f0046182.jpg'
    with pytest.raises(FileNotFoundError, match='is not at'): duke_table(image)

def test_both_versions_of_msmt17_are_searched(tmp_path, monkeypatch):
    path = make_msmt17(tmp_path/'data'/'MSMT17_V2', 2)
    with pytest.raises(FileNotFoundError) as e: msmt17_table(path.parent)
    for text in (f'It seems to be at {path}: pass that path', 'or, for MSMT17 V2:', '\n  mask_test_v2/', '\n  test/'):
        assert text in str(e.value)
    monkeypatch.chdir(path/'mask_train_v2')
    with pytest.raises(FileNotFoundError, match=re.escape(f'It seems to be at {path}')): msmt17_table('.')

def test_wrong_file_names(tmp_path):
    "Market's names are not Duke's, and a holiday picture is nobody's"
    with pytest.raises(ValueError, match='5 of 5 file names are not like those of DukeMTMC-reID'):
        duke_table(make_boxes(tmp_path/'m', 'market1501'))
    path = make_empty(make_boxes(tmp_path/'d', 'dukemtmc'), 'query/holiday.jpg')
    with pytest.raises(ValueError, match='1 of 4 file names.*0001_c2_f0046182.jpg.*holiday.jpg'): duke_table(path)
    path = make_empty(make_msmt17(tmp_path/'s'), 'train/0000/me.jpg')
    (path/'list_val.txt').write_text('0000/me.jpg 0\n')
    with pytest.raises(ValueError, match='1 of 6 file names.*MSMT17 V1.*me.jpg'): msmt17_table(path)

@pytest.fixture
def msmt17_list(tmp_path):
    "One of the lists of MSMT17, with a single line"
    return make_msmt17(tmp_path/'MSMT17')/'list_val.txt'

def test_an_empty_or_missing_list(msmt17_list):
    message = re.escape(f'Missing or empty: {msmt17_list}.')
    for text in ('', '\n\n'):
        msmt17_list.write_text(text)
        with pytest.raises(FileNotFoundError, match=message): msmt17_table(msmt17_list.parent)
    msmt17_list.unlink()
    with pytest.raises(FileNotFoundError, match=message): msmt17_table(msmt17_list.parent)

@pytest.mark.parametrize('line', ['0000/x.jpg', '0000/x.jpg zero', '0000/x.jpg -1'])
def test_a_broken_line_of_a_list(msmt17_list, line):
    msmt17_list.write_text(msmt17_list.read_text()+line+'\n')
    with pytest.raises(ValueError) as e: msmt17_table(msmt17_list.parent)
    assert f'1 of 2 lines of {msmt17_list}' in str(e.value) and line in str(e.value)

def test_a_list_that_names_missing_files(msmt17_list):
    missing = [f'{pid}/{pid}_000_01_0303morning_0008_0.jpg 9\n' for pid in (9999,9998)]
    msmt17_list.write_text(msmt17_list.read_text()+''.join(missing))
    with pytest.raises(FileNotFoundError) as e: msmt17_table(msmt17_list.parent)
    assert f'2 of the 3 images that {msmt17_list} names' in str(e.value) and '9999_000_01' in str(e.value)

def test_a_list_with_a_byte_order_mark(msmt17_list):
    msmt17_list.write_bytes(b'\xef\xbb\xbf'+msmt17_list.read_bytes())
    assert len(msmt17_table(msmt17_list.parent))==6

# any of them

def test_any_dataset_is_recognised(tmp_path):
    make_bodies(tmp_path)
    for folder,key,below in (
            ('Market-1501-v15.09.15','market1501',''), ('DukeMTMC-reID','dukemtmc',''), ('street','market1501',''),
            ('Occluded_Duke','occluded_duke',''), ('np','cuhk03_np','detected/'), ('np2','cuhk03_np','labeled/')):
        make_boxes(tmp_path/folder, key, below=below)
    make_msmt17(tmp_path/'a', 1)
    make_msmt17(tmp_path/'b', 2)
    names = {
        'Market-1501-v15.09.15':'Market-1501', 'DukeMTMC-reID':'DukeMTMC-reID', 'Occluded_Duke':'Occluded-Duke',
        'np':'CUHK03-NP detected', 'np2':'CUHK03-NP labeled', 'a':'MSMT17 V1', 'b':'MSMT17 V2', 'street':'street',
        'Partial-REID_Dataset':'Partial-REID', 'Occluded_REID':'Occluded-REID', 'P-DukeMTMC-reid':'P-DukeMTMC-reID'}
    assert {folder: dataset_table(str(tmp_path/folder)).attrs['name'] for folder in names}==names
    with pytest.raises(FileNotFoundError, match='/np looks like cuhk03_np_detected: pass that path'):
        dataset_table(tmp_path/'np'/'detected')

def test_counts_distinguish_duke_from_occluded_duke(tmp_path):
    "Same layout and names, in a folder called anything"
    def queries(n): return [f'query/{i:04d}_c1_f0046182.jpg' for i in range(n)]
    path = make_empty(tmp_path/'x', 'bounding_box_train/0000_c1_f0046182.jpg', 'bounding_box_test/0001_c1_f0046182.jpg')
    make_empty(path, *queries(2210))
    assert dataset_table(path).attrs['name']=='Occluded-Duke'
    make_empty(path, *queries(2228))
    assert dataset_table(path).attrs['name']=='DukeMTMC-reID'

def test_datasets_by_key(tmp_path):
    path = make_boxes(tmp_path/'np', 'cuhk03_np', below='labeled/')
    for key in ('cuhk03_np','cuhk03_np_labeled'): assert dataset_table(path, key).attrs['name']=='CUHK03-NP labeled'
    assert dataset_table(make_msmt17(tmp_path/'m', 2), 'msmt17').attrs['name']=='MSMT17 V2'
    with pytest.raises(FileNotFoundError, match='MSMT17 V1'): dataset_table(tmp_path/'m', 'msmt17_v1')
    with pytest.raises(ValueError, match="'viper'") as e: dataset_table(path, 'viper')
    assert all(key in str(e.value) for key in (*reid_sets, 'cuhk03'))

def test_an_unknown_folder_lists_the_datasets(tmp_path):
    folder = make_empty(tmp_path/'f', 'ann/1.jpg')
    with pytest.raises(FileNotFoundError) as e: dataset_table(folder)
    assert all(key in str(e.value) for key in (*reid_sets, 'cuhk03')) and 'folder_table' in str(e.value)
    with pytest.raises(FileNotFoundError, match='of a known dataset'): dataset_table(folder/'ann'/'1.jpg')
    with pytest.raises(FileNotFoundError, match='nowhere does not exist'): dataset_table(tmp_path/'nowhere')

# several datasets

@pytest.fixture
def market(tmp_path): return market_table(make_boxes(tmp_path/'Market-1501', 'market1501'))

@pytest.fixture
def duke(tmp_path): return duke_table(make_boxes(tmp_path/'Duke', 'dukemtmc'))

def test_join_keeps_people_and_cameras_apart(market, duke):
    df = join_tables(market, duke, valid='Market-1501')
    assert pids_by_split(df)=={
        'train': ['DukeMTMC-reID/1','Market-1501/2'],
        'query': ['Market-1501/3'],
        'gallery': [-1,'Market-1501/0','Market-1501/3']}
    assert set(images_of(df, 'train').cam)=={'Market-1501/1','DukeMTMC-reID/2'} and df.index.is_unique
    assert (df.attrs['name'],df.attrs['valid_name'])==('Market-1501 + DukeMTMC-reID','Market-1501')
    assert market.attrs['name']=='Market-1501' and market.pid.dtype==np.int64 # as it was

def test_join_validates_on_the_table_of_choice(market, duke):
    assert join_tables(market, duke, valid=0).equals(join_tables(market, duke, valid='Market-1501'))
    on_duke = join_tables(market, duke, valid=1)
    assert set(on_duke.pid)=={'Market-1501/2','DukeMTMC-reID/1','DukeMTMC-reID/5','DukeMTMC-reID/7140'}
    on_none = join_tables(market, duke)
    assert on_none.split.isna().all() and set(on_none.pid)=={'Market-1501/2','DukeMTMC-reID/1'}

def test_join_of_other_tables(market, duke):
    "Without splits, with unknown cameras, with splits in capitals, with rows left out"
    own = pd.DataFrame(dict(fn=['a','b'], pid=['ann','-1'], cam=[None,None], split=[None,None]))
    capitals = market.assign(split=market.split.str.upper()).drop(index=0)
    df = join_tables(own, capitals, valid=1)
    assert df.pid[:2].tolist()==['set 1/ann',-1]
    assert df.cam[:2].isna().all() and df.split[:2].tolist()==['train','train']
    assert set(df.split)=={'train','query','gallery'} and len(df)==2+4
    coded,_,_ = encode_table(join_tables(own, duke, valid=1))
    train = images_of(coded, 'train')
    assert sorted(train.label)==[0,1] and list(train.camera)==[-1,0]

def test_join_errors(market, duke):
    with pytest.raises(ValueError, match="'Market-1501' names two tables.*attrs"): join_tables(market, market)
    for valid in ('Duke',2,-3,1.5):
        with pytest.raises(ValueError, match="joined table: 'Market-1501', 'DukeMTMC-reID'"):
            join_tables(market, duke, valid=valid)
    with pytest.raises(ValueError, match='DukeMTMC-reID has no queries'):
        join_tables(market, images_of(duke, 'train'), valid=1)
    with pytest.raises(ValueError, match='No tables'): join_tables()

def test_train_on_all(tmp_path, market, duke):
    df = train_on_all(market)
    assert set(df.split)=={'train'} and sorted(df.pid)==[2,3,3] and df.attrs['name']=='Market-1501, all images'
    df = train_on_all(msmt17_table(make_msmt17(tmp_path/'m')))
    assert sorted(set(df.pid))==[0,1040,10000,13059] and len(df)==6 # person 0 of MSMT17 is a person
    df = train_on_all(join_tables(market, duke, valid=0))
    assert set(df.pid)=={'Market-1501/2','Market-1501/3','DukeMTMC-reID/1'}

# loaders

KW = dict(p=2, k=2, size=(16,8), num_workers=0)

def make_people(path, name, below=''):
    "Images of two training people, and of a query and its match, named by `name`; returns `path`"
    images = (('train',1,1), ('train',3,2), ('query',2,1), ('gallery',2,2))
    return make_images(path, *[f'{below}{FOLDERS[split]}/{name.format(pid, cam)}' for split,pid,cam in images])

def test_loaders_of_duke(tmp_path):
    path = make_people(tmp_path/'duke', '{:04d}_c{}_f0046182.jpg')
    assert ReIDDataLoaders.from_duke(path, **KW).data_name=='DukeMTMC-reID'
    assert ReIDDataLoaders.from_occluded_duke(path, **KW).data_name=='Occluded-Duke'

def test_loaders_of_cuhk03_np(tmp_path):
    path = make_people(tmp_path/'np', '{:04d}_c{}_1.png', below='labeled/')
    dls = ReIDDataLoaders.from_cuhk03_np(path, boxes='labeled', **KW)
    assert dls.data_name=='CUHK03-NP labeled' and dls.path==path
    assert dls.one_batch()[0].shape==(4,3,16,8)

def test_loaders_of_msmt17(tmp_path):
    dls = ReIDDataLoaders.from_msmt17(make_msmt17(tmp_path/'m', 2, make=make_images), **KW)
    assert dls.data_name=='MSMT17 V2' and dls.c==2 and list(dls.pids)==[0,1040,10000,13059]

def test_loaders_of_market_with_distractors(tmp_path):
    path = make_people(tmp_path/'s', '{:04d}_c{}s1_000001_01.jpg')
    dls = ReIDDataLoaders.from_market(path, distractors=make_images(tmp_path/'more', 'x.jpg', 'y.jpg'), **KW)
    assert dls.data_name=='s + 2 distractors' and len(dls.valid_ds)==4
    assert len(list(dls.valid))==1

@pytest.mark.parametrize('name', ['market','duke','occluded_duke','cuhk03_np','msmt17','cuhk03'])
def test_a_factory_shows_the_arguments_of_from_table(name):
    parameters = set(inspect.signature(getattr(ReIDDataLoaders, f'from_{name}')).parameters)
    assert {'p','k','size','valid_pct','on_bad'} <= parameters and 'df' not in parameters

# CUHK03's MATLAB file

class MatWriter:
    "Writes arrays as MATLAB 7.3 does: transposed, with references to cells"
    def __init__(self, fn):
        fn.parent.mkdir(parents=True, exist_ok=True)
        self.fn,self.file = fn,h5py.File(fn, 'w', userblock_size=512)
        self.refs = self.file.create_group('#refs#')

    def put(self, array):
        "Store an array and return its reference"
        return self.refs.create_dataset(f'r{len(self.refs)}', data=array).ref

    def put_image(self, image):
        "Store an image (height × width × 3), or None as an empty cell"
        if image is not None: return self.put(image.transpose(2,1,0))
        empty = self.refs.create_dataset(f'r{len(self.refs)}', data=np.zeros(2, np.uint64))
        empty.attrs['MATLAB_empty'] = np.uint8(1)
        return empty.ref

    def put_pair(self, people):
        "Store the ten images of each person of a camera pair"
        cells = np.empty((10,len(people)), dtype=h5py.ref_dtype)
        for row,images in enumerate(people):
            for column,image in enumerate(images): cells[column,row] = self.put_image(image)
        return self.put(cells)

    def write(self, cells, testsets):
        "`cells[boxes][pair][person]` has ten images; close the file and give it MATLAB's header"
        for boxes,pairs in cells.items():
            self.file[boxes] = np.array([[self.put_pair(people) for people in pairs]], dtype=h5py.ref_dtype)
        sets = [self.put(np.array(testset, float).T) for testset in testsets]
        self.file['testsets'] = np.array([sets], dtype=h5py.ref_dtype)
        self.file.close()
        with open(self.fn, 'r+b') as f: f.write(b'MATLAB 7.3 MAT-file'.ljust(512))

def make_person(rng, n_images):
    "Ten cells: `n_images` images of noise for each camera, of different sizes, and None"
    def noise(i): return rng.integers(0, 256, (6+i,3+i,3), dtype=np.uint8)
    return [noise(i) if i%5<n_images else None for i in range(10)]

def png_names(pairs):
    "Images by the names they are extracted to"
    named = {}
    for pair,people in enumerate(pairs, 1):
        for row,images in enumerate(people, 1):
            for i,image in enumerate(images):
                if image is not None: named[f'{pair}_{row:03d}_{1+i//5}_{i+1:02d}.png'] = image
    return named

def save_config(fn, names):
    "The new protocol's file for these images: people 1 and 2 train, person 4 has a query and the gallery, 3 is unused"
    people = sorted({name[:5] for name in names})
    labels = [people.index(name[:5])+1 for name in names]
    def positions(*pids): return np.array([[i] for i,label in enumerate(labels, 1) if label in pids], np.uint16)
    sio.savemat(fn, dict(
        filelist=np.array([[name] for name in names], dtype=object),
        labels=np.array([[label] for label in labels], np.uint16),
        camId=np.array([[int(name[6])] for name in names], np.uint8),
        train_idx=positions(1,2), query_idx=positions(4)[:1], gallery_idx=positions(4)[1:]))

@pytest.fixture
def cells():
    "Three people in pair 1 and one in pair 2, with 1 to 5 images per camera; person 3 of pair 1 has only camera 1"
    rng = np.random.default_rng(0)
    def make_pair(*n_images): return [make_person(rng, n) for n in n_images]
    detected = [make_pair(2,5,1), make_pair(3)]
    detected[0][2][5:] = [None]*5
    return dict(detected=detected, labeled=[make_pair(2,4,1), make_pair(3)])

@pytest.fixture
def mat(tmp_path, cells):
    "`cuhk-03.mat` with two classic splits, and the new protocol's files beside it"
    fn = tmp_path/'cuhk03_release'/'cuhk-03.mat'
    MatWriter(fn).write(cells, testsets=[[(1,2)], [(1,3),(2,1)]])
    for boxes,pairs in cells.items():
        save_config(fn.with_name(f'cuhk03_new_protocol_config_{boxes}.mat'), sorted(png_names(pairs)))
    return fn

def test_images_are_extracted_unchanged(mat, cells):
    for boxes in ('detected','labeled'):
        folder = extract_cuhk03(mat, boxes, progress=False)
        assert folder==mat.parent/'cuhk-03-png'/boxes
        expected = png_names(cells[boxes])
        assert {fn.name for fn in folder.glob('*.png')}==set(expected)
        for fn in folder.glob('*.png'): assert np.array_equal(np.array(Image.open(fn)), expected[fn.name])
    assert sorted(path.name for path in folder.parent.iterdir())==['detected','labeled']

def test_a_killed_extraction_is_removed_by_the_next(mat):
    "Images below a lock that nobody holds, and those of earlier versions after a day"
    pngs = mat.parent/'cuhk-03-png'
    for name in ('.partial-x/detected','.detected.0123abcd.tmp','.detected.now.tmp'): make_empty(pngs/name, 'half.png')
    (pngs/'.partial-x/.lock').touch()
    a_day_ago = time.time()-90_000
    for path in (pngs/'.detected.0123abcd.tmp/half.png', pngs/'.detected.0123abcd.tmp'): os.utime(path, (a_day_ago,)*2)
    extract_cuhk03(mat, progress=False)
    assert sorted(path.name for path in pngs.iterdir())==['.detected.now.tmp','detected']

@pytest.mark.parametrize('boxes,n_train', [('detected',4+10), ('labeled',4+8)])
def test_the_new_protocol(mat, boxes, n_train):
    df = cuhk03_table(mat, boxes, progress=False)
    assert [len(images_of(df, split)) for split in ('train','query','gallery')]==[n_train,1,5]
    assert df.attrs==dict(name=f'CUHK03-NP {boxes}', counts=reid_sets[f'cuhk03_np_{boxes}'].counts)
    assert df.columns.tolist()==COLUMNS
    assert pids_by_split(df)=={'train':[1,2], 'query':[4], 'gallery':[4]}
    assert all(fn.exists() and int(fn.name.split('_')[2])==cam for fn,cam in zip(df.fn, df.cam))

def test_the_classic_protocol(mat, capsys):
    df = cuhk03_table(mat.parent, protocol='classic', split=1, progress=False)
    assert pids_by_split(df)=={'train':[1001,1002], 'query':[1003,2001], 'gallery':[2001]}
    assert set(images_of(df, 'query').cam)=={1} and set(images_of(df, 'gallery').cam)=={2}
    assert len(df)==4+10+1+6
    assert df.attrs==dict(name='CUHK03 classic split 1 detected', counts={}) and capsys.readouterr().out==''
    first = cuhk03_table(mat, protocol='classic', progress=False)
    assert set(first.pid[first.split!='train'])=={1002}
    for split in (2,-1):
        with pytest.raises(ValueError, match='splits 0 to 1'):
            cuhk03_table(mat, protocol='classic', split=split, progress=False)

def test_images_are_extracted_once(mat, monkeypatch, tmp_path):
    df = cuhk03_table(mat, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(h5py, 'File', lambda *args, **kwargs: pytest.fail('opened again'))
        assert cuhk03_table(mat, progress=False).equals(df)
    df.fn[0].unlink()
    with pytest.raises(FileExistsError, match='delete it'): cuhk03_table(mat, progress=False)
    elsewhere = tmp_path/'else where'
    assert cuhk03_table(mat, dest=elsewhere, progress=False).fn[0].parent==elsewhere/'detected'

@pytest.mark.parametrize('stop', [KeyboardInterrupt(), OSError(errno.ENOSPC, 'No space left on device')])
def test_an_interrupted_extraction_leaves_nothing(mat, monkeypatch, stop):
    saved,save = [],Image.Image.save
    def save_five(self, fn, *args, **kwargs):
        if len(saved)==5: raise stop
        saved.append(fn)
        save(self, fn, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, 'save', save_five)
        with pytest.raises(type(stop)) as e: extract_cuhk03(mat, progress=False)
        assert e.value is stop
    assert len(saved)==5 and not list((mat.parent/'cuhk-03-png').iterdir())
    assert len(list(extract_cuhk03(mat, progress=False).glob('*.png')))==4+10+1+6

def test_files_that_are_not_cuhk03(mat, tmp_path):
    whole = mat.read_bytes()
    for name,content in dict(cut=whole[:len(whole)//2], text=b'dear diary', empty=b'').items():
        bad = tmp_path/name/'cuhk-03.mat'
        bad.parent.mkdir()
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f'{bad} is not a valid cuhk-03.mat')):
            cuhk03_table(bad, protocol='classic', progress=False)
        assert [path for path in bad.parent.rglob('*') if path.is_file()]==[bad]
    with h5py.File(bad, 'w') as f: f['detected'] = 1
    with pytest.raises(ValueError, match='is not a valid cuhk-03.mat'):
        cuhk03_table(bad, protocol='classic', progress=False)

def made_large(mat, name, shape, dtype):
    "Puts a dataset without contents, a few bytes on the disk, in the place of all references in `name`"
    with h5py.File(mat, 'r+') as f:
        large = f.create_dataset('large', shape, dtype=dtype, chunks=True)
        place = f['detected'] if name=='pairs' else f[f['detected'][0,0]] if name=='cells' else f['testsets']
        if name=='all':
            del f['detected']
            f['detected'] = large
        else: place[...] = large.ref

@pytest.mark.parametrize('name,shape', [('cells',(3,10**5,10**5)), ('cells',(3,2500,2500)), ('pairs',(10**7,10**4)),
    ('all',(10**6,10**6)), ('testsets',(2,10**10))])
def test_a_short_mat_does_not_fill_the_memory(mat, name, shape):
    "Of the second, NumPy has the memory: hundreds of references to it would be gigabytes on the disk"
    made_large(mat, name, shape, h5py.ref_dtype if name in ('pairs','all') else np.uint8)
    assert mat.stat().st_size<10**6
    message = re.escape(f'the shape {shape}')
    with pytest.raises(ValueError, match='is not a valid cuhk-03.mat.*'+message): extract_cuhk03(mat, progress=False)

def test_a_mat_with_too_many_images(mat, monkeypatch):
    monkeypatch.setattr(cuhk03, '_MOST_IMAGES', 20)
    with pytest.raises(ValueError, match='it has more than 20 images'): extract_cuhk03(mat, progress=False)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_a_pipe_in_place_of_a_mat_is_not_waited_for(mat):
    config = mat.with_name('cuhk03_new_protocol_config_detected.mat')
    for file in (mat, config):
        file.rename(file.with_suffix('.kept'))
        os.mkfifo(file)
        with pytest.raises(ValueError, match=f'{file.name} is not a regular file'): cuhk03_table(mat, progress=False)
        file.unlink()
        file.with_suffix('.kept').rename(file)

@pytest.mark.parametrize('text', ['', '[', '[]', '{}', '['*100_000, '{"images": 20}', '{"images": 20, "testsets": 3}'])
def test_a_damaged_list_of_what_was_extracted(mat, text):
    pngs = extract_cuhk03(mat, progress=False)
    (pngs/'testsets.json').write_text(text)
    with pytest.raises(FileExistsError, match='detected exists, but its images are not those written'):
        extract_cuhk03(mat, progress=False)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_a_list_that_is_a_pipe_is_not_waited_for(msmt17_list):
    msmt17_list.unlink()
    os.mkfifo(msmt17_list)
    with pytest.raises(ValueError, match='is not a regular file but .*: give the path of a list'):
        msmt17_table(msmt17_list.parent)

def test_a_missing_mat(tmp_path):
    for path in (tmp_path, tmp_path/'x.mat'):
        with pytest.raises(FileNotFoundError) as e: cuhk03_table(path)
        for text in ('cuhk-03.mat','CUHK_identification','Expected'): assert text in str(e.value)

def test_a_missing_configuration(mat, tmp_path):
    config = mat.with_name('cuhk03_new_protocol_config_detected.mat')
    config.rename(tmp_path/'moved.mat')
    with pytest.raises(FileNotFoundError, match=f'{config.name}.*person-re-ranking'): cuhk03_table(mat, progress=False)
    assert not (mat.parent/'cuhk-03-png').exists()
    assert len(cuhk03_table(mat, config=tmp_path/'moved.mat', progress=False))==20

def test_a_wrong_configuration(mat):
    config = mat.with_name('cuhk03_new_protocol_config_detected.mat')
    config.write_bytes(b'not a MATLAB file')
    with pytest.raises(ValueError, match='cannot be read as the new protocol'): cuhk03_table(mat, progress=False)
    sio.savemat(config, dict(filelist=1))
    with pytest.raises(ValueError, match='cannot be read as .*KeyError'): cuhk03_table(mat, progress=False)
    unknown = np.array([['9_001_1_01.png']], dtype=object)
    one = [[1]]
    sio.savemat(config, dict(filelist=unknown, labels=one, camId=one, train_idx=one, query_idx=one, gallery_idx=one))
    with pytest.raises(ValueError, match='3 of the 3 images .*9_001_1_01.png'): cuhk03_table(mat, progress=False)

def test_unknown_arguments(mat):
    with pytest.raises(ValueError, match="boxes='drawn'"): cuhk03_table(mat, 'drawn')
    with pytest.raises(ValueError, match="protocol='old'"): cuhk03_table(mat, protocol='old')

@pytest.mark.parametrize('module', ['h5py','scipy.io'])
def test_a_missing_extra(mat, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape('pyramidreid[mat]')): cuhk03_table(mat, progress=False)

def test_the_mat_is_a_dataset_like_others(mat):
    assert dataset_table(mat.parent).equals(dataset_table(mat))
    assert dataset_table(mat, 'cuhk03').attrs['name']=='CUHK03-NP detected'
    dls = ReIDDataLoaders.from_cuhk03(mat, protocol='classic', **KW)
    assert dls.c==3 and dls.path==mat.parent and dls.data_name=='CUHK03 classic split 0 detected'
