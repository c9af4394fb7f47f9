"The data doctor: each finding on tables and files made for it, the report, and the command line"
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pyramidreid.data.health import DataReport, doctor


def table(*rows, **attrs):
    "`fn pid cam split` of each image, from text; '-' is missing, numbers are numbers"
    val = lambda s: None if s=='-' else int(s) if re.fullmatch(r'-?\d+', s) else s
    df = pd.DataFrame([[fn,*map(val, rest)] for fn,*rest in (r.split() for r in rows)], columns=['fn','pid','cam','split'], dtype=object)
    df.attrs.update(attrs)
    return df

def quick(*rows, **attrs): return doctor(table(*rows, **attrs), files=False)
def names(report): return set(report.findings.index)

clean = ['a1 1 1 train', 'a2 1 2 train', 'b1 2 1 train', 'b2 2 2 train', 'q 3 1 query', 'g 3 2 gallery', 'd 0 1 gallery', 'j -1 1 gallery']

def picture(path, seed, size=(16,32), mode='RGB', **kwargs):
    "A small image of noise at `path`, the same for the same `seed`"
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (size[1],size[0],3), dtype=np.uint8)).convert(mode).save(path, **kwargs)
    return path

@pytest.fixture
def market(tmp_path):
    "Two training people and one to look for, in Market's layout, a distractor and junk"
    top = tmp_path/'Some-Market'
    files = dict(bounding_box_train=['0001_c1s1_000001_01','0001_c2s1_000002_01','0002_c1s1_000003_01','0002_c2s1_000004_01'],
                 query=['0003_c1s1_000005_01'], bounding_box_test=['0003_c2s1_000006_01','0000_c1s1_000007_01','-1_c1s1_000008_01'])
    for i,(d,n) in enumerate((d,n) for d,ns in files.items() for n in ns): picture(top/d/f'{n}.jpg', i)
    return top

# the table

def test_clean_table(): 
    r = quick(*clean)
    assert r.ok and r.findings.empty and 'No findings.' in repr(r)

def test_counts_by_hand():
    r = quick(*clean, 'a3 1 2 train', 'g2 3 1 gallery')
    s = r.splits
    assert s.index.tolist()==['train','query','gallery']
    assert s.images.tolist()==[5,1,3] and s.identities.tolist()==[2,1,1] and s.cameras.tolist()==[2,1,2]
    assert s.distractors.tolist()==[0,0,1] and s.junk.tolist()==[0,0,1]
    assert s.loc['train',['min_images','median_images','max_images']].tolist()==[2,2.5,3]
    assert s.loc['gallery',['min_images','max_images','min_cameras','max_cameras']].tolist()==[2,2,2,2]
    assert r.cameras.loc['train'].to_dict()=={1:2,2:3} and r.cameras.loc['gallery'].to_dict()=={1:2,2:1}
    assert r.people.loc[('train',1)].to_dict()=={1:1,2:2} and r.people.loc[('gallery',3)].to_dict()=={1:1,2:1}
    assert ('gallery',0) not in r.people.index and ('gallery',-1) not in r.people.index

findings = {
    'no_pid':        (['x - 1 train'], ['x'], 'error'),
    'unknown_split': (['x 1 1 valid', 'y 1 1 -'], ['x','y'], 'error'),
    'listed_twice':  (['a1 1 1 train'], ['a1','a1'], 'warning'),
    'no_cam':        (['x 1 - train'], ['x'], 'warning'),
    'no_match':      (['x 4 1 query', 'y 3 2 query', 'g9 4 1 gallery'], ['x','y'], 'warning'),
    'one_image':     (['x 5 1 train'], ['x'], 'warning'),
    'leak':          (['x 1 1 train', 'x 3 2 gallery'], ['x','x'], 'error'),
    'two_people':    (['x 1 1 train', 'x 2 1 train'], ['x','x'], 'error'),
    'finds_itself':  (['x 3 1 query', 'x 3 2 gallery'], ['x','x'], 'error')}

@pytest.mark.parametrize('name', findings)
def test_finding_of_the_table(name):
    more,fns,severity = findings[name]
    r = quick(*clean, *more)
    assert r[name].fn.tolist()==fns and r.findings.severity[name]==severity and r.ok==(severity!='error')
    allowed = {'listed_twice'} if name in ('leak','two_people','finds_itself') else {'copy'} if name=='listed_twice' else set()
    assert names(r)-allowed=={name}

def test_person_in_training_and_test():
    r = quick(*clean, 'x 1 1 query', 'y 1 2 gallery', 'z 1 2 gallery')
    assert names(r)=={'train_and_test'} and r['train_and_test'][['pid','train','test']].values.tolist()==[[1,2,3]]
    assert '1 (images: 2 in training, 3 in the test)' in repr(r)

def test_number_0_is_a_person_if_asked_for():
    "MSMT17 numbers people from 0"
    r = quick('a 7 1 train', 'b 7 2 train', 'c 8 1 train', 'd 8 2 train', 'q 0 1 query', 'g 0 2 gallery')
    assert r.findings.empty and r.splits.distractors.sum()==0 and r.splits.identities.gallery==1

def test_one_camera_in_training():
    r = quick(*clean, 'x 4 1 train', 'y 4 1 train')
    assert names(r)=={'one_camera'} and r['one_camera'].pid.tolist()==[4] and r.findings.severity.one_camera=='note'

def test_same_camera_copy_in_the_gallery_is_left_out_by_the_protocol():
    assert 'finds_itself' not in names(quick(*clean, 'x 3 1 query', 'x 3 1 gallery'))

def test_junk_is_no_leak_and_no_label_error():
    assert names(quick(*clean, 'a1 -1 1 gallery', 'g -1 2 gallery')) <= {'listed_twice'}

def test_why_queries_have_no_match():
    r = quick(*clean, 'x 4 1 query', 'y 5 1 query', 'g4 4 1 gallery', 'z -1 1 query', 'u 6 - query', 'gu 6 - gallery')
    assert dict(zip(r['no_match'].fn, r['no_match'].why))=={
        'x':"in the gallery only by the query's own camera", 'y':'person not in the gallery', 'z':'is junk'}

def test_matches_against_plain_loops():
    rng = random.Random(0)
    for trial in range(30):
        df = pd.DataFrame([(f'{s}{i}', rng.choice([-1,0,1,2,3,4]), rng.choice([1,2,3]), s) for s,n in (('query',8),('gallery',10)) for i in range(n)], columns=['fn','pid','cam','split'])
        lost = []
        for q in df[df.split=='query'].itertuples():
            if not any(g.pid==q.pid!=-1 and g.cam!=q.cam for g in df[df.split=='gallery'].itertuples()): lost.append(q.fn)
        r = doctor(df, files=False)
        assert (r['no_match'].fn.tolist() if 'no_match' in names(r) else [])==lost

@pytest.mark.parametrize('rows,why', [(['q 3 1 query'], 'queries: 1, gallery images: 0'), (['g 3 1 gallery'], 'queries: 0, gallery images: 1'),
                                      (['q 3 1 query', 'g 3 1 gallery'], 'no query has a possible match')])
def test_nothing_can_be_measured(rows, why):
    r = quick(*clean[:4], *rows)
    assert not r.ok and why in r['no_test'].which[0]

def test_only_training_images():
    r = quick(*clean[:4])
    assert names(r)=={'only_train'} and r.ok

def test_no_splits():
    r = quick('a 1 1 -', 'b 1 2 -', 'c 2 1 -', 'd 2 2 -')
    assert names(r)=={'no_splits'} and r.ok and r.splits.index.tolist()==['train']

def test_no_cameras():
    r = quick(*[re.sub(r' \d (\w+)$', r' - \1', o) for o in clean])
    assert names(r)=={'no_cams'} and r.ok and r.splits.cameras.tolist()==[0]*3
    assert '–' in str(r) and r.cameras.columns.tolist()==['unknown']

def test_columns_cam_and_split_may_be_absent():
    r = doctor(pd.DataFrame(dict(fn=list('abcd'), pid=[1,1,2,2])), files=False)
    assert names(r)=={'no_cams','no_splits'}

def test_ids_as_text_and_mixed():
    r = quick('a ann door train', 'b ann hall train', 'c bob 1 train', 'd bob hall train', 'e 7 hall train', 'f 7 1 train', 'q eve door query', 'g eve hall gallery', 'o 0000 hall gallery')
    assert r.findings.empty and r.splits.distractors.gallery==1 and r.splits.identities.tolist()==[3,1,1]
    r._repr_html_(); r.to_json()

@pytest.mark.parametrize('df', [pd.DataFrame(columns=['fn','pid','cam','split']), pd.DataFrame(dict(fn=[], pid=[]))])
@pytest.mark.parametrize('files', [True,False])
def test_empty_table(df, files):
    r = doctor(df, files=files)
    assert names(r)=={'empty'} and not r.ok and 'Nothing to look at' in repr(r)
    assert json.loads(r.to_json())['splits']==[]
    r._repr_html_(); r.plot()

def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="no column 'pid'"): doctor(pd.DataFrame(dict(fn=['a'], id=[1])))

def test_few_people_to_train_on():
    r = quick('a 1 1 train', 'b 1 2 train', *clean[4:])
    assert names(r)=={'no_train'} and not r.ok

def test_spellings_of_missing_values_and_splits():
    "NaN, pd.NA, text columns of pandas, and splits in capitals"
    df = pd.DataFrame(dict(fn=list('abcdef'), pid=pd.array(['1','1','2','2','3','3'], dtype='string'), cam=[1.,2.,1.,math.nan,1.,2.], split=['TRAIN']*4+['Query','gallery']))
    df.loc[1,'pid'] = pd.NA
    r = doctor(df, files=False)
    assert r['no_pid'].fn.tolist()==['b'] and r['no_cam'].fn.tolist()==['d'] and r.splits.index.tolist()==['train','query','gallery']

def test_all_at_once():
    more = {k:rows for k,(rows,_,_) in findings.items()}
    r = quick(*clean, *(o.replace('x ', f'x{k} ').replace('y ', f'y{k} ') for k,rows in more.items() for o in rows), 'z 1 1 query')
    assert set(findings)|{'train_and_test'} <= names(r)
    assert r.findings.severity.tolist()==sorted(r.findings.severity, key=['error','warning','note'].index)

def test_a_finding_that_is_not_there_says_what_is():
    with pytest.raises(KeyError, match='no_pid'): quick(*clean, 'x - 1 train')['leak']

# counts

def test_published_counts():
    good = dict(train=(4,2), query=(1,1), gallery=(2,2))
    assert quick(*clean, counts=good).findings.empty
    assert 'as published' in repr(quick(*clean, counts=good))
    r = quick(*clean[1:], counts=good)
    assert r['not_as_published'][['split','images','identities','published_images','published_identities']].values.tolist()==[['train',3,2,4,2]]
    assert not r.ok and 'train: 3 images of 2 people, published 4 of 2' in repr(r)
    r = quick(*clean[:5], counts=good)
    assert 'gallery: 0 images of 0 people' in repr(r)

def test_counts_of_another_variant():
    from pyramidreid.data.datasets import reid_sets
    detected,labeled = [reid_sets[f'cuhk03_np_{o}'] for o in ('detected','labeled')]
    rows = [(f'{s}{i}', i%ids+1000*(s!='train'), i%3, s) for s,(n,ids) in labeled.counts.items() for i in range(n)]
    df = pd.DataFrame(rows, columns=['fn','pid','cam','split'])
    df.attrs.update(name=detected.name, counts=detected.counts)
    r = doctor(df, files=False)
    assert r['another_set'].which.tolist()==['CUHK03-NP labeled, in 3 of 3 splits'] and 'not_as_published' in names(r)
    less = df.iloc[1:]
    assert doctor(less, files=False)['another_set'].which.tolist()==['CUHK03-NP labeled, in 2 of 3 splits']
    df.attrs.update(name=labeled.name, counts=labeled.counts)
    assert not {'another_set','not_as_published'} & names(doctor(df, files=False))

# the files

def test_clean_folder(market):
    r = doctor(market)
    assert r.findings.empty and r.images.digest.nunique()==8 and r.images.reason.isna().all()
    assert (r.images.width==16).all() and (r.images.bytes==[f.stat().st_size for f in r.images.fn]).all()

def test_files_that_cannot_be_read(market):
    a,b,c,d = sorted((market/'bounding_box_train').iterdir())
    a.write_bytes(a.read_bytes()[:300]); b.write_bytes(b''); c.write_text('no image')
    r = doctor(market)
    assert names(r)=={'unreadable'} and not r.ok
    why = dict(zip(r['unreadable'].fn, r['unreadable'].why))
    assert 'truncated' in why[a].lower() and why[b]=='empty file' and why[c]=='no image of a known kind'
    assert not [w for w in why.values() if str(market) in w]
    df = r.images[['fn','pid','cam','split']]
    d.unlink()
    assert doctor(df)['missing'].fn.tolist()==[d]
    assert doctor(df, files=False).findings.empty

def test_sizes_and_modes(market):
    t = market/'bounding_box_train'
    tall,narrow,wide,square = [t/f'0001_c1s1_0001{i}0_01.jpg' for i in range(4)]
    picture(tall, 20, (16,31)); picture(narrow, 21, (15,32)); picture(wide, 22, (33,32)); picture(square, 23, (32,32))
    grey,cmyk = picture(t/'0001_c1s1_000200_01.jpg', 24, mode='L'),picture(t/'0001_c1s1_000201_01.jpg', 25, mode='CMYK')
    alpha,palette = picture(t/'0001_c1s1_000202_01.png', 26, mode='RGBA'),picture(t/'0001_c1s1_000203_01.png', 27, mode='P')
    r = doctor(market)
    assert names(r)=={'tiny','wide','mode'} and r.ok
    assert r['tiny'].fn.tolist()==[tall,narrow] and r['wide'].why.tolist()==['33×32']
    assert dict(zip(r['mode'].fn, r['mode'].why))=={grey:'L', cmyk:'CMYK', alpha:'RGBA', palette:'P'}

def test_copies_by_their_pixels(market):
    train,query,test = [sorted((market/d).iterdir()) for d in ('bounding_box_train','query','bounding_box_test')]
    Image.open(train[0]).save(market/'bounding_box_test'/'0003_c1s1_000100_01.png')       # a leak, in another container
    shutil.copy(train[1], market/'bounding_box_train'/'0002_c2s1_000101_01.jpg')          # two people
    shutil.copy(train[2], market/'bounding_box_train'/'0002_c1s1_000102_01.jpg')          # harmless
    shutil.copy(query[0], market/'bounding_box_test'/'0003_c2s1_000103_01.jpg')           # finds itself
    shutil.copy(train[3], market/'bounding_box_test'/'-1_c2s1_000104_01.jpg')             # junk
    r = doctor(market)
    assert names(r)=={'leak','two_people','copy','finds_itself'}
    stems = {k:[f.stem for f in r[k].fn] for k in names(r)}
    assert stems=={'leak':[train[0].stem,'0003_c1s1_000100_01'], 'two_people':[train[1].stem,'0002_c2s1_000101_01'],
                   'copy':['0002_c1s1_000003_01','0002_c1s1_000102_01'], 'finds_itself':[query[0].stem,'0003_c2s1_000103_01']}
    assert (r.findings.n==1).all()
    assert f'bounding_box_train/{train[0].name} = bounding_box_test/0003_c1s1_000100_01.png' in repr(r)

def test_same_pixels_in_another_shape_are_no_copy(market):
    t = market/'bounding_box_train'
    for i,size in enumerate(((16,32),(32,16))): Image.new('RGB', size, 'red').save(t/f'0001_c{i+1}s1_000300_01.png')
    assert names(doctor(market))=={'wide','tiny'}

def test_odd_files_do_not_stop_it(market, monkeypatch):
    (market/'query'/'0003_c1s1_000400_01.jpg').mkdir()
    df = doctor(market, files=False).images[['fn','pid','cam','split']]
    df = pd.concat([df, pd.DataFrame([(market/'query'/'0003_c1s1_000400_01.jpg', 3, 1, 'query'), (None, 3, 1, 'query')], columns=df.columns)])
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    r = doctor(df)
    assert len(r['unreadable'])==10 and r['unreadable'].why.str.contains('directory').sum()==1 and r['unreadable'].why.str.contains('bomb').sum()==8

# folders whose reader refuses

def test_bad_names(market):
    picture(market/'query'/'holiday.jpg', 30)
    r = doctor(market)
    assert {'refused','no_pid'} <= names(r) and r['no_pid'].fn.tolist()==[market/'query'/'holiday.jpg']
    assert r.splits.images.to_dict()==dict(train=4, query=2, gallery=2) and r.splits.identities.to_dict()==dict(train=2, query=1, gallery=1)

def test_a_split_is_not_there(market):
    shutil.rmtree(market/'query')
    r = doctor(market)
    assert {'refused','no_test'} <= names(r) and r.splits.images.to_dict()==dict(train=4, gallery=2)

def test_lists_that_name_missing_files(tmp_path):
    "MSMT17's layout, with a file missing and a line broken"
    for i,(lst,d,pid) in enumerate((('train','train',0),('train','train',1),('val','train',1),('query','test',0),('gallery','test',0))):
        for cam in (1,2):
            f = picture(tmp_path/d/f'{pid:04}'/f'{pid:04}_{i:03}_0{cam}_0303morning_0008_0.jpg', 10*i+cam)
            with (tmp_path/f'list_{lst}.txt').open('a') as o: o.write(f'{f.parent.name}/{f.name} {pid}\n')
    assert not {'refused','missing','train_and_test','no_pid','no_match'} & names(doctor(tmp_path))
    gone = tmp_path/'train'/'0000'/'0000_000_01_0303morning_0008_0.jpg'
    gone.unlink()
    with (tmp_path/'list_query.txt').open('a') as o: o.write('0000/nothing\n')
    r = doctor(tmp_path)
    assert {'refused','missing','no_pid'} <= names(r) and gone in r['missing'].fn.tolist() and len(r['no_pid'])==1
    assert r.splits.loc['train','images']==6

def test_folder_of_each_person(tmp_path):
    for who in ('ann','bob'):
        for i in range(2): picture(tmp_path/who/f'{i}.jpg', i+10*(who=='bob'))
    assert names(doctor(tmp_path, 'folder'))=={'no_cams','no_splits'}
    with pytest.raises(FileNotFoundError): doctor(tmp_path)

def test_no_folder_no_images_unknown_name(tmp_path, market):
    for args in ((tmp_path/'none',),(tmp_path,'no_such_set')):
        with pytest.raises((OSError,ValueError)): doctor(*args)
    with pytest.raises(ValueError, match='no known data set'): doctor(market, 'market')

# the report

def test_json(market, tmp_path):
    (market/'query'/'holiday.jpg').write_bytes(b'')
    r = doctor(market)
    text = r.to_json(tmp_path/'sub'/'r.json')
    d = json.loads((tmp_path/'sub'/'r.json').read_text(encoding='utf-8'), parse_constant=lambda c: pytest.fail(c))
    assert json.loads(text)==d and d['ok'] is False and d['splits'][0]['images']==4
    rows = {o['finding']:o['rows'] for o in d['findings']}
    assert rows['unreadable'][0]['fn']==str(market/'query'/'holiday.jpg') and rows['unreadable'][0]['width'] is None

def test_html_is_escaped():
    html = quick(*clean, '<b>x</b> - 1 train')._repr_html_()
    assert '&lt;b&gt;x&lt;' in html and '<b>x</b>' not in html

def test_three_examples_and_the_way_to_the_rest():
    text = repr(quick(*clean, *[f'x{i} - 1 train' for i in range(5)]))
    assert 'x2\n' in text and 'x3' not in text and "… all 5: report['no_pid']" in text

@pytest.mark.parametrize('files', [True,False])
def test_plot(market, files):
    fig = doctor(market, files=files).plot()
    assert len(fig.axes)==(9 if files else 6)
    fig.canvas.draw()

def test_plot_of_cameras_without_names(): quick('a 1 - train', 'x - - train', 'b 2 - what').plot().canvas.draw()

# the command line

def test_command(market, tmp_path):
    "In a process of its own, its output in a pipe"
    picture(market/'query'/'holiday.jpg', 30)
    png = tmp_path/'out'/'r.png'
    res = subprocess.run([sys.executable,'-W','ignore','-m','pyramidreid','doctor',market,'--plot',png], capture_output=True, text=True)
    assert res.returncode==1 and 'Traceback' not in res.stderr
    assert 'refused' in res.stdout and 'query/holiday.jpg' in res.stdout and not {'\r','\x1b'} & set(res.stdout+res.stderr)
    assert Image.open(png).size[0]>500 and [o.name for o in png.parent.iterdir()]==['r.png']

def test_exit_codes(market, tmp_path, capsys):
    from pyramidreid.cli.frame import main
    assert main(['doctor',str(market)])==0 and 'No findings.' in capsys.readouterr().out
    assert main(['doctor',str(market),'--quick'])==0 and 'not opened' in capsys.readouterr().out
    assert main(['doctor',str(tmp_path/'none')])==2 and str(tmp_path/'none') in capsys.readouterr().err
    (tmp_path/'empty').mkdir()
    assert main(['doctor',str(tmp_path/'empty')])==2 and 'No images' in capsys.readouterr().err

def test_bad_usage(market, capsys):
    from pyramidreid.cli.frame import main
    for args in ([],[str(market),'--plot','x.doc'],[str(market),'--fast']): assert main(['doctor',*args])==2
    assert main(['doctor',str(market),'--quick','--data-set','nothing'])==2 and 'no known data set' in capsys.readouterr().err
    assert main(['doctor',str(market),'--quick','--plot',str(market/'query'/'0003_c1s1_000005_01.jpg'/'r.png')])==2

def test_interrupt(market, monkeypatch, capsys):
    import pyramidreid.data.checks as c
    from pyramidreid.cli.frame import main
    seen,number = [],itertools.count()
    def look(fn):
        seen.append(fn); time.sleep(.01)
        if next(number)==5: os.kill(os.getpid(), signal.SIGINT)
        return None,None,None,None,None,None
    monkeypatch.setattr(c, '_look', look)
    fns = [market/'query'/'0003_c1s1_000005_01.jpg']*3000
    with pytest.raises(KeyboardInterrupt): c._look_at_all(fns)
    assert len(seen)<1000
    monkeypatch.setattr('pyramidreid.data.health.inspect_table', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(['doctor',str(market)])==130 and 'Interrupted' in capsys.readouterr().err

# the published sets

data = os.environ.get('PYRAMIDREID_DATA')
@pytest.mark.skipif(not data, reason='PYRAMIDREID_DATA is not set')
@pytest.mark.parametrize('folder,name,images,identities,junk', [
    ('Market-1501-v15.09.15', 'Market-1501', [12936,3368,15913], [751,750,750], 3819),
    ('cuhk03-np', 'CUHK03-NP detected', [7365,1400,5332], [767,700,700], 0)])
def test_published_sets(folder, name, images, identities, junk):
    if not (Path(data)/folder).exists(): pytest.skip(f'no {folder}')
    r = doctor(Path(data)/folder)
    assert r.name==name and r.splits.images.tolist()==images and r.splits.identities.tolist()==identities and r.splits.junk.gallery==junk
    assert r.findings.empty and r.images.reason.isna().all()
