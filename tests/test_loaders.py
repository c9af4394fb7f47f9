"Loaders from folders and tables: bad input is named, held-out people are new people, and what fastai can do still works"
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import Flip, Normalize, Resize, ResizeMethod, TensorImage, imagenet_stats, set_seed
from PIL import Image

from pyramidreid.core import Role
from pyramidreid.data.datasets import *
from pyramidreid.data.loaders import *
from pyramidreid.data.tables import *
from pyramidreid.data.transforms import *

KW = dict(p=2, k=2, size=(32,16), num_workers=0)
MARKET = ('bounding_box_train','query','bounding_box_test')

def write(fn, color=(200,30,60), size=(16,32)):
    "A picture of one colour with a little noise"
    fn.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(abs(hash(fn.name))%2**32).integers(-20, 20, (size[1],size[0],3)) + np.array(color)
    Image.fromarray(x.clip(0,255).astype(np.uint8)).save(fn)
    return fn

@pytest.fixture
def market(tmp_path):
    "Four training people, two test people, two cameras, two images each, one junk image, one distractor"
    path = tmp_path/'market'
    for pid in (1,3,5,7,2,4):
        for cam in (1,2):
            for j in (1,2): write(path/(MARKET[0] if pid%2 else MARKET[j])/f'{pid:04d}_c{cam}s1_{j:06d}_01.jpg', (30*pid,100,20*cam))
    write(path/MARKET[2]/'-1_c1s1_000009_01.jpg')
    write(path/MARKET[2]/'0000_c2s1_000009_02.jpg')
    return path

@pytest.fixture
def df(market): return market_table(market)

@pytest.fixture
def folder(tmp_path):
    "Five people with four images each, `cam_i.jpg` for two cameras"
    for p in 'ABCDE':
        for cam in 'xy':
            for i in range(2): write(tmp_path/'folder'/p/f'{cam}_{i}.jpg', (40*ord(p)%255,80,120))
    return tmp_path/'folder'

def from_df(df, **kwargs): return ReIDDataLoaders.from_df(df, **{**KW, **kwargs})
def from_split(df, **kwargs): return from_df(df, cam_col='cam', split_col='split', **kwargs)
def train_pids(dls): return set(dls.train.items.pid)
def valid_pids(dls): return set(dls.valid.items.pid)

# bad input

@pytest.mark.parametrize('make', [ReIDDataLoaders.from_market, ReIDDataLoaders.from_folder])
def test_missing_and_empty_folders(make, tmp_path):
    for path in (tmp_path/'nowhere', tmp_path):
        with pytest.raises(FileNotFoundError) as e: make(path, **KW)
        assert str(path) in str(e.value) and 'Expected' in str(e.value)

def test_a_missing_part_of_market_is_named(market):
    shutil.rmtree(market/'query')
    with pytest.raises(FileNotFoundError) as e: ReIDDataLoaders.from_market(market, **KW)
    assert str(market/'query') in str(e.value) and str(market/'bounding_box_test')+',' not in str(e.value)

def test_names_that_do_not_parse_are_counted_and_three_shown(market):
    for i in range(5): write(market/'query'/f'holiday{i}.jpg')
    with pytest.raises(ValueError) as e: ReIDDataLoaders.from_market(market, **KW)
    msg = str(e.value)
    n = sum(1 for _ in market.glob('*/*.jpg'))
    assert f'5 of {n}' in msg and len(re.findall(r'holiday\d\.jpg', msg))==3 and '0002_c1s1_000451_03.jpg' in msg

def test_pictures_of_all_kinds_are_read_and_hidden_files_are_not(folder):
    for o in ('C/x_7.webp','C/y_7.jfif'): Image.open(folder/'A'/'x_0.jpg').save(folder/o, 'JPEG' if o.endswith('f') else 'WEBP')
    for o in ('A/._x_0.jpg','.trash/z.jpg'):
        (folder/o).parent.mkdir(exist_ok=True)
        (folder/o).write_bytes(b'not a picture')
    df = folder_table(folder)
    assert len(df)==22 and sorted(set(df.pid))==list('ABCDE') and {f.name for f in df.fn} >= {'x_7.webp','y_7.jfif'}
    for dl in ReIDDataLoaders.from_folder(folder, **KW): list(dl.new(shuffle=False, drop_last=False))

def test_files_that_are_no_pictures_by_name_are_left_alone(market):
    (market/'query'/'Thumbs.db').write_bytes(b'0')
    (market/'query'/'readme.txt').write_text('hello')
    assert len(ReIDDataLoaders.from_market(market, **KW).valid_ds)==10

@pytest.fixture(params=['cut','empty','text'])
def bad_file(request, market):
    "A file of `market`'s training people that is cut off, empty, or no image at all"
    fn = market/MARKET[0]/'0003_c1s1_000001_01.jpg'
    data = fn.read_bytes()
    fn.write_bytes(dict(cut=data[:len(data)//2], empty=b'', text=b'dear diary')[request.param])
    return fn

@pytest.mark.parametrize('num_workers', [0,1])
def test_an_unreadable_file_is_named(market, bad_file, num_workers):
    dls = ReIDDataLoaders.from_market(market, **{**KW, 'num_workers':num_workers})
    with pytest.raises(OSError) as e:
        for _ in dls.train.new(shuffle=False, drop_last=False): pass
    assert str(bad_file) in str(e.value) and "on_bad='skip'" in str(e.value)

def test_unreadable_files_can_be_skipped_and_are_counted(market, bad_file, capsys):
    (market/'query'/'0002_c1s1_000001_01.jpg').write_bytes(b'')
    dls = ReIDDataLoaders.from_market(market, on_bad='skip', **KW)
    out = capsys.readouterr().out
    assert '2 of 26 files' in out and bad_file.name in out and '0002_c1s1_000001_01.jpg' in out
    assert len(dls.train_ds)==15 and len(dls.valid_ds)==9
    for dl in dls:
        for _ in dl.new(shuffle=False, drop_last=False): pass
    with pytest.raises(ValueError, match="on_bad='ignore'.*'raise'.*'skip'"): ReIDDataLoaders.from_market(market, on_bad='ignore', **KW)

def test_unreadable_reads_whole_files(market, bad_file):
    bad = unreadable(market_table(market).fn)
    assert list(bad)==[bad_file] and bad[bad_file]

def test_a_missing_file_is_named(df):
    df.loc[0,'fn'].unlink()
    with pytest.raises(OSError, match=re.escape(str(df.fn[0]))):
        for _ in from_split(df).train.new(shuffle=False): pass

def test_fewer_than_two_identities(df, folder):
    one = df[(df.pid==1) | (df.split!='train')]
    with pytest.raises(ValueError, match='1 training identit'): from_split(one, p=1)
    with pytest.raises(ValueError, match='0 training identit'): from_split(df[df.split!='train'])
    for p in 'BCDE': shutil.rmtree(folder/p)
    with pytest.raises(ValueError, match='1 of 1 identities'): ReIDDataLoaders.from_folder(folder, **KW)

def test_a_batch_that_cannot_be_filled(df):
    with pytest.raises(ValueError, match='p=5.*has 4.*p=4 or less'): from_split(df, p=5)
    for kw in (dict(p=0),dict(k=0)):
        with pytest.raises(ValueError, match='at least one'): from_split(df, **kw)
    batch = from_split(df, p=2, k=7).one_batch()[1] # four images of each: repeated
    assert sorted(Counter(batch[:,0].tolist()).values())==[7,7]

def test_no_possible_match(df):
    "Why, in each case"
    train,q,g = (df[df.split==s] for s in ('train','query','gallery'))
    def message(*parts):
        with pytest.raises(ValueError, match='No query has a possible match') as e: from_split(pd.concat(parts))
        return str(e.value)
    assert 'no queries' in message(train, g)
    assert 'no gallery' in message(train, q)
    assert "person is in the gallery" in message(train, q[q.pid==2], g[g.pid!=2])
    assert "camera" in message(train, q[q.cam==1], g[g.cam==1])
    junk = g[g.pid==-1].assign(cam=2)
    assert message(train, q[q.cam==1].assign(pid=-1), junk)
    from_df(pd.concat([train, q[q.cam==1], g[g.cam==1]]), split_col='split') # without cameras nothing is left out

def test_hold_out_needs_people_with_a_possible_match(df):
    train = df[df.split=='train']
    with pytest.raises(ValueError, match='1 of 4 identities have images of two cameras'): from_df(train[(train.cam==1) | (train.pid==1)], cam_col='cam')
    with pytest.raises(ValueError, match='0 of 4 identities have two images'): from_df(train.groupby('pid').head(1))
    for pct in (0,1,20,-.1):
        with pytest.raises(ValueError, match=f'valid_pct={pct}'): from_split(df, valid_pct=pct)

def test_missing_columns(df):
    with pytest.raises(ValueError, match="no column 'person', 'camera'; it has 'fn', 'pid', 'cam', 'split'"): from_df(df, pid_col='person', cam_col='camera')
    with pytest.raises(ValueError, match="no column 'file'"): from_df(df, fn_col='file')
    with pytest.raises(ValueError, match="no column 'set'"): from_df(df, split_col='set')

def test_missing_columns_of_from_table_are_named(df):
    for col in ('fn','pid','cam','split'):
        with pytest.raises(ValueError, match=col): ReIDDataLoaders.from_table(df.drop(columns=col), **KW)

def test_wrong_split_names(df):
    for name in ('test','valid',0):
        with pytest.raises(ValueError, match=f"{name!r}.*'train', 'query' or 'gallery'"): from_split(df.assign(split=df.split.replace('query', name)))

def test_split_names_in_capitals_mean_the_same_everywhere(df):
    loud = df.assign(split=df.split.str.upper())
    assert from_split(loud).c==4
    assert from_split(loud, valid_pct=.5).c==from_split(df, valid_pct=.5).c

def test_a_split_that_is_given_for_some_images_only_is_an_error(df):
    "One forgotten cell must not replace the queries and gallery by others, without a word"
    df.loc[3,'split'] = None
    with pytest.raises(ValueError, match='1 of 26'): from_split(df)

def test_missing_person_ids(df):
    df = df.astype({'pid':object})
    df.loc[4,'pid'] = None
    with pytest.raises(ValueError) as e: from_split(df)
    assert '1 image' in str(e.value) and str(df.fn[4]) in str(e.value)

def test_wrong_camera_pattern(folder):
    with pytest.raises(ValueError) as e: ReIDDataLoaders.from_folder(folder, cam_pat=r'cam(\d)', **KW)
    assert '20 of 20' in str(e.value) and "cam_pat" in str(e.value) and 'x_0.jpg' in str(e.value)
    write(folder/'A'/'z.jpg')
    with pytest.raises(ValueError, match='1 of 21.*z.jpg'): ReIDDataLoaders.from_folder(folder, cam_pat='^(.)_', **KW)

@pytest.mark.parametrize('pat', ['(','x_'])
def test_a_camera_pattern_that_is_no_pattern_or_has_no_group(folder, pat):
    with pytest.raises(ValueError, match='cam_pat'): ReIDDataLoaders.from_folder(folder, cam_pat=pat, **KW)

# who is who

def test_market(market):
    dls = ReIDDataLoaders.from_market(market, **KW)
    assert (dls.c,list(dls.pids),list(dls.cams))==(4,[1,3,5,7,0,2,4],[1,2])
    assert len(dls.train_ds)==16 and len(dls.valid_ds)==10
    x,y = dls.one_batch()
    assert isinstance(x, TensorImage) and x.shape==(4,3,32,16) and type(y) is ReIDTarget and y.shape==(4,3)
    assert (y[:,2]==Role.TRAIN).all() and y[:,0].max()<4
    yv = torch.cat([y for _,y in dls.valid])
    items = dls.valid.items
    assert yv.tolist()==items[['label','camera','role']].to_numpy().tolist()
    assert items.split.tolist()==['query']*4+['gallery']*6

def test_junk_and_distractors(market):
    "Junk of a training set is dropped, of a gallery kept as -1; distractors are people like others, but not trained"
    shutil.copy(market/MARKET[2]/'-1_c1s1_000009_01.jpg', market/MARKET[0]/'-1_c1s1_000001_01.jpg')
    dls = ReIDDataLoaders.from_market(market, **KW)
    assert -1 not in train_pids(dls) and len(dls.train_ds)==16 and dls.c==4
    g = dls.valid.items.set_index('pid')
    assert g.label[-1]==-1 and g.label[0]>=4 and (g.label.drop(-1)>=4).all()

@pytest.mark.parametrize('junk', [-1,'-1',-1.0,np.int64(-1),np.float32(-1)])
def test_junk_is_minus_one_of_any_kind(df, junk):
    "A column of person ids that was read with a gap holds -1.0"
    kind = str if isinstance(junk, str) else type(junk)
    dls = from_split(df.assign(pid=[junk if p==-1 else kind(p) for p in df.pid]))
    assert sorted(dls.valid.items.label)[:2]==[-1,4] and dls.c==4

def test_junk_is_never_held_out_as_a_person(df):
    train = df[df.split=='train']
    train = pd.concat([train, train[train.pid==1].assign(pid=-1)])
    for seed in range(6):
        dls = from_df(train, cam_col='cam', valid_pct=.3, seed=seed, p=1)
        asked = dls.valid.items.query('split=="query"')
        assert -1 not in set(asked.pid) and (asked.label>=0).all() and len(set(asked.pid))==2

@pytest.mark.parametrize('kind', ['from_folder','from_market','from_df'])
def test_held_out_people_are_not_trained(kind, folder, market, df):
    make = dict(from_folder=lambda **kw: ReIDDataLoaders.from_folder(folder, cam_pat='^(.)_', **KW, **kw),
                from_market=lambda **kw: ReIDDataLoaders.from_market(market, **{'valid_pct':.5, **kw}, **KW),
                from_df=lambda **kw: from_df(df[df.split=='train'], cam_col='cam', **kw))[kind]
    seen = set()
    for seed in range(5):
        dls = make(seed=seed)
        tr,va = train_pids(dls),valid_pids(dls)
        assert not tr & va and len(tr)==dls.c>=2 and len(va)==2
        assert set(dls.train.items.fn).isdisjoint(dls.valid.items.fn)
        if kind=='from_market': assert all(p%2 for p in tr|va) # the official test people stay out of it
        assert Counter(dls.valid.items.split)=={'query':4,'gallery':4}
        assert dls.valid.items.equals(make(seed=seed).valid.items)
        seen.add(tuple(sorted(va)))
    assert len(seen)>1
    assert 'held out' in make(valid_pct=.5).data_name and '50%' in make(valid_pct=.5).data_name

def test_hold_out_with_one_image_of_each_camera(df):
    "Two cameras, one image each: one asks, the other answers"
    train = df[df.split=='train'].groupby(['pid','cam']).head(1)
    dls = from_df(train, cam_col='cam', valid_pct=.5)
    assert Counter(dls.valid.items.split)=={'query':2,'gallery':2}

def test_every_held_out_query_has_a_match(df):
    "Camera 1 saw everyone twice, camera 2 once"
    train = df[df.split=='train']
    train = pd.concat([train[train.cam==1], train[train.cam==2].groupby('pid').head(1)])
    v = from_df(train, cam_col='cam', valid_pct=.5).valid.items
    q,g = v[v.split=='query'],v[v.split=='gallery']
    for o in q.itertuples(): assert ((g.pid==o.pid) & (g.cam!=o.cam)).any()

def test_folder_with_a_split(tmp_path):
    for split,people in dict(train='ABC', query='DE', gallery='DE').items():
        for p in people:
            for i in range(2): write(tmp_path/'f'/split/p/f'{i}.jpg')
    dls = ReIDDataLoaders.from_folder(tmp_path/'f', **KW)
    assert train_pids(dls)==set('ABC') and valid_pids(dls)==set('DE') and dls.cams==[]
    assert dls.valid.items.camera.tolist()==[-1]*8
    write(tmp_path/'f'/'train'/'A'/'deep'/'er.jpg')
    assert 'deep' in train_pids(ReIDDataLoaders.from_folder(tmp_path/'f', **KW))

def test_unseen_validation_people_do_not_raise(df):
    dls = from_split(df)
    assert train_pids(dls).isdisjoint(valid_pids(dls)-{-1})
    for _,y in dls.valid: assert not ((y[:,0]>=0) & (y[:,0]<dls.c)).any()

@pytest.mark.parametrize('rename', [str, lambda p: f'person {p}', lambda p: p*1000-5 if p>0 else p, float, np.int32])
def test_person_ids_of_any_kind(df, rename):
    dls = from_split(df.assign(pid=[p if p==-1 else rename(p) for p in df.pid] if rename is not str else df.pid.map(str)))
    assert dls.c==4 and dls.one_batch()[1][:,0].max()<4
    labels = dls.train.items.groupby('label').pid.first()
    assert labels.tolist()==sorted(labels) and list(dls.pids[:4])==labels.tolist()

def test_person_ids_of_mixed_kinds(df):
    mixed = df.assign(pid=[p if p in (-1,1,2) else f'p{p}' for p in df.pid], cam=[c if c==1 else 'roof' for c in df.cam])
    dls = from_split(mixed)
    assert dls.c==4 and train_pids(dls)=={1,'p3','p5','p7'} and len(dls.cams)==2
    dls.one_batch()
    dls = from_df(mixed[mixed.split=='train'], cam_col='cam', valid_pct=.5)
    assert dls.c==2 and len(valid_pids(dls))==2

def test_a_number_and_its_text_are_two_people(df):
    mixed = df.assign(pid=[str(p) if p==3 and i%2 else p for i,p in enumerate(df.pid)])
    assert from_split(mixed).c==5

def test_some_cameras_unknown(df):
    dls = from_split(df.assign(cam=[None if i%5==0 else c for i,c in enumerate(df.cam)]))
    assert set(dls.train.items.camera)|set(dls.valid.items.camera)=={-1,0,1}
    assert from_df(df, split_col='split').cams==[]

def test_paths_of_a_table(df, market, tmp_path, monkeypatch):
    "Absolute, or relative to `path`; text or Path"
    rel = df.assign(fn=[str(Path(f).relative_to(market)) for f in df.fn])
    assert from_split(rel, path=market).one_batch()[0].shape==(4,3,32,16)
    assert from_split(rel, path=str(market)).path==market
    monkeypatch.chdir(market)
    assert from_split(rel).one_batch()[0].shape==(4,3,32,16)
    assert from_split(df.assign(fn=df.fn.map(str)), path=tmp_path).one_batch()[0].shape==(4,3,32,16)

def test_the_table_given_is_not_changed(df):
    before = df.copy()
    from_split(df), from_df(df, valid_pct=.5, cam_col='cam', split_col='split')
    ReIDDataLoaders.from_table(df, **KW)
    assert df.equals(before)
    odd = df.set_index(pd.Index([7]*len(df))) # an index that repeats
    assert len(from_split(odd).train_ds)==16

def test_published_counts_are_compared(market, capsys):
    ReIDDataLoaders.from_market(market, **KW)
    assert capsys.readouterr().out==''
    ReIDDataLoaders.from_market(market.rename(market.parent/'Market-1501-v15.09.15'), **KW)
    out = capsys.readouterr().out
    assert '16 images of 4 identities, published 12,936 of 751' in out and 'gallery: 5 images of 3' in out

# normal operations

def test_show_batch(df):
    import matplotlib.pyplot as plt
    dls = from_split(df)
    for dl in (dls, dls.train, dls.valid):
        dl.show_batch(max_n=3)
        titles = [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]
        assert len(titles)==3 and all(t.startswith('pid ') and '· cam ' in t for t in titles)
        plt.close('all')
    shown = [f'pid {p} · cam {c}' for p,c in zip(dls.valid.items.pid, dls.valid.items.cam)]
    dls.valid.show_batch(max_n=10)
    assert [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]==[s.replace('pid -1 ','pid junk ') for s in shown]
    from_df(df, split_col='split').show_batch(max_n=2)
    assert 'cam' not in plt.gcf().axes[0].get_title()
    dls.test_dl(list(df.fn[:2])).show_batch()

def test_decode(df):
    "A target in words: person and camera, junk, and someone unknown"
    t = EncodeTarget(['ann','bob'], ['roof'], 2)
    assert t.decode(ReIDTarget(torch.tensor([1,0,0])))==('bob','roof')
    assert t.decode(ReIDTarget(torch.tensor([-1,-1,2])))==('junk',None)
    assert t.decode(ReIDTarget(torch.tensor([9,0,2])))==('#9','roof')

def image(df): return Image.open(df.fn[0])

def test_test_dl_of_files_images_arrays_and_tables(df):
    dls = from_split(df)
    want = dls.test_dl([df.fn[0]]).one_batch()[0]
    assert want.shape==(1,3,32,16)
    a = np.array(image(df))
    for o in (str(df.fn[0]), image(df), a, df.fn[0].read_bytes(), image(df).convert('RGBA')):
        x, = dls.test_dl([o], num_workers=0).one_batch()
        torch.testing.assert_close(x, want)
    n = len(df)
    xs = torch.cat([b[0] for b in dls.test_dl(list(df.fn), bs=5)])
    assert xs.shape[0]==n
    torch.testing.assert_close(torch.cat([b[0] for b in dls.test_dl(df[['fn']], bs=5)]), xs)
    assert all(len(b)==1 for b in dls.test_dl(df))
    labelled = dls.test_dl(df[df.split!='train'], with_labels=True, bs=4)
    y = torch.cat([b[1] for b in labelled])
    assert y[:,2].tolist()==[int(Role.of(s)) for s in df.split[df.split!='train']]
    assert len(dls.test_dl([]))==0

@pytest.mark.parametrize('mode', ['L','RGBA','P','1','CMYK'])
def test_images_of_any_mode_become_rgb(df, mode):
    dls = from_split(df)
    assert dls.test_dl([image(df).convert(mode)], num_workers=0).one_batch()[0].shape==(1,3,32,16)

@pytest.mark.parametrize('mode', ['L','RGBA'])
def test_arrays_of_any_mode_become_rgb(df, mode):
    dls = from_split(df)
    assert dls.test_dl([np.array(image(df).convert(mode))], num_workers=0).one_batch()[0].shape==(1,3,32,16)

def test_test_dl_says_what_is_missing(df):
    dls = from_split(df)
    for col in ('pid','cam','split'):
        with pytest.raises(ValueError, match=col): dls.test_dl(df.drop(columns=col), with_labels=True)
    with pytest.raises(ValueError, match='pid'): dls.test_dl(list(df.fn), with_labels=True)
    with pytest.raises(ValueError, match="'fn'"): dls.test_dl(df.rename(columns=dict(fn='file'))).one_batch()

@pytest.mark.parametrize('kind', [str,Path])
def test_test_dl_of_one_file(df, kind):
    "A single file in place of a list: taken, or a clear error; not read letter by letter"
    dls = from_split(df)
    try: x = dls.test_dl(kind(df.fn[0])).one_batch()[0]
    except (TypeError,ValueError) as e: assert 'list' in str(e)
    else: assert x.shape==(1,3,32,16)

def test_evaluation_sees_no_augmentation(df):
    dls = from_split(df, size=(48,24))
    a,b = (torch.cat([x for x,_ in dls.valid]) for _ in range(2))
    assert torch.equal(a, b)
    t1,t2 = (dls.train.new(shuffle=False, drop_last=False, bs=16).one_batch()[0] for _ in range(2))
    assert not torch.equal(t1, t2)

def test_erase_each_has_a_place_in_every_image():
    set_seed(0)
    x = TensorImage(torch.zeros(200,3,32,16))
    tfm = EraseEach(0.5)
    y = tfm(x, split_idx=0)
    assert type(y) is TensorImage and y.shape==x.shape
    where = y.abs().sum(1)>0
    n = where.flatten(1).any(1).sum().item()
    assert 70<n<130 # about half of them
    assert len({tuple(o.flatten().tolist()) for o in where})>n*.8 # each elsewhere
    assert torch.equal(tfm(x, split_idx=1), x) and not x.any()
    assert not EraseEach(0.)(x, split_idx=0).any() and EraseEach(1.)(x, split_idx=0).flatten(1).any(1).all()

def names(pipe): return [type(f).__name__ for f in pipe.fs]

def test_default_and_custom_transforms(df):
    dls = from_split(df)
    assert {'Resize','FlipItem'} <= set(names(dls.train.after_item)) and 'EraseEach' in names(dls.train.after_batch)
    own = from_split(df, item_tfms=Resize((20,10), method=ResizeMethod.Squish), batch_tfms=[Flip(), Normalize.from_stats(*imagenet_stats)])
    assert own.one_batch()[0].shape==(4,3,20,10)
    assert 'FlipItem' not in names(own.train.after_item) and names(own.train.after_item).count('Resize')==1
    assert 'EraseEach' not in names(own.train.after_batch) and {'Flip','Normalize'} <= set(names(own.train.after_batch))
    none = from_split(df, item_tfms=[], batch_tfms=[])
    assert set(names(none.train.after_item))=={'ToTensor'} and names(none.train.after_batch)==['IntToFloatTensor']
    item,batch = person_tfms((64,32), erase=0)
    assert batch==[] and item[0].size==(32,64)

def test_sizes_and_loader_arguments(df):
    dls = from_split(df, size=(40,24), bs=3, p=3, k=2)
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
    assert dls.valid.one_batch()[0].abs().max()>50 and dls.test_dl([df.fn[0]]).one_batch()[0].abs().max()>50

def test_labels_are_kept_by_workers(df):
    dls = from_split(df, num_workers=2)
    ys = torch.cat([y for _,y in dls.valid])
    assert ys.tolist()==dls.valid.items[['label','camera','role']].to_numpy().tolist()
    for _,y in dls.train: assert sorted(Counter(y[:,0].tolist()).values())==[2,2]
