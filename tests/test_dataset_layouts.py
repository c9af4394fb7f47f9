"Published datasets with protocols of their own, and datasets that users describe: tiny copies of each layout"
import json
import random
import re
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_datasets import images_of, make_empty, rows_of

from pyramidreid.cli.entry import main
from pyramidreid.cli.inputs import data_kind, read_data
from pyramidreid.data.datasets import (
    dataset_table,
    ilidsvid_table,
    mars_table,
    prcc_table,
    recognise_dataset,
    regdb_table,
    sysu_table,
)
from pyramidreid.data.doctor_report import doctor
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.data.registry import own_sets, register_dataset, reid_sets
from pyramidreid.data.tables import encode_table, hold_out, join_tables, train_on_all
from pyramidreid.evaluation.tracklets import pool_table

sio = pytest.importorskip('scipy.io')

def pids_by_split(df): return {split: sorted(set(images_of(df, split).pid)) for split in df.split.unique()}

def make_images(path, *names):
    "Images of 32×16 pixels, each of another colour; returns `path`"
    for name in names:
        (path/name).parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(zlib.crc32(name.encode()).to_bytes(4, 'big')[:3])
        Image.new('RGB', (16,32), colour).save(path/name, format='PNG')
    return path

def column_of(df, name): return dict(zip((fn.name for fn in df.fn), df[name]))

# layouts with the ids in the names

def make_veri(path, make=make_empty):
    return make(path, 'image_train/0001_c001_00016450_0.jpg', 'image_train/0770_c020_00084280_1.jpg',
                'image_query/0002_c002_00030600_0.jpg', 'image_test/0002_c002_00030600_0.jpg',
                'image_test/0002_c003_00084280_0.jpg')

def make_ltcc(path, make=make_empty):
    return make(path, 'train/000_1_c9_015833.png', 'train/000_2_c12_000001.png', 'train/151_1_c1_000002.png',
                'query/003_1_c4_000003.png', 'test/003_1_c5_000004.png', 'test/003_2_c6_000005.png')

def make_vc_clothes(path, make=make_empty):
    return make(path, 'train/0001-01-01-01.jpg', 'train/0002-04-03-12.jpg', 'query/0257-02-01-01.jpg',
                'gallery/0257-03-01-02.jpg', 'gallery/0257-04-02-01.jpg')

def make_prcc(path, make=make_empty):
    train = [f'rgb/{split}/{pid}/{cam}_cropped_rgb{i:03d}.jpg'
             for split in ('train','val') for pid in ('001','330') for cam in 'ABC' for i in (1,2)]
    test = [f'rgb/test/{cam}/{pid}/cropped_rgb{i:03d}.jpg' for cam in 'ABC' for pid in ('005','100') for i in (1,2)]
    return make(path, *train, *test, 'sketch/train/001/A_001.jpg')

def make_sysu(path, make=make_empty):
    "People 1 and 2 train, 3 validates, 4 and 5 are tested, 6 is in no list; person 5 is not in camera 2"
    names = [f'cam{cam}/{pid:04d}/{i:04d}.jpg' for cam in range(1, 7) for pid in range(1, 7) for i in range(1, 13)
             if (cam,pid)!=(2,5)]
    make(path, *names)
    (path/'exp').mkdir()
    for split,people in dict(train='1,2', val='3', test='5,4').items():
        (path/f'exp/{split}_id.txt').write_text(people+'\n')
    return path

def make_regdb(path, make=make_empty):
    "Ten splits of four people, whose lists number them from 0"
    def name(kind, pid, i): return f'{kind}/{pid}/male_front_{kind[0].lower()}_{10*pid+i:05d}_{pid}.bmp'
    make(path, *[name(kind, pid, i) for kind in ('Visible','Thermal') for pid in (7,20,117,285) for i in (1,2)])
    (path/'idx').mkdir()
    for trial in range(1, 11):
        halves = dict(train=(7,20), test=(117,285)) if trial%2 else dict(train=(7,285), test=(20,117))
        for part,people in halves.items():
            for kind in ('visible','thermal'):
                lines = [f'{name(kind.title(), pid, i)} {n}' for n,pid in enumerate(people) for i in (1,2)]
                (path/f'idx/{part}_{kind}_{trial}.txt').write_text('\n'.join(lines)+'\n')
    return path

# MARS: images of each tracklet, and the lines of its info file: first image, last image, person, camera
MARS = dict(
    train=[['0001C1T0001F001.jpg','0001C1T0001F002.jpg'], ['0001C2T0001F001.jpg'], ['0003C1T0001F001.jpg']],
    test=[['00-1C1T0001F001.jpg'], ['0000C3T0001F001.jpg','0000C3T0001F002.jpg'], ['0002C1T0001F001.jpg'],
          ['0002C2T0001F001.jpg','0002C2T0001F002.jpg'], ['0002C1T0002F001.jpg'], ['0004C6T0001F001.jpg']])
MARS_QUERIES = [3,4] # numbers of test tracklets, counted from 1

def make_mars(path, make=make_empty, end='\r\n'):
    (path/'info').mkdir(parents=True)
    for part,tracklets in MARS.items():
        names = [name for tracklet in tracklets for name in tracklet]
        make(path, *[f'bbox_{part}/{name[:4]}/{name}' for name in names])
        (path/f'info/{part}_name.txt').write_bytes(end.join([*names,'']).encode())
        last = np.cumsum([len(tracklet) for tracklet in tracklets])
        info = [(stop-len(t)+1, stop, -1 if t[0][:4]=='00-1' else int(t[0][:4]), int(t[0][5]))
                for t,stop in zip(tracklets, last)]
        sio.savemat(path/f'info/tracks_{part}_info.mat', {f'track_{part}_info': np.array(info, np.int32)})
    sio.savemat(path/'info/query_IDX.mat', dict(query_IDX=np.array([MARS_QUERIES], np.uint16)))
    return path

ILIDS_PEOPLE = [1,2,5,9,10,30] # the numbers have gaps
ILIDS_SPLITS = [[3,1,6,5,4,2], [1,2,3,4,5,6]] # places among them, counted from 1
ILIDS_FILE = 'train-test people splits/train_test_splits_ilidsvid.mat'

def make_ilidsvid(path, make=make_empty):
    "Two images of each person from camera 1, three from camera 2; and the folder of single images, which is not read"
    def name(kind, cam, pid, end):
        return f'i-LIDS-VID/{kind}/cam{cam}/person{pid:03d}/cam{cam}_person{pid:03d}{end}.png'
    make(path, *[name('sequences', cam, pid, f'_{i:05d}')
                 for cam in (1,2) for pid in ILIDS_PEOPLE for i in range(317, 318+cam)])
    make(path, *[name('images', cam, pid, '') for cam in (1,2) for pid in ILIDS_PEOPLE])
    (path/ILIDS_FILE).parent.mkdir()
    sio.savemat(path/ILIDS_FILE, dict(ls_set=np.array(ILIDS_SPLITS, float)))
    return path

MAKERS = dict(veri776=make_veri, ltcc=make_ltcc, vc_clothes=make_vc_clothes, prcc=make_prcc, sysu_mm01=make_sysu,
              regdb=make_regdb, mars=make_mars, ilidsvid=make_ilidsvid)

def test_veri(tmp_path):
    df = dataset_table(make_veri(tmp_path/'VeRi'), 'veri776')
    assert rows_of(df)==sorted([
        ('0001_c001_00016450_0.jpg', 1, 1, 'train'), ('0770_c020_00084280_1.jpg', 770, 20, 'train'),
        ('0002_c002_00030600_0.jpg', 2, 2, 'query'), ('0002_c002_00030600_0.jpg', 2, 2, 'gallery'),
        ('0002_c003_00084280_0.jpg', 2, 3, 'gallery')])
    assert df.attrs['counts']==dict(train=(37778,576), query=(1678,200), gallery=(11579,200))

def test_ltcc(tmp_path):
    df = dataset_table(make_ltcc(tmp_path/'x'), 'ltcc')
    assert df.columns.tolist()==['fn','pid','cam','split','clothes']
    assert pids_by_split(df)=={'train':[0,151], 'query':[3], 'gallery':[3]}
    assert column_of(df, 'cam')['000_2_c12_000001.png']==12
    assert column_of(df, 'clothes')=={
        '000_1_c9_015833.png':'0/1', '000_2_c12_000001.png':'0/2', '151_1_c1_000002.png':'151/1',
        '003_1_c4_000003.png':'3/1', '003_1_c5_000004.png':'3/1', '003_2_c6_000005.png':'3/2'}
    assert [len(images_of(df, split)) for split in ('train','query','gallery')]==[3,1,2]

def test_vc_clothes(tmp_path):
    df = dataset_table(make_vc_clothes(tmp_path/'x'), 'vc_clothes')
    assert rows_of(df)==sorted([
        ('0001-01-01-01.jpg', 1, 1, 'train'), ('0002-04-03-12.jpg', 2, 4, 'train'),
        ('0257-02-01-01.jpg', 257, 2, 'query'), ('0257-03-01-02.jpg', 257, 3, 'gallery'),
        ('0257-04-02-01.jpg', 257, 4, 'gallery')])
    assert column_of(df, 'clothes')['0002-04-03-12.jpg']=='2/3'

def test_prcc(tmp_path):
    path = make_prcc(tmp_path/'x')
    for clothes,cam in (('changed','C'), ('same','B')):
        df = prcc_table(path, clothes=clothes)
        assert [len(images_of(df, split)) for split in ('train','query','gallery')]==[12,4,4] # val is not read
        assert pids_by_split(df)=={'train':[1,330], 'query':[5,100], 'gallery':[5,100]}
        assert set(images_of(df, 'train').cam)=={'A','B','C'}
        assert set(images_of(df, 'query').cam)=={cam} and set(images_of(df, 'gallery').cam)=={'A'}
        assert df.attrs==dict(name=f'PRCC, {clothes} clothes', counts=dict(train=(17896,150)))
        in_gallery = set(images_of(df, 'gallery').clothes)
        assert bool(set(images_of(df, 'query').clothes) & in_gallery)==(clothes=='same')
    assert all(outfit==f"{pid}/{2 if cam=='C' else 1}" for pid,cam,outfit in zip(df.pid, df.cam, df.clothes))
    assert dataset_table(path, 'prcc').equals(prcc_table(path))
    with pytest.raises(ValueError, match="clothes='other' is not valid: choose 'changed' or 'same'"):
        prcc_table(path, clothes='other')

# cross-modality

def test_sysu(tmp_path):
    path = make_sysu(tmp_path/'SYSU-MM01')
    df = sysu_table(path)
    assert df.columns.tolist()==['fn','pid','cam','split','modality']
    assert pids_by_split(df)=={'train':[1,2,3], 'query':[4,5], 'gallery':[4,5]}
    assert len(images_of(df, 'train'))==3*6*12
    query,gallery = images_of(df, 'query'),images_of(df, 'gallery')
    assert len(query)==2*2*12 and set(query.cam)=={3,6} and set(query.modality)=={'infrared'}
    pairs = sorted(zip(gallery.pid, gallery.cam))
    assert pairs==[(4,1),(4,2),(4,4),(4,5),(5,1),(5,4),(5,5)] and set(gallery.modality)=={'visible'}
    assert all(fn.parent.parent.name==f'cam{cam}' for fn,cam in zip(df.fn, df.cam))
    assert df.attrs['name']=='SYSU-MM01, all search, 1-shot, draw 0' and df.attrs['counts']['gallery']==(301,96)
    assert dataset_table(path, 'sysu').equals(df)

def test_sysu_modes_and_shots(tmp_path):
    path = make_sysu(tmp_path/'x')
    indoor = sysu_table(path, mode='indoor')
    assert sorted(zip(images_of(indoor, 'gallery').pid, images_of(indoor, 'gallery').cam))==[(4,1),(4,2),(5,1)]
    assert indoor.attrs['counts']['gallery']==(112,96)
    many = sysu_table(path, shots=10, trial=3)
    assert images_of(many, 'gallery').groupby(['pid','cam']).size().tolist()==[10]*7
    assert images_of(many, 'gallery').fn.is_unique and 'gallery' not in many.attrs['counts']
    assert len(images_of(sysu_table(path, shots=100), 'gallery'))==7*12
    for wrong in (dict(mode='outdoor'), dict(shots=0)):
        with pytest.raises(ValueError, match='is not valid'): sysu_table(path, **wrong)

def plain_draw(path, trial):
    "The single-shot gallery as published Python code draws it"
    random.seed(trial)
    return [random.choice(sorted(str(o) for o in (path/f'cam{cam}'/f'{pid:04d}').iterdir()))
            for pid in (4,5) for cam in (1,2,4,5) if (path/f'cam{cam}'/f'{pid:04d}').is_dir()]

@pytest.mark.parametrize('trial', [0,1,9])
def test_sysu_draws_are_those_of_published_code(tmp_path, trial):
    path = make_sysu(tmp_path/'x')
    drawn = images_of(sysu_table(path, trial=trial), 'gallery').fn.map(str).tolist()
    state = random.getstate()
    assert sorted(drawn)==sorted(plain_draw(path, trial))
    random.setstate(state)

def test_sysu_with_a_broken_list(tmp_path):
    path = make_sysu(tmp_path/'x')
    (path/'exp/val_id.txt').write_text('three')
    with pytest.raises(ValueError, match=r"val_id\.txt is not a list of person ids"): sysu_table(path)
    (path/'exp/val_id.txt').unlink()
    with pytest.raises(FileNotFoundError, match=r'Missing or empty: .*val_id\.txt\.'): sysu_table(path)

def test_regdb(tmp_path):
    path = make_regdb(tmp_path/'RegDB')
    df = regdb_table(path)
    assert pids_by_split(df)=={'train':[7,20], 'query':[117,285], 'gallery':[117,285]}
    assert [len(images_of(df, split)) for split in ('train','query','gallery')]==[8,4,4]
    assert set(images_of(df, 'query').modality)=={'visible'} and set(images_of(df, 'gallery').modality)=={'thermal'}
    assert set(zip(df.modality, df.cam))=={('visible',1),('thermal',2)}
    assert df.attrs['name']=='RegDB split 1, visible to thermal'
    other = regdb_table(path, trial=2, query='thermal')
    assert pids_by_split(other)=={'train':[7,285], 'query':[20,117], 'gallery':[20,117]}
    assert set(images_of(other, 'query').cam)=={2} and other.attrs['name']=='RegDB split 2, thermal to visible'
    assert dataset_table(path, 'regdb').equals(df)
    for wrong in (dict(trial=0), dict(trial=11), dict(query='infrared')):
        with pytest.raises(ValueError, match='is not valid'): regdb_table(path, **wrong)
    (path/'idx/train_thermal_2.txt').unlink()
    with pytest.raises(FileNotFoundError, match=r'train_thermal_2\.txt'): regdb_table(path, trial=2)

# video

@pytest.mark.parametrize('end', ['\n','\r\n'])
def test_mars(tmp_path, end):
    path = make_mars(tmp_path/'MARS', end=end)
    df = mars_table(path)
    assert df.columns.tolist()==['fn','pid','cam','split','track']
    assert pids_by_split(df)=={'train':[1,3], 'query':[2], 'gallery':[-1,0,2,4]}
    assert df.groupby('split').track.nunique().to_dict()==dict(train=3, query=2, gallery=6)
    assert [len(images_of(df, split)) for split in ('train','query','gallery')]==[4,3,8]
    assert all(fn.exists() for fn in df.fn) and df.pid.dtype==df.cam.dtype==np.int64
    query = images_of(df, 'query')
    tracklets = query.groupby('track').agg(pid=('pid','first'), cam=('cam','first'), n=('fn','size'))
    assert tracklets.to_numpy().tolist()==[[2,1,1],[2,2,2]]
    assert df.groupby('track')[['pid','cam']].nunique().eq(1).all(axis=None)

def test_mars_without_queries_in_the_gallery(tmp_path):
    path = make_mars(tmp_path/'MARS')
    df = mars_table(path, queries_in_gallery=False)
    assert df.fn.is_unique and images_of(df, 'gallery').track.nunique()==4
    assert df.attrs['name']=='MARS, gallery without queries' and df.attrs['counts']['gallery']==(543216,621)
    both = mars_table(path)
    assert set(images_of(both, 'query').fn) < set(images_of(both, 'gallery').fn)

def test_mars_with_wrong_files(tmp_path):
    path = make_mars(tmp_path/'MARS')
    names = path/'info/test_name.txt'
    whole = names.read_text()
    names.write_text('\n'.join(whole.split()[:-2]))
    with pytest.raises(ValueError, match=r'names image 8, but info/test_name\.txt has 6'): mars_table(path)
    lines = whole.split()
    names.write_text('\n'.join([lines[3],*lines[1:3],lines[0],*lines[4:]]))
    message = '2 of 8 images are in a tracklet of another person or camera'
    with pytest.raises(ValueError, match=message): mars_table(path)
    names.write_text(whole)
    (path/'bbox_test/0004/0004C6T0001F001.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='1 of the 8 images .*0004C6T0001F001'): mars_table(path)
    (path/'info/query_IDX.mat').write_bytes(b'no matrix')
    with pytest.raises(ValueError, match='query_IDX.mat cannot be read as the file with the matrix query_IDX'):
        make_empty(path, 'bbox_test/0004/0004C6T0001F001.jpg')
        mars_table(path)
    (path/'info/query_IDX.mat').unlink()
    with pytest.raises(FileNotFoundError, match=r'Missing or empty: .*query_IDX\.mat\.') as e: mars_table(path)
    assert '\n  info/query_IDX.mat\n' in str(e.value) and '\n  bbox_train/\n' in str(e.value)

@pytest.mark.parametrize('trial,half,tested', [(1,'first',[1,5,30]), (1,'second',[2,9,10]), (2,'first',[1,2,5])])
def test_ilidsvid(tmp_path, trial, half, tested):
    df = ilidsvid_table(make_ilidsvid(tmp_path/'x'), trial, half)
    assert df.columns.tolist()==['fn','pid','cam','split','track']
    others = sorted(set(ILIDS_PEOPLE)-set(tested))
    assert pids_by_split(df)=={'train':others, 'query':tested, 'gallery':tested}
    assert [len(images_of(df, split)) for split in ('train','query','gallery')]==[15,6,9]
    assert set(images_of(df, 'query').cam)=={1} and set(images_of(df, 'gallery').cam)=={2}
    assert df.groupby('track')[['pid','cam']].nunique().eq(1).all(axis=None) and df.track.nunique()==12
    assert all(f'sequences/{track}/' in fn.as_posix() for track,fn in zip(df.track, df.fn))
    assert df.attrs['name']==f'iLIDS-VID split {trial}' + ', second half tested'*(half=='second')

def test_ilidsvid_with_wrong_files(tmp_path):
    path = make_ilidsvid(tmp_path/'x')
    for wrong in (dict(trial=0), dict(trial=3), dict(test_half='both')):
        with pytest.raises(ValueError, match='is not valid'): ilidsvid_table(path, **wrong)
    def fails(ls_set, message, key='ls_set'):
        sio.savemat(path/ILIDS_FILE, {key: np.array(ls_set)})
        with pytest.raises(ValueError, match=message): ilidsvid_table(path)
    fails([[1,2,3,4]], 'There are 6 people, but .* lists 4')
    fails([[1,2,3,4,5,5]], 'Split 1 in .* does not list each person once')
    fails([[1]], 'cannot be read as the file with the matrix ls_set: KeyError', key='other')
    (path/'i-LIDS-VID/sequences/cam2/person005').rename(path/'moved')
    fails(ILIDS_SPLITS, '1 of 6 people are in cam1 and not in cam2, the first is person 5')
    (path/ILIDS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match='Missing or empty: .*train_test_splits_ilidsvid.mat') as e:
        ilidsvid_table(path)
    assert '\n  i-LIDS-VID/sequences/cam1/\n' in str(e.value)

def test_ilidsvid_frame_of_another_person(tmp_path):
    path = make_ilidsvid(tmp_path/'x')
    make_empty(path, 'i-LIDS-VID/sequences/cam1/person001/cam1_person002_00001.png')
    with pytest.raises(ValueError, match='1 of 31 file names are not like those of iLIDS-VID'): ilidsvid_table(path)

@pytest.mark.parametrize('key', ['mars','ilidsvid'])
def test_tables_of_videos_are_ranked_by_track(tmp_path, key):
    df = dataset_table(MAKERS[key](tmp_path/'x'), key)
    for split,n in dict(mars=dict(query=2, gallery=6), ilidsvid=dict(query=3, gallery=3))[key].items():
        assert len(pool_table(images_of(df, split), 'track')[1])==n

# all of them

@pytest.mark.parametrize('key', MAKERS)
def test_each_is_recognised_in_a_folder_of_any_name(tmp_path, key):
    path = MAKERS[key](tmp_path/'somewhere')
    assert recognise_dataset(path)==[key]
    df = dataset_table(path)
    assert df.attrs['name'].startswith(reid_sets[key].name)
    assert data_kind(path) is None and read_data(path).equals(df)
    with pytest.raises(FileNotFoundError, match=f'somewhere looks like {key}: pass that path'): dataset_table(tmp_path)

@pytest.mark.parametrize('key', MAKERS)
def test_a_missing_part_is_named(tmp_path, key):
    path = MAKERS[key](tmp_path/'x')
    part = reid_sets[key].needs()[0]
    (path/part).rename(path/'moved')
    with pytest.raises(FileNotFoundError, match=re.escape(f'Missing or empty: {path/part}.')) as e:
        dataset_table(path, key)
    for text in (reid_sets[key].home, reid_sets[key].terms, reid_sets[key].example): assert text in str(e.value)

@pytest.mark.parametrize('key', MAKERS)
def test_the_doctor_compares_counts_and_reads_what_is_left(tmp_path, key):
    path = MAKERS[key](tmp_path/'x', make=make_images)
    report = doctor(path, key)
    expected = {'not_as_published','one_image','train_and_test','no_match','one_camera','refused'}
    assert ('not_as_published' in report.findings.index)==bool(reid_sets[key].counts)
    assert set(report.findings.index) <= expected
    assert 'refused' not in report.findings.index and 'train_and_test' not in report.findings.index
    part = reid_sets[key].needs()[-1]
    (path/part).rename(path/'moved')
    assert str(path/part) in repr(doctor(path, key))

def test_choices_reach_the_reader(tmp_path):
    path = make_regdb(tmp_path/'x')
    assert dataset_table(path, 'regdb', trial=2, query='thermal').equals(regdb_table(path, trial=2, query='thermal'))
    assert dataset_table(path, trial=2).attrs['name']=='RegDB split 2, visible to thermal'
    with pytest.raises(TypeError, match='draw'): dataset_table(path, 'regdb', draw=2)
    ltcc = make_ltcc(tmp_path/'y')
    with pytest.raises(TypeError, match="'ltcc' has one protocol only, without trial"):
        dataset_table(ltcc, 'ltcc', trial=1)
    assert dataset_table(ltcc, reid_sets['ltcc']).attrs['name']=='LTCC'

@pytest.mark.parametrize('key', ['ltcc','vc_clothes'])
def test_folders_of_people_are_not_mistaken_for_them(tmp_path, key):
    "The same folders with people inside, who have names and dates"
    top = dict(ltcc='test', vc_clothes='gallery')[key]
    path = make_empty(tmp_path/'own', *[f'{o}/ann/2024-01-02-03.jpg' for o in ('train','query',top)],
                      *[f'{o}/bob/001_1_c1_000001.png' for o in ('train','query',top)])
    assert recognise_dataset(path)==[]

def test_other_columns_pass_through(tmp_path):
    df = dataset_table(make_ltcc(tmp_path/'x'), 'ltcc')
    assert 'clothes' in encode_table(df)[0] and 'clothes' in train_on_all(df)
    other = pd.DataFrame(dict(fn=['a','b'], pid=['ann','bob'], cam=None, split='train'))
    joined = join_tables(df, other, valid='LTCC')
    assert joined.clothes.notna().sum()==len(df) and 'LTCC/3' in set(joined.pid)
    assert 'clothes' in hold_out(pd.concat([df]*2, ignore_index=True).assign(split='train'), .5)

def test_loaders_keep_the_columns(tmp_path):
    path = make_ltcc(tmp_path/'x', make=make_images)
    dls = ReIDDataLoaders.from_table(dataset_table(path), p=2, k=2, size=(16,8), num_workers=0)
    assert dls.valid.items.clothes.tolist()==['3/1','3/1','3/2']

# datasets of one's own

@pytest.fixture(autouse=True)
def forget_own_sets():
    yield
    own_sets.clear()

OWN = dict(train='photos', query='probe', gallery='all', pattern=r'(?P<pid>\w+)_cam(?P<cam>\w+)_')
OWN_IMAGES = {'photos/ann_cam1_1.jpg':('ann','1','train'), 'photos/sub/007_cam01_2.jpg':('007','01','train'),
              'probe/7_camdoor_3.jpg':('7','door','query'), 'all/7_camhall_4.jpg':('7','hall','gallery'),
              'all/-1_camhall_5.jpg':('-1','hall','gallery')}

@pytest.fixture
def own(tmp_path): return make_images(tmp_path/'mine', *OWN_IMAGES)

def as_rows(df): return {(fn.name, pid, cam, split) for fn,pid,cam,split in df[['fn','pid','cam','split']].to_numpy()}

WANTED = {(name.split('/')[-1], *ids) for name,ids in OWN_IMAGES.items()}

def test_a_registered_dataset(own):
    register_dataset('mine', **{**OWN, 'pattern': r'(?P<pid>-?\w+)_cam(?P<cam>\w+)_'})
    df = dataset_table(own, 'mine')
    assert as_rows(df)==WANTED and df.attrs==dict(name='mine', counts={})
    report = doctor(own, 'mine')
    assert 'mine' in repr(report)
    assert not {'not_as_published','another_set','missing'} & set(report.findings.index)
    assert report.splits.loc['gallery','junk']==1
    dls = ReIDDataLoaders.from_table(df, p=2, k=2, size=(16,8), num_workers=0)
    assert list(dls.pids)==['007','ann','7']

def test_a_layout_file_for_python_and_the_command_line(own, tmp_path, monkeypatch):
    file = tmp_path/'building.json'
    file.write_text(json.dumps({**OWN, 'pattern': r'(?P<pid>-?\w+)_cam(?P<cam>\w+)_'}))
    assert as_rows(dataset_table(own, file))==as_rows(read_data(own, str(file)))==WANTED
    assert dataset_table(own, file).attrs['name']=='building'
    monkeypatch.chdir(tmp_path)
    assert as_rows(read_data('mine', 'building.json'))==WANTED
    file.write_text(json.dumps(dict(OWN, name='our people', pattern='(?P<pid>[^/]+)_cam')))
    df = dataset_table(own, 'building.json')
    assert df.attrs['name']=='our people' and df.cam.isna().all() and set(df.pid)=={'ann','007','7','-1'}

def test_the_command_line_reads_a_layout_file(own, tmp_path, capfd):
    file = tmp_path/'mine.json'
    file.write_text(json.dumps(OWN))
    assert main(['doctor', str(own), '--dataset', str(file), '--json']) in (0,1)
    report = json.loads(capfd.readouterr().out)
    assert report['name']=='mine' and {o['split']: o['images'] for o in report['splits']}['train']==2
    assert main(['doctor', str(own), '--dataset', str(tmp_path/'none.json')])==2
    assert 'none.json is not a file' in capfd.readouterr().err

def test_other_groups_become_columns(tmp_path):
    path = make_empty(tmp_path/'x', 'ann/door/red_1.jpg', 'ann/hall/blue_1.jpg', 'bob/door/red_2.jpg')
    register_dataset('halls', train='.', pattern=r'^(?P<pid>[^/]+)/(?P<cam>[^/]+)/(?P<clothes>[a-z]+)_(?P<frame>\d+)')
    df = dataset_table(path, 'halls')
    assert df.columns.tolist()==['fn','pid','cam','split','clothes','frame']
    assert set(df.clothes)=={'ann/red','ann/blue','bob/red'} and set(df.frame)=={'1','2'}

def test_without_queries_people_are_held_out(tmp_path):
    path = make_images(tmp_path/'x', *[f'all/{pid}_{cam}_{i}.jpg' for pid in 'abcdef' for cam in 'uv' for i in (1,2)])
    register_dataset('crowd', train='all', pattern='(?P<pid>.)_(?P<cam>.)_')
    df = dataset_table(path, 'crowd')
    assert len(df)==24 and df.split.isna().all()
    dls = ReIDDataLoaders.from_table(df, p=2, k=2, size=(16,8), num_workers=0)
    assert 2<=dls.c<=4 and len(dls.valid_ds)==4*(6-dls.c)
    assert 'refused' not in doctor(path, 'crowd').findings.index

def test_several_folders_and_no_training(tmp_path):
    path = make_empty(tmp_path/'x', 'a/1_.jpg', 'b/2_.jpg', 'q/1_.jpg')
    register_dataset('eval', query='q', gallery=['a','b'], pattern='(?P<pid>.)_')
    assert pids_by_split(dataset_table(path, 'eval'))=={'query':['1'], 'gallery':['1','2']}

@pytest.mark.parametrize('options,message', [
    (dict(pattern='(?P<pid>'), 'not a valid regular expression'),
    (dict(pattern=None), 'not a valid regular expression'),
    (dict(pattern=r'(\w+)_'), 'has no group pid: write the person id as'),
    (dict(pattern='(?P<pid>.)(?P<split>.)'), 'a group cannot be called split'),
    (dict(train='../photos'), "train='../photos' leads out of the dataset: give a folder within"),
    (dict(train='a/../../b'), 'leads out'), (dict(train='/photos'), 'leads out'),
    (dict(train='C:/photos'), 'is not a folder'), (dict(train=r'\\server\photos'), 'leads out'),
    (dict(train=''), 'is not a folder'), (dict(train=3), 'train=3 is not a folder'),
    (dict(train=['a',None]), 'train=None is not a folder'),
    (dict(gallery=None), 'query is given alone'), (dict(query=None), 'gallery is given alone'),
    (dict(train=None, query=None, gallery=None), 'No folder is given'),
    (dict(train='all'), "train='all' and gallery='all' share images"),
    (dict(train='.'), "train='.' and query='probe' share images"),
    (dict(gallery='photos/old'), 'share images')])
def test_what_cannot_be_registered(options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)): register_dataset('mine', **{**OWN, **options})
    assert 'mine' not in own_sets
    try: file_text = json.dumps({**OWN, **options})
    except TypeError: return
    (tmp_path/'x.json').write_text(file_text)
    with pytest.raises(ValueError, match=re.escape(message)) as e: dataset_table(tmp_path, tmp_path/'x.json')
    assert 'x.json' in str(e.value)

@pytest.mark.parametrize('name', ['market1501','msmt17','folder','cuhk03','cuhk03_np','', None, 'x.json'])
def test_names_that_are_taken(name):
    with pytest.raises(ValueError, match='already stands for|is not a valid name'): register_dataset(name, **OWN)

@pytest.mark.parametrize('text,message', [
    ('{"train": "a", "pattern": "(?P<pid>\\w+)"}', 'each backslash of a pattern is written twice'),
    ('train: a', 'is not valid JSON'), ('[]', 'holds a list. Expected an object'),
    ('{"train": "a"}', 'has no pattern'), ('['*100_000, 'it is nested too deeply'),
    ('{"name": ["x"], "train": "a", "pattern": "(?P<pid>.)"}', "name=['x'] is not a text"),
    ('{"train": "a", "pattern": "(?P<pid>.)'+'('*5000+')'*5000+'"}', 'is not a valid regular expression'),
    ('{"train": "a", "pattern": "(?P<pid>.{99999999999})"}', 'is not a valid regular expression'),
    (' '*2**20+'{}', '1,048,578 bytes, more than the 1,048,576 allowed'),
    ('{"train": "a", "test": "b", "pattern": "(?P<pid>.)"}', "unknown key 'test'. Expected an object with name"),
    ('{"train": "..", "pattern": "(?P<pid>.)"}', "x.json: train='..' leads out of the dataset")])
def test_layout_files_that_cannot_be_used(tmp_path, text, message):
    (tmp_path/'x.json').write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)): dataset_table(tmp_path, tmp_path/'x.json')
    with pytest.raises(ValueError, match=re.escape(message)): doctor(tmp_path, str(tmp_path/'x.json'))

def test_own_folders_that_do_not_fit(own):
    register_dataset('mine', **dict(OWN, gallery='somewhere'))
    with pytest.raises(FileNotFoundError, match=r'Missing or empty: .*somewhere\.'): dataset_table(own, 'mine')
    register_dataset('mine', **dict(OWN, pattern=r'(?P<pid>[a-z]+)_cam'))
    with pytest.raises(ValueError, match='4 of 5 file names are not like those of mine'): dataset_table(own, 'mine')
    message = "'yours' is not a known dataset: .*mine. A JSON file"
    with pytest.raises(ValueError, match=message): dataset_table(own, 'yours')
