"Loaders from folders and tables: bad input is named, held-out people are new people, and fastai's methods work"
import errno
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from zlib import crc32

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import Flip, Normalize, Resize, ResizeMethod, TensorImage, imagenet_stats, set_seed
from PIL import Image

from pyramidreid.core import Role
from pyramidreid.data.cache import ImageCache
from pyramidreid.data.datasets import *
from pyramidreid.data.folders import *
from pyramidreid.data.loaders import *
from pyramidreid.data.tables import *
from pyramidreid.data.transforms import *

SMALL = dict(p=2, k=2, size=(32,16), num_workers=0)
TRAIN,QUERY,GALLERY = 'bounding_box_train','query','bounding_box_test'

def write(fn, colour=(200,30,60), size=(16,32)):
    "Write a picture of one colour with a little noise"
    fn.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(crc32(fn.name.encode())).integers(-20, 20, (size[1],size[0],3))
    Image.fromarray((noise+np.array(colour)).clip(0,255).astype(np.uint8)).save(fn)
    return fn

@pytest.fixture
def market(tmp_path):
    "Four training people, two test people, two cameras, two images each, one junk image, one distractor"
    path = tmp_path/'market'
    for pid in (1,3,5,7,2,4):
        for cam in (1,2):
            for i,test_folder in ((1,QUERY),(2,GALLERY)):
                folder = TRAIN if pid%2 else test_folder
                write(path/folder/f'{pid:04d}_c{cam}s1_{i:06d}_01.jpg', (30*pid,100,20*cam))
    write(path/GALLERY/'-1_c1s1_000009_01.jpg')
    write(path/GALLERY/'0000_c2s1_000009_02.jpg')
    return path

@pytest.fixture
def df(market): return market_table(market)

@pytest.fixture
def folder(tmp_path):
    "Five people with four images each, `cam_i.jpg` for two cameras"
    for person in 'ABCDE':
        for cam in 'xy':
            for i in range(2): write(tmp_path/'folder'/person/f'{cam}_{i}.jpg', (40*ord(person)%255,80,120))
    return tmp_path/'folder'

def from_market(path, **kwargs): return ReIDDataLoaders.from_market(path, **{**SMALL, **kwargs})
def from_folder(path, **kwargs): return ReIDDataLoaders.from_folder(path, **{**SMALL, **kwargs})
def from_df(df, **kwargs): return ReIDDataLoaders.from_df(df, **{**SMALL, **kwargs})
def from_split(df, **kwargs): return from_df(df, cam_col='cam', split_col='split', **kwargs)
def train_pids(dls): return set(dls.train.items.pid)
def valid_pids(dls): return set(dls.valid.items.pid)
def in_order(dl): return dl.new(shuffle=False, drop_last=False)

# Files and folders

@pytest.mark.parametrize('make', [from_market, from_folder])
def test_missing_and_empty_folders(make, tmp_path):
    for path in (tmp_path/'nowhere', tmp_path):
        with pytest.raises(FileNotFoundError) as e: make(path)
        assert str(path) in str(e.value) and 'Expected' in str(e.value)

def test_a_missing_folder_of_market_is_named(market):
    shutil.rmtree(market/QUERY)
    with pytest.raises(FileNotFoundError) as e: from_market(market)
    message = str(e.value)
    assert str(market/QUERY) in message and str(market/GALLERY)+',' not in message

def test_names_that_do_not_parse_are_counted_and_three_shown(market):
    for i in range(5): write(market/QUERY/f'holiday{i}.jpg')
    n_files = len(list(market.glob('*/*.jpg')))
    with pytest.raises(ValueError) as e: from_market(market)
    message = str(e.value)
    assert f'5 of {n_files}' in message and '0002_c1s1_000451_03.jpg' in message
    assert len(re.findall(r'holiday\d\.jpg', message))==3

def test_images_of_all_types_are_read_and_hidden_files_are_not(folder):
    picture = Image.open(folder/'A'/'x_0.jpg')
    picture.save(folder/'C'/'x_7.webp', 'WEBP')
    picture.save(folder/'C'/'y_7.jfif', 'JPEG')
    for hidden in (folder/'A'/'._x_0.jpg', folder/'.trash'/'z.jpg'):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b'not a picture')
    df = folder_table(folder)
    assert len(df)==22 and sorted(set(df.pid))==list('ABCDE')
    assert {fn.name for fn in df.fn} >= {'x_7.webp','y_7.jfif'}
    assert sum(len(x) for dl in from_folder(folder) for x,_ in in_order(dl))==22

def test_files_with_other_suffixes_are_ignored(market):
    (market/QUERY/'Thumbs.db').write_bytes(b'0')
    (market/QUERY/'readme.txt').write_text('hello')
    assert len(from_market(market).valid_ds)==10

@pytest.fixture(params=['cut','empty','text'])
def bad_file(request, market):
    "A file of `market`'s training people that is cut off, empty, or not an image at all"
    fn = market/TRAIN/'0003_c1s1_000001_01.jpg'
    data = fn.read_bytes()
    contents = dict(cut=data[:len(data)//2], empty=b'', text=b'dear diary')
    fn.write_bytes(contents[request.param])
    return fn

def test_an_unreadable_file_is_named(market, bad_file):
    with pytest.raises(OSError) as e: list(in_order(from_market(market).train))
    assert str(bad_file) in str(e.value) and "on_bad='skip'" in str(e.value)

@pytest.mark.parametrize('bad_file', ['cut'], indirect=True)
def test_an_unreadable_file_is_named_by_a_worker(market, bad_file):
    with pytest.raises(OSError) as e: list(in_order(from_market(market, num_workers=1).train))
    assert str(bad_file) in str(e.value) and "on_bad='skip'" in str(e.value)

def test_unreadable_files_can_be_skipped_and_are_counted(market, bad_file, capsys):
    other = market/QUERY/'0002_c1s1_000001_01.jpg'
    other.write_bytes(b'')
    dls = from_market(market, on_bad='skip')
    out = capsys.readouterr().out
    assert '2 of 26 files' in out and bad_file.name in out and other.name in out
    assert [sum(len(x) for x,_ in in_order(dl)) for dl in dls]==[15,9]

def test_on_bad_must_be_known(market):
    with pytest.raises(ValueError, match="on_bad='ignore'.*'raise'.*'skip'"): from_market(market, on_bad='ignore')

def test_unreadable_reads_whole_files(market, bad_file):
    bad = find_unreadable(market_table(market).fn)
    assert list(bad)==[bad_file] and bad[bad_file]

@pytest.mark.parametrize('number', [errno.EACCES, errno.EIO])
def test_skip_does_not_drop_what_may_not_be_read(market, bad_file, monkeypatch, number):
    "It may be a good picture"
    closed,image_open = market_table(market).fn.iloc[3],Image.open
    def refuse(file, *args, **kwargs):
        if str(file)==str(closed): raise OSError(number, os.strerror(number), str(file))
        return image_open(file, *args, **kwargs)
    monkeypatch.setattr(Image, 'open', refuse) # permissions do not stop root
    for read in (lambda: find_unreadable(market_table(market).fn), lambda: from_market(market, on_bad='skip')):
        with pytest.raises(OSError, match=f'{closed.name} cannot be read') as e: read()
        assert e.value.errno==number

def test_a_missing_file_is_named(df):
    df.loc[0,'fn'].unlink()
    with pytest.raises(OSError, match=re.escape(str(df.fn[0]))): list(from_split(df).train.new(shuffle=False))

def test_wrong_camera_pattern(folder):
    with pytest.raises(ValueError) as e: from_folder(folder, cam_pat=r'cam(\d)')
    message = str(e.value)
    assert '20 of 20' in message and 'cam_pat' in message and 'x_0.jpg' in message
    write(folder/'A'/'z.jpg')
    with pytest.raises(ValueError, match='1 of 21.*z.jpg'): from_folder(folder, cam_pat='/(.)_')

@pytest.mark.parametrize('pattern', ['(','x_'])
def test_a_camera_pattern_that_is_invalid_or_has_no_group(folder, pattern):
    with pytest.raises(ValueError, match='cam_pat'): from_folder(folder, cam_pat=pattern)

def test_published_counts_are_compared(market, capsys):
    from_market(market)
    assert capsys.readouterr().out==''
    from_market(market.rename(market.parent/'Market-1501-v15.09.15'))
    out = capsys.readouterr().out
    assert '16 images of 4 identities, published 12,936 of 751' in out and 'gallery: 5 images of 3' in out

# Too few people, no match, wrong columns

def test_fewer_than_two_identities(df, folder):
    one = df[(df.pid==1) | (df.split!='train')]
    with pytest.raises(ValueError, match='A single training identity'): from_split(one, p=1)
    with pytest.raises(ValueError, match='0 training identit'): from_split(df[df.split!='train'])
    for person in 'BCDE': shutil.rmtree(folder/person)
    with pytest.raises(ValueError, match='1 of 1 identities'): from_folder(folder)

def test_a_batch_that_cannot_be_filled(df):
    with pytest.raises(ValueError, match='p=5.*has 4.*p=4 or less'): from_split(df, p=5)
    with pytest.raises(ValueError, match='p=0.*at least one'): from_split(df, p=0)
    with pytest.raises(ValueError, match='k=0.*at least one'): from_split(df, k=0)

def test_too_few_images_of_a_person_are_repeated(df):
    _,y = from_split(df, p=2, k=7).one_batch() # four images of each
    assert sorted(Counter(y[:,0].tolist()).values())==[7,7]

@pytest.fixture
def splits(df): return {name:df[df.split==name] for name in ('train','query','gallery')}

def test_no_possible_match_says_why(splits):
    train,query,gallery = splits.values()
    def message(*tables):
        with pytest.raises(ValueError, match='No query has a possible match') as e: from_split(pd.concat(tables))
        return str(e.value)
    assert 'no queries' in message(train, gallery)
    assert 'no gallery' in message(train, query)
    assert 'person is in the gallery' in message(train, query[query.pid==2], gallery[gallery.pid!=2])
    assert 'camera' in message(train, query[query.cam==1], gallery[gallery.cam==1])
    junk_query,junk_gallery = query[query.cam==1].assign(pid=-1),gallery[gallery.pid==-1].assign(cam=2)
    message(train, junk_query, junk_gallery)

def test_images_of_one_camera_match_where_cameras_are_unknown(splits):
    train,query,gallery = splits.values()
    dls = from_df(pd.concat([train, query[query.cam==1], gallery[gallery.cam==1]]), split_col='split')
    assert len(dls.valid_ds)==2+3

def test_hold_out_needs_people_with_a_possible_match(df):
    train = df[df.split=='train']
    with pytest.raises(ValueError, match='1 of 4 identities have images of two cameras'):
        from_df(train[(train.cam==1) | (train.pid==1)], cam_col='cam')
    with pytest.raises(ValueError, match='0 of 4 identities have two images'): from_df(train.groupby('pid').head(1))

@pytest.mark.parametrize('pct', [0,1,20,-.1])
def test_the_held_out_fraction_is_between_0_and_1(df, pct):
    with pytest.raises(ValueError, match=f'^{pct} is not a valid fraction'): from_split(df, valid_pct=pct)

def test_missing_columns(df):
    message = "no column 'person', 'camera'; it has 'fn', 'pid', 'cam', 'split'"
    with pytest.raises(ValueError, match=message): from_df(df, pid_col='person', cam_col='camera')
    with pytest.raises(ValueError, match="no column 'file'"): from_df(df, fn_col='file')
    with pytest.raises(ValueError, match="no column 'set'"): from_df(df, split_col='set')

@pytest.mark.parametrize('col', ['fn','pid','cam','split'])
def test_missing_columns_of_from_table_are_named(df, col):
    with pytest.raises(ValueError, match=col): ReIDDataLoaders.from_table(df.drop(columns=col), **SMALL)

@pytest.mark.parametrize('name', ['test','valid',0])
def test_wrong_split_names(df, name):
    renamed = df.assign(split=df.split.replace('query', name))
    with pytest.raises(ValueError, match=f"{name!r}.*'train', 'query' or 'gallery'"): from_split(renamed)

def test_split_names_may_be_in_capitals(df):
    capitals = df.assign(split=df.split.str.upper())
    assert from_split(capitals).c==4
    assert from_split(capitals, valid_pct=.5).c==from_split(df, valid_pct=.5).c

def test_a_split_for_some_images_only_is_an_error(df):
    "One forgotten cell must not silently replace the query and gallery by others"
    df.loc[3,'split'] = None
    with pytest.raises(ValueError, match='1 of 26'): from_split(df)

def test_missing_person_ids(df):
    df = df.astype({'pid':object})
    df.loc[4,'pid'] = None
    with pytest.raises(ValueError) as e: from_split(df)
    assert '1 image' in str(e.value) and str(df.fn[4]) in str(e.value)

# Labels, cameras and roles

def test_market(market):
    dls = from_market(market)
    assert (dls.c,list(dls.pids),list(dls.cams))==(4,[1,3,5,7,0,2,4],[1,2])
    assert len(dls.train_ds)==16 and len(dls.valid_ds)==10
    assert dls.valid.items.split.tolist()==['query']*4+['gallery']*6

def test_a_training_batch(market):
    x,y = from_market(market).one_batch()
    assert isinstance(x, TensorImage) and x.shape==(4,3,32,16)
    assert type(y) is ReIDTarget and y.shape==(4,3)
    assert (y[:,2]==Role.TRAIN).all() and y[:,0].max()<4

def test_validation_targets_are_those_of_the_table(market):
    dls = from_market(market)
    targets = torch.cat([y for _,y in dls.valid])
    assert targets.tolist()==dls.valid.items[['label','camera','role']].to_numpy().tolist()

def test_junk_and_distractors(market):
    "Junk is dropped from training and kept as -1 in the gallery; distractors are people, but not trained"
    shutil.copy(market/GALLERY/'-1_c1s1_000009_01.jpg', market/TRAIN/'-1_c1s1_000001_01.jpg')
    dls = from_market(market)
    assert -1 not in train_pids(dls) and len(dls.train_ds)==16 and dls.c==4
    items = dls.valid.items.set_index('pid')
    assert items.label[-1]==-1 and items.label[0]>=4 and (items.label.drop(-1)>=4).all()

@pytest.mark.parametrize('junk', [-1,'-1',-1.0,np.int64(-1),np.float32(-1)])
def test_junk_is_minus_one_of_any_type(df, junk):
    "A column of person ids that was read with gaps holds -1.0"
    kind = type(junk)
    dls = from_split(df.assign(pid=[junk if pid==-1 else kind(pid) for pid in df.pid]))
    assert sorted(dls.valid.items.label)[:2]==[-1,4] and dls.c==4

def test_junk_is_never_held_out_as_a_person(df):
    train = df[df.split=='train']
    train = pd.concat([train, train[train.pid==1].assign(pid=-1)])
    for seed in range(6):
        dls = from_df(train, cam_col='cam', valid_pct=.3, seed=seed, p=1)
        queries = dls.valid.items.query('split=="query"')
        assert -1 not in set(queries.pid) and (queries.label>=0).all() and len(set(queries.pid))==2

def test_folder_with_a_split(tmp_path):
    for split,people in dict(train='ABC', query='DE', gallery='DE').items():
        for person in people:
            for i in range(2): write(tmp_path/'f'/split/person/f'{i}.jpg')
    dls = from_folder(tmp_path/'f')
    assert train_pids(dls)==set('ABC') and valid_pids(dls)==set('DE') and dls.cams==[]
    assert dls.valid.items.camera.tolist()==[-1]*8
    write(tmp_path/'f'/'train'/'A'/'deep'/'er.jpg')
    with pytest.raises(ValueError, match='several depths'): from_folder(tmp_path/'f')

def test_validation_people_are_not_in_training(df):
    dls = from_split(df)
    assert train_pids(dls).isdisjoint(valid_pids(dls)-{-1})
    for _,y in dls.valid: assert not ((y[:,0]>=0) & (y[:,0]<dls.c)).any()

def as_name(pid): return f'person {pid}'
def as_large_number(pid): return pid*1000-5 if pid>0 else pid

@pytest.mark.parametrize('convert', [str, as_name, as_large_number, float, np.int32])
def test_person_ids_of_any_type(df, convert):
    junk = '-1' if convert is str else -1
    dls = from_split(df.assign(pid=[junk if pid==-1 else convert(pid) for pid in df.pid]))
    assert dls.c==4 and dls.one_batch()[1][:,0].max()<4
    pids = dls.train.items.groupby('label').pid.first().tolist()
    assert pids==sorted(pids)==list(dls.pids[:4])

def test_person_ids_of_mixed_types(df):
    pids = [pid if pid in (-1,1,2) else f'p{pid}' for pid in df.pid]
    cams = [cam if cam==1 else 'roof' for cam in df.cam]
    mixed = df.assign(pid=pids, cam=cams)
    dls = from_split(mixed)
    assert dls.c==4 and train_pids(dls)=={1,'p3','p5','p7'} and len(dls.cams)==2
    dls.one_batch()
    dls = from_df(mixed[mixed.split=='train'], cam_col='cam', valid_pct=.5)
    assert dls.c==2 and len(valid_pids(dls))==2

def test_a_number_and_its_text_are_two_people(df):
    pids = [str(pid) if pid==3 and i%2 else pid for i,pid in enumerate(df.pid)]
    assert from_split(df.assign(pid=pids)).c==5

def test_some_cameras_unknown(df):
    dls = from_split(df.assign(cam=[None if i%5==0 else cam for i,cam in enumerate(df.cam)]))
    assert set(dls.train.items.camera)|set(dls.valid.items.camera)=={-1,0,1}
    assert from_df(df, split_col='split').cams==[]

def test_files_of_a_table(df, market, tmp_path, monkeypatch):
    "Absolute, or relative to `path`; text or Path"
    shape = (4,3,32,16)
    relative = df.assign(fn=[str(Path(fn).relative_to(market)) for fn in df.fn])
    assert from_split(relative, path=market).one_batch()[0].shape==shape
    assert from_split(relative, path=str(market)).path==market
    monkeypatch.chdir(market)
    assert from_split(relative).one_batch()[0].shape==shape
    assert from_split(df.assign(fn=df.fn.map(str)), path=tmp_path).one_batch()[0].shape==shape

def test_the_table_is_not_changed(df):
    before = df.copy()
    from_split(df)
    from_df(df, valid_pct=.5, cam_col='cam', split_col='split')
    ReIDDataLoaders.from_table(df, **SMALL)
    assert df.equals(before)

def test_the_index_of_a_table_may_repeat(df):
    assert len(from_split(df.set_index(pd.Index([7]*len(df)))).train_ds)==16

# Held-out people

def held_out_folder(folder, market, df, **kwargs): return from_folder(folder, cam_pat='/(.)_', **kwargs)
def held_out_market(folder, market, df, **kwargs): return from_market(market, **{'valid_pct':.5, **kwargs})
def held_out_df(folder, market, df, **kwargs): return from_df(df[df.split=='train'], cam_col='cam', **kwargs)

@pytest.mark.parametrize('make', [held_out_folder, held_out_market, held_out_df])
def test_held_out_people_are_not_trained(make, folder, market, df):
    held_out = set()
    for seed in range(5):
        dls = make(folder, market, df, seed=seed)
        train,valid = train_pids(dls),valid_pids(dls)
        assert train.isdisjoint(valid) and len(train)==dls.c>=2 and len(valid)==2
        assert set(dls.train.items.fn).isdisjoint(dls.valid.items.fn)
        if make is held_out_market: assert all(pid%2 for pid in train|valid) # none of the official test people
        assert Counter(dls.valid.items.split)=={'query':4,'gallery':4}
        held_out.add(tuple(sorted(valid)))
    assert dls.valid.items.equals(make(folder, market, df, seed=seed).valid.items)
    assert len(held_out)>1
    assert '50% of the training identities held out' in make(folder, market, df, valid_pct=.5).data_name

def test_hold_out_with_one_image_of_each_camera(df):
    "Two cameras, one image each: one is the query, the other the gallery"
    train = df[df.split=='train'].groupby(['pid','cam']).head(1)
    dls = from_df(train, cam_col='cam', valid_pct=.5)
    assert Counter(dls.valid.items.split)=={'query':2,'gallery':2}

def test_every_held_out_query_has_a_match(df):
    "Camera 1 saw everyone twice, camera 2 once"
    train = df[df.split=='train']
    train = pd.concat([train[train.cam==1], train[train.cam==2].groupby('pid').head(1)])
    items = from_df(train, cam_col='cam', valid_pct=.5).valid.items
    query,gallery = items[items.split=='query'],items[items.split=='gallery']
    assert len(query)
    for q in query.itertuples(): assert ((gallery.pid==q.pid) & (gallery.cam!=q.cam)).any()

# Showing batches

def grid_of_titles():
    "Titles of the current figure's images, row by row"
    rows = {}
    for ax in plt.gcf().axes: rows.setdefault(ax.get_subplotspec().rowspan.start, []).append(ax.get_title())
    return list(rows.values())

def people_of(row): return {title.split(' · ')[0] for title in row}

def test_show_batch_has_a_row_for_each_person(df):
    dls = from_split(df, p=3, k=4)
    for shown in (dls, dls.train):
        shown.show_batch()
        rows = grid_of_titles()
        assert [len(row) for row in rows]==[4,4,4]
        assert all(re.fullmatch(r'pid \d · cam \d', title) for row in rows for title in row)
        assert [len(people_of(row)) for row in rows]==[1,1,1]
        assert len(set.union(*map(people_of, rows)))==3
        plt.close('all')

@pytest.mark.parametrize('max_n,shape', [(11,[4,4]), (7,[3,3]), (4,[2,2]), (1,[1])])
def test_show_batch_shows_at_most_max_n_images(df, max_n, shape):
    from_split(df, p=3, k=4).show_batch(max_n=max_n)
    rows = grid_of_titles()
    assert [len(row) for row in rows]==shape
    assert [len(people_of(row)) for row in rows]==[1]*len(shape)

def test_show_batch_of_a_random_batch_groups_people(df):
    dls = from_split(df, p=4, k=4, mode='random') # all 16 images of four people
    dls.show_batch()
    rows = grid_of_titles()
    assert [len(row) for row in rows]==[4]*4
    assert [len(people_of(row)) for row in rows]==[1]*4

def test_show_batch_of_single_images_is_a_plain_grid(df):
    dls = from_split(df, p=4, k=1)
    dls.show_batch()
    row, = grid_of_titles()
    assert len(people_of(row))==4

def test_show_batch_of_validation_keeps_the_order(df):
    dls = from_split(df)
    items = dls.valid.items
    titles = [f'pid {pid} · cam {cam}'.replace('pid -1 ', 'pid junk ') for pid,cam in zip(items.pid, items.cam)]
    for max_n in (3,10):
        dls.valid.show_batch(max_n=max_n)
        assert sum(grid_of_titles(), [])==titles[:max_n]
        plt.close('all')

def test_show_batch_of_one_image_again_and_again(df):
    from_split(df, p=4, k=4).show_batch(unique=True, max_n=10)
    rows = grid_of_titles()
    assert [len(row) for row in rows]==[5,5]
    assert len(set(sum(rows, [])))==1

def test_show_batch_without_cameras_or_labels(df):
    from_df(df, split_col='split').show_batch(max_n=2)
    assert 'cam' not in sum(grid_of_titles(), [])[0]
    from_split(df).test_dl(list(df.fn[:2])).show_batch()

def test_show_batch_of_a_given_batch(df):
    dls = from_split(df)
    batch = dls.one_batch()
    pids = [dls.pids[label] for label in batch[1][:,0].tolist()]
    dls.show_batch(batch)
    assert [title.split(' · ')[0] for title in sum(grid_of_titles(), [])]==[f'pid {pid}' for pid in pids]

def test_decode():
    "Person and camera, junk, and an unknown person"
    encode = EncodeTarget(['ann','bob'], ['roof'], 2)
    assert encode.decode(ReIDTarget(torch.tensor([1,0,0])))==('bob','roof')
    assert encode.decode(ReIDTarget(torch.tensor([-1,-1,2])))==('junk',None)
    assert encode.decode(ReIDTarget(torch.tensor([9,0,2])))==('#9','roof')

# test_dl

def first_image(df): return Image.open(df.fn[0])

def test_test_dl_of_one_image_in_any_form(df):
    dls = from_split(df)
    want = dls.test_dl([df.fn[0]]).one_batch()[0]
    assert want.shape==(1,3,32,16)
    image = first_image(df)
    for item in (str(df.fn[0]), image, np.array(image), df.fn[0].read_bytes(), image.convert('RGBA')):
        x, = dls.test_dl([item], num_workers=0).one_batch()
        torch.testing.assert_close(x, want)

def test_test_dl_of_files_and_tables(df):
    dls = from_split(df)
    from_files = torch.cat([batch[0] for batch in dls.test_dl(list(df.fn), bs=5)])
    assert len(from_files)==len(df)
    torch.testing.assert_close(torch.cat([batch[0] for batch in dls.test_dl(df[['fn']], bs=5)]), from_files)
    assert all(len(batch)==1 for batch in dls.test_dl(df))
    assert len(dls.test_dl([]))==0

def test_test_dl_with_labels(df):
    test = df[df.split!='train']
    targets = torch.cat([y for _,y in from_split(df).test_dl(test, with_labels=True, bs=4)])
    assert targets[:,2].tolist()==[int(Role.of(split)) for split in test.split]

def test_test_dl_of_rows(df):
    "Series, dicts and namedtuples, one or several, with the labels of the table"
    dls,test = from_split(df),df[df.split!='train'].iloc[[0,5,2]]
    want = [torch.cat(parts) for parts in zip(*dls.test_dl(test, with_labels=True, bs=2))]
    rows = [row for _,row in test.iterrows()]
    for items in (rows, [row.to_dict() for row in rows], list(test.itertuples()), tuple(rows)):
        dl = dls.test_dl(items, with_labels=True, bs=2)
        for found,expected in zip(zip(*dl), want): assert torch.equal(torch.cat(found), expected)
        assert dl.dataset.items.pid.tolist()==test.pid.tolist()
        assert torch.equal(dls.test_dl(items).one_batch()[0], want[0])
    x,y = dls.test_dl(rows[1], with_labels=True).one_batch()
    assert torch.equal(x, want[0][1:2]) and y[0,2]==want[1][1,2]

def test_test_dl_of_rows_of_the_loaders_own_table(df):
    dls = from_split(df)
    rows = [dls.valid.items.iloc[i] for i in (3,0)]
    targets = torch.cat([y for _,y in dls.test_dl(rows, with_labels=True)])
    assert targets[:,2].tolist()==[row.role for row in rows]

def test_test_dl_of_rows_says_what_is_missing(df):
    dls,rows = from_split(df),[row for _,row in df.iloc[:2].iterrows()]
    unsplit = [row.drop('split') for row in rows]
    with pytest.raises(ValueError, match="no column 'split'"): dls.test_dl(unsplit, with_labels=True)
    with pytest.raises(ValueError, match='2 of 3 items are rows of a table, and item 2 is of type PosixPath'):
        dls.test_dl([*rows, df.fn[3]])
    with pytest.raises(ValueError, match="no column 'fn'"): dls.test_dl([dict(pid=1)])

def test_test_dl_of_nothing(df):
    dls = from_split(df)
    for items in ([], (), df[:0], df.fn[:0]):
        for with_labels in (False,True):
            if with_labels and isinstance(items, pd.Series): continue
            dl = dls.test_dl(items, with_labels=with_labels)
            assert len(dl)==len(dl.dataset)==0 and list(dl)==[]

def test_test_dl_of_a_single_array(df):
    "And not of its rows"
    dls,image = from_split(df),np.array(first_image(df))
    assert torch.equal(dls.test_dl(image).one_batch()[0], dls.test_dl([image]).one_batch()[0])
    assert dls.test_dl(np.stack([image]*3)).one_batch()[0].shape==(3,3,32,16)

@pytest.mark.parametrize('crop', [np.zeros((0,4,3), np.uint8), Image.new('RGB', (4,0)), torch.zeros(4,0,3)])
def test_test_dl_names_the_position_of_an_empty_crop(df, crop):
    with pytest.raises(ValueError, match='^image 2 has no pixels'): from_split(df).test_dl([*df.fn[:2], crop])
    table = pd.DataFrame(dict(fn=pd.Series([df.fn[0],crop], dtype=object)))
    with pytest.raises(ValueError, match='^image 1 has no pixels'): from_split(df).test_dl(table)

def test_test_dl_names_the_position_of_what_is_not_an_image(df):
    with pytest.raises(ValueError, match='^image 1 is of type NoneType'): from_split(df).test_dl([df.fn[0], None])

# Pictures with more than 8 bits

@pytest.fixture
def thermal(tmp_path):
    "Counts of a thermal camera, 14 bits in files of 16: five people with four images each"
    rng,folder = np.random.default_rng(0),tmp_path/'thermal'
    for person in 'ABCDE':
        (folder/person).mkdir(parents=True)
        for i in range(4):
            counts = rng.integers(7600, 8000, (32,16), dtype=np.uint16)
            Image.fromarray(counts).save(folder/person/f'c{i}.png')
    return folder

def scaled(fns, low, high):
    "What the model should see of files: (N, 3, H, W), 0 to 1"
    counts = torch.stack([torch.from_numpy(np.asarray(Image.open(fn)).astype(float)) for fn in fns])
    levels = ((counts-low)/(high-low)).clip(0, 1).mul(255).round()/255
    return levels.float()[:,None].expand(-1,3,-1,-1)

def test_sixteen_bit_pictures_need_a_range(thermal):
    message = r"thermal.*png .*values from 7,6\d\d to 7,9\d\d.*pixel_range='measure'"
    with pytest.raises(ValueError, match=message): from_folder(thermal)

@pytest.mark.parametrize('cache', [None,True,'file'])
def test_the_loaders_keep_the_range(thermal, cache, tmp_path):
    "Training, validation, items, and loaders of other images"
    if cache=='file': cache = tmp_path/'cache.safetensors'
    dls = from_folder(thermal, pixel_range=(7500,8200), cache=cache)
    assert dls.pixel_range==(7500,8200)
    fns = dls.valid.items.fn.tolist()
    expected = scaled(fns, 7500, 8200)
    torch.testing.assert_close(torch.cat([x for x,_ in in_order(dls.valid)]), expected)
    torch.testing.assert_close(torch.cat([x for x, in dls.test_dl(fns)]), expected)
    torch.testing.assert_close(dls.test_dl([np.asarray(Image.open(fns[1]))]).one_batch()[0], expected[1:2])
    image,_ = dls.train_ds[0]
    expected, = scaled(dls.train.items.fn[:1], 7500, 8200)
    assert np.array_equal(np.asarray(image), expected.permute(1,2,0).mul(255).round())
    assert dls.one_batch()[0].mean()>.3 # and training batches are not black

def test_the_range_is_measured_over_the_training_images(thermal, capsys):
    "Not over those held out; printed; two plain percentiles"
    for fn in (thermal/'A').glob('*'): Image.fromarray(np.full((32,16), 15000, np.uint16)).save(fn)
    table = folder_table(thermal).assign(cam=['x','y']*10)
    table['split'] = np.where(table.pid!='A', 'train', np.where(table.cam=='x', 'query', 'gallery'))
    dls = ReIDDataLoaders.from_table(table, pixel_range='measure', **SMALL)
    counts = np.stack([np.asarray(Image.open(fn)) for fn in dls.train.items.fn])
    low,high = np.percentile(counts, (.1,99.9))
    assert dls.pixel_range==(np.floor(low),np.ceil(high))
    assert f'pixel_range={dls.pixel_range}: black and white, measured over 16 of 16' in capsys.readouterr().out

def test_nothing_to_measure_with_8_bits(df, capsys):
    assert from_df(df, pixel_range='measure').pixel_range is None
    assert 'no training image has more than 8 bits' in capsys.readouterr().out
    assert from_df(df).pixel_range is None and not capsys.readouterr().out

def test_a_wrong_range_is_an_error(thermal, tmp_path):
    with pytest.raises(ValueError, match='give the values of black'): from_folder(thermal, pixel_range=(8000,7600))
    with pytest.raises(ValueError, match="pixel_range='own': give"): from_folder(thermal, pixel_range='own')
    cache = ImageCache(sorted(thermal.rglob('*.png')), (32,16), pixel_range=(0,16383))
    with pytest.raises(ValueError, match=r'pixel_range=\(0, 16383\), and these loaders have'):
        from_folder(thermal, pixel_range=(7500,8200), cache=cache)

def test_deep_pictures_are_not_left_out_as_unreadable(thermal, capsys):
    (thermal/'A'/'c0.png').write_bytes(b'')
    dls = from_folder(thermal, pixel_range=(7500,8200), on_bad='skip')
    assert len(dls.train.items)+len(dls.valid.items)==19
    assert 'Left out 1 of 20 files' in capsys.readouterr().out

@pytest.mark.parametrize('mode', ['L','RGBA','P','1','CMYK'])
def test_images_of_any_mode_become_rgb(df, mode):
    dl = from_split(df).test_dl([first_image(df).convert(mode)], num_workers=0)
    assert dl.one_batch()[0].shape==(1,3,32,16)

@pytest.mark.parametrize('mode', ['L','RGBA'])
def test_arrays_of_any_mode_become_rgb(df, mode):
    dl = from_split(df).test_dl([np.array(first_image(df).convert(mode))], num_workers=0)
    assert dl.one_batch()[0].shape==(1,3,32,16)

def test_test_dl_says_what_is_missing(df):
    dls = from_split(df)
    for col in ('pid','cam','split'):
        with pytest.raises(ValueError, match=col): dls.test_dl(df.drop(columns=col), with_labels=True)
    with pytest.raises(ValueError, match='pid'): dls.test_dl(list(df.fn), with_labels=True)
    with pytest.raises(ValueError, match="'fn'"): dls.test_dl(df.rename(columns=dict(fn='file'))).one_batch()

@pytest.mark.parametrize('kind', [str,Path])
def test_test_dl_of_one_file(df, kind):
    "A single file in place of a list is not read letter by letter"
    assert from_split(df).test_dl(kind(df.fn[0])).one_batch()[0].shape==(1,3,32,16)

# Transforms and loader arguments

def test_only_training_images_are_augmented(df):
    dls = from_split(df, size=(48,24))
    valid,valid_again = (torch.cat([x for x,_ in dls.valid]) for _ in range(2))
    assert torch.equal(valid, valid_again)
    train = dls.train.new(shuffle=False, drop_last=False, bs=16)
    assert not torch.equal(train.one_batch()[0], train.one_batch()[0])

def test_erase_each_erases_another_box_in_each_image():
    set_seed(0)
    x = TensorImage(torch.zeros(200,3,32,16))
    erase = EraseEach(0.5)
    y = erase(x, split_idx=0)
    assert type(y) is TensorImage and y.shape==x.shape
    boxes = y.abs().sum(1)>0
    n_erased = boxes.flatten(1).any(1).sum().item()
    assert 70<n_erased<130 # about half of them
    assert len({tuple(box.flatten().tolist()) for box in boxes})>n_erased*.8
    assert torch.equal(erase(x, split_idx=1), x) and not x.any()
    assert not EraseEach(0.)(x, split_idx=0).any()
    assert EraseEach(1.)(x, split_idx=0).flatten(1).any(1).all()

def names(pipeline): return [type(tfm).__name__ for tfm in pipeline.fs]

def test_default_transforms(df):
    train = from_split(df).train
    assert {'Resize','FlipItem'} <= set(names(train.after_item)) and 'EraseEach' in names(train.after_batch)
    item,batch = person_tfms((64,32), erase=0)
    assert batch==[] and item[0].size==(32,64)

def test_custom_transforms_replace_the_default(df):
    item_tfms = Resize((20,10), method=ResizeMethod.Squish)
    dls = from_split(df, item_tfms=item_tfms, batch_tfms=[Flip(), Normalize.from_stats(*imagenet_stats)])
    assert dls.one_batch()[0].shape==(4,3,20,10)
    item,batch = names(dls.train.after_item),names(dls.train.after_batch)
    assert 'FlipItem' not in item and item.count('Resize')==1
    assert 'EraseEach' not in batch and {'Flip','Normalize'} <= set(batch)

def test_empty_lists_of_transforms_leave_only_the_conversion(df):
    train = from_split(df, item_tfms=[], batch_tfms=[]).train
    assert set(names(train.after_item))=={'ToTensor'} and names(train.after_batch)==['IntToFloatTensor']

def test_sizes_and_loader_arguments(df):
    dls = from_split(df, size=(40,24), val_bs=3, p=3, k=2)
    assert dls.one_batch()[0].shape==(6,3,40,24) and dls.valid.bs==3
    assert from_split(df, size=40).one_batch()[0].shape==(4,3,40,40)
    assert from_split(df, mode='random').train.mode=='random'
    assert from_split(df, val_bs=7).valid.bs==7

def test_transforms_reach_the_batches_of_both_modes(df):
    "The loader inside the loader must not lose what `add_tfms` added"
    dls = from_split(df)
    dls.add_tfms([Normalize.from_stats([.5]*3, [.001]*3)], 'after_batch')
    for mode in ('pk','random'):
        dls.train.mode = mode
        for x,_ in dls.train: assert x.abs().max()>50
    assert dls.valid.one_batch()[0].abs().max()>50
    assert dls.test_dl([df.fn[0]]).one_batch()[0].abs().max()>50

def test_labels_are_kept_by_workers(df):
    dls = from_split(df, num_workers=2)
    targets = torch.cat([y for _,y in dls.valid])
    assert targets.tolist()==dls.valid.items[['label','camera','role']].to_numpy().tolist()
    for _,y in dls.train: assert sorted(Counter(y[:,0].tolist()).values())==[2,2]
