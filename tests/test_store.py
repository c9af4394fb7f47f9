"Galleries on disk: every kind of crash, damage and company"
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip('pyarrow', reason='needs the extra gallery')
from pyramidreid.gallery import store as module
from pyramidreid.gallery.segments import read_embeddings, write_embeddings
from pyramidreid.gallery.store import Store, read_manifest


def embs(n, seed=0): return np.random.default_rng(seed).standard_normal((n,6)).astype(np.float32)
def frame(*keys, **columns): return pd.DataFrame(dict(key=list(keys), **columns))
def held(store): return {k:e.tolist() for s in store.segments for k,e,g in zip(s.table.key, s.embs, s.gone) if not g}

@pytest.fixture
def path(tmp_path): return tmp_path/'people'

@pytest.fixture
def store(path):
    res = Store('a model')
    res.add(embs(4), frame(*'abcd', pid=[1,2,None,4]))
    res.save(path)
    res.add(embs(2, 1), frame('e', 'f', cam=['door','hall']))
    res.remove([1])
    res.save()
    return res

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_fifty_kills(tmp_path):
    "kill -9 at random moments: what was saved is there, whole, and nothing heavy was imported for it"
    run = subprocess.run([sys.executable, Path(__file__).parent/'kill_gallery.py', tmp_path/'killed', '50'], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'})
    assert run.returncode==0, run.stderr[-2000:]
    res = json.loads(run.stdout)
    print(res)
    assert res['kills']==50 and res['heavy']==[] and res['inside']>=10 and res['entries']>0

class Crash(BaseException): pass

@pytest.mark.parametrize('first', [True,False])
def test_a_crash_at_every_step(path, tmp_path, monkeypatch, first):
    "Stop before the first, second, … touch of the file system: on disk is the state before or the state after, and the next save goes through"
    base = Store('a model')
    base.add(embs(5), frame(*'abcde'))
    if not first: base.save(path)
    before,n = {} if first else held(base),0
    while True:
        n,left = n+1,[n]
        def counted(f):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0]<=0: raise Crash # and so does all that follows
                return f(*args, **kwargs)
            return call
        place = tmp_path/f'try-{n}'
        if not first: subprocess.run(['cp','-r',path,place], check=True)
        s = Store('a model') if first else Store.load(place)
        if first: s.add(embs(5), frame(*'abcde'))
        s.add(embs(6, 2), frame(*'fghijk'))
        s.remove([0])
        after = held(s)
        with monkeypatch.context() as m:
            for o in ('fsync','replace','rmdir','unlink'): m.setattr(os, o, counted(getattr(os, o)))
            m.setattr(Path, 'unlink', counted(Path.unlink))
            try:
                s.save(place)
                done = True
            except Crash: done = False
        found = held(Store.load(place)) if (place/'gallery.json').exists() else {}
        assert found in (before,after), n
        if done: break
        again = Store.load(place) if (place/'gallery.json').exists() else Store('a model')
        again.add(embs(1, 3), frame('z'))
        again.save(place)
        assert held(Store.load(place))=={**found, **{'z':embs(1, 3)[0].tolist()}}
        assert {o.name for o in place.iterdir()}=={f[0] for o in again.segments for f in o.files}|{'gallery.json'}
    assert n>5 and found==after

def test_saved_and_loaded(store, path):
    again = Store.load(path)
    pd.testing.assert_frame_equal(again.table, store.table)
    assert held(again)==held(store) and list(held(again))==list('acdef') and len(again)==5
    assert again.table.pid.tolist()[0]==1 and again.table.cam.isna().sum()==3

def test_many_small_saves_make_few_segments(path):
    s = Store('a model')
    for i in range(70):
        s.add(embs(1, i), frame(f'k{i}'))
        s.save(path)
    assert len(s.segments)<=7 and len(list(path.iterdir()))==2*len(s.segments)+1
    assert held(Store.load(path))=={f'k{i}':embs(1, i)[0].tolist() for i in range(70)}

def test_old_files_are_not_touched(path):
    s = Store('a model')
    s.add(embs(100), frame(*map(str, range(100))))
    s.save(path)
    kept = {o:(o.read_bytes(),o.stat().st_mtime_ns) for o in path.glob('0*')}
    s.add(embs(3, 1), frame(*'abc'))
    s.remove([5])
    s.save()
    assert kept=={o:(o.read_bytes(),o.stat().st_mtime_ns) for o in kept}
    s.remove(range(60))
    s.save()
    assert not any(o.exists() for o in kept) and list(held(Store.load(path)))==[*map(str, range(60,100)),*'abc']

def test_everything_removed(store, path):
    store.remove(range(9))
    store.save()
    again = Store.load(path)
    assert len(again)==0 and len(again.table)==0 and [o.name for o in path.iterdir()]==['gallery.json']
    assert again.add(embs(1), frame('a')).tolist()==[6]

def test_emptied_and_filled_again(store, path):
    "A segment whose rows are all gone, and a whole block that is, go into the next"
    store.remove(range(6))
    store.add(embs(1, 3), frame('x'))
    store.save()
    assert held(Store.load(path))=={'x':embs(1, 3)[0].tolist()}
    store.add(embs(9000, 4), frame(*(f'n{i}' for i in range(9000))))
    store.remove(range(7, 7+4096))
    store.save()
    assert len(held(Store.load(path)))==1+9000-4096 and held(Store.load(path))==held(store)

def test_half_precision(path):
    s = Store('a model', dtype='float16')
    s.add(embs(4), frame(*'abcd'))
    s.save(path)
    again = Store.load(path)
    assert again.segments[0].embs.dtype==np.float16 and np.allclose(again.segments[0].embs, embs(4), atol=2e-3)
    with pytest.raises(ValueError, match="'float32' or 'float16'"): Store('a model', dtype='int8')

def test_written_in_blocks_equals_safetensors(tmp_path):
    from safetensors.numpy import load_file, save_file
    x,ids = embs(50),np.arange(50)*3
    name,n,crc = write_embeddings(tmp_path/'a.safetensors', ids, [x[:7],x[7:8],x[8:]], 6, 'float32')
    assert (tmp_path/name).stat().st_size==n
    theirs = load_file(tmp_path/name)
    assert np.array_equal(theirs['embeddings'], x) and np.array_equal(theirs['ids'], ids)
    save_file(dict(embeddings=x, ids=ids), tmp_path/'b.safetensors')
    ours = read_embeddings(tmp_path/'b.safetensors')
    assert np.array_equal(ours[0], ids) and np.array_equal(ours[1], x)

@pytest.mark.parametrize('harm,why', [('cut','has .* bytes and had'),('bit','checksum is wrong'),('empty','has 0 bytes')])
@pytest.mark.parametrize('ext', ['safetensors','parquet'])
def test_damaged_segments(store, path, ext, harm, why):
    victim = sorted(path.glob(f'*.{ext}'))[0]
    data = bytearray(victim.read_bytes())
    data[len(data)//2] ^= 4
    victim.write_bytes({'cut':data[:-9], 'bit':data, 'empty':b''}[harm])
    with pytest.raises(ValueError, match=f'{victim.name} is damaged: .*{why}'): Store.load(path)

@pytest.mark.parametrize('text', ['', '{', '[]', '{"format": "gallery 1"}', 'null'])
def test_damaged_manifest(store, path, text):
    (path/'gallery.json').write_text(text)
    with pytest.raises(ValueError, match='gallery.json is damaged'): Store.load(path)

def test_tampered_manifest(store, path):
    file = path/'gallery.json'
    file.write_text(file.read_text().replace('a model', 'b model'))
    with pytest.raises(ValueError, match='checksum'): Store.load(path)

def test_a_file_that_vanished(store, path):
    victim = sorted(path.glob('*.parquet'))[0]
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=f'not whole: {victim.name} is missing'): Store.load(path)

def test_no_gallery_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no gallery'): Store.load(tmp_path)
    with pytest.raises(ValueError, match='never saved'): Store('a model').save()

def test_a_newer_format(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, '_format', 'gallery 2')
    store.save(tmp_path/'new')
    monkeypatch.undo()
    with pytest.raises(ValueError, match="'gallery 2'"): Store.load(tmp_path/'new')
    (tmp_path/'new'/'gallery.json').write_text('{"format": "gallery 3", "sha256": "of a newer kind"}')
    with pytest.raises(ValueError, match="'gallery 3'.*use a newer pyramidreid"): Store.load(tmp_path/'new')

def test_two_writers(store, path):
    other = Store.load(path)
    other.add(embs(1), frame('x'))
    other.save()
    store.add(embs(1), frame('y'))
    with pytest.raises(RuntimeError, match='changed by another process'): store.save()
    assert list(held(Store.load(path)))==list('acdefx')

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_three_writers_and_two_readers(path, tmp_path):
    "At the same time: each entry of which a writer was told that it is saved is there, and whoever reads sees a whole gallery that only grows"
    first = Store('a model')
    first.add(embs(1), frame('first'))
    first.save(path)
    writer = """
import sys
import numpy as np, pandas as pd
from pyramidreid.gallery.store import Store
from pyramidreid.gallery import store as module
import time
path,me = sys.argv[1:]
real = module._write_manifest
module._write_manifest = lambda *args: (time.sleep(.01), real(*args)) # time for the others to come in between
n = 0
while n<12:
    s = Store.load(path)
    s.add(np.ones((1,6), np.float32), pd.DataFrame(dict(key=[f'{me}-{n}'])))
    try: s.save()
    except RuntimeError as e:
        assert 'changed by another process' in str(e)
        continue
    n += 1
"""
    reader = """
import sys
from pyramidreid.gallery.store import Store
seen = set()
while len(seen)<37:
    keys = set(Store.load(sys.argv[1]).table.key)
    assert seen<=keys
    seen = keys
"""
    jobs = [subprocess.Popen([sys.executable, '-c', code, path, str(i)], stderr=subprocess.PIPE, text=True) for i,code in enumerate([writer]*3+[reader]*2)]
    try:
        for i,o in enumerate(jobs):
            _,err = o.communicate(timeout=120)
            assert o.returncode==0, (i, err)
    finally:
        for o in jobs: o.kill()
    assert set(held(Store.load(path)))=={'first'}|{f'{i}-{n}' for i in range(3) for n in range(12)}

def test_not_over_another_gallery(store, path):
    new = Store('a model')
    new.add(embs(1), frame('x'))
    with pytest.raises(FileExistsError, match='holds a gallery already'): new.save(path)

def test_saved_to_a_second_folder(store, path, tmp_path):
    store.save(tmp_path/'copy')
    assert held(Store.load(tmp_path/'copy'))==held(Store.load(path))
    store.add(embs(1), frame('x'))
    store.save()
    assert 'x' in held(Store.load(tmp_path/'copy')) and 'x' not in held(Store.load(path))

def test_the_folder_was_deleted(store, path):
    "What is mapped into memory is still there, and is written anew"
    import shutil
    want = held(store)
    shutil.rmtree(path)
    store.save()
    assert held(Store.load(path))==want

def test_a_reader_while_another_saves(store, path, monkeypatch):
    "The old segments go between reading the manifest and the files: the new manifest is read"
    real,calls = module.read_manifest,[]
    def slow(p):
        res = real(p)
        if not calls:
            calls.append(1)
            store.add(embs(20), frame(*(f'n{i}' for i in range(20))))
            store.save()
        return res
    monkeypatch.setattr(module, 'read_manifest', slow)
    assert len(Store.load(path))==25

def test_a_full_disk(store, path, monkeypatch):
    before,listing = held(Store.load(path)),sorted(path.iterdir())
    store.add(embs(2), frame('x','y'))
    def full(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        with pytest.raises(OSError, match='No space left'): store.save()
    assert held(Store.load(path))==before and sorted(path.iterdir())==listing
    store.save()
    assert set(held(Store.load(path)))==set('acdefxy')

@pytest.mark.parametrize('victim', ['write_table','write_embeddings','_write_manifest','measured','whole_file'])
@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'),KeyboardInterrupt()])
def test_a_save_that_fails_leaves_nothing(store, path, monkeypatch, victim, error):
    "Not even whole files that nobody lists; and the next save goes through"
    store.index = dict(file=None, note={}, write=lambda f: f.write_bytes(b'an index'))
    store.save()
    before,listing = held(store),sorted(path.iterdir())
    store.index['file'] = None
    store.add(embs(2), frame('x','y'))
    def full(*args): raise error
    with monkeypatch.context() as m:
        m.setattr(module, victim, full)
        with pytest.raises(type(error)): store.save()
    assert sorted(path.iterdir())==listing and held(Store.load(path))==before
    store.save()
    again = Store.load(path)
    assert set(held(again))==set('acdefxy') and again.index['file'][0]=='000004.faiss' and (path/'000004.faiss').read_bytes()==b'an index'

def test_interrupted_when_all_was_written(store, path, monkeypatch):
    "The manifest lies there already: then this was a save, and the next one goes through"
    real = module._write_manifest
    def late(*args):
        real(*args)
        raise KeyboardInterrupt
    store.add(embs(2), frame('x','y'))
    with monkeypatch.context() as m:
        m.setattr(module, '_write_manifest', late)
        with pytest.raises(KeyboardInterrupt): store.save()
    assert set(held(Store.load(path)))==set('acdefxy')
    store.add(embs(1, 5), frame('z'))
    store.save()
    assert held(Store.load(path))==held(store)

def test_files_that_may_not_grow(tmp_path):
    "As on a full disk, but from the system itself: an error, and all that was saved is there"
    code = """
import resource,signal,sys
import numpy as np, pandas as pd
from pyramidreid.gallery.store import Store
s = Store('a model')
x = np.random.default_rng(0).standard_normal((5000,8)).astype(np.float32)
s.add(x[:10], pd.DataFrame(dict(key=[str(i) for i in range(10)])))
s.save(sys.argv[1])
s.add(x[10:], pd.DataFrame(dict(key=[str(i) for i in range(10, 5000)])))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try: s.save()
except OSError as e: print(type(e).__name__)
print(len(Store.load(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
s.save()
print(len(Store.load(sys.argv[1])))
"""
    pytest.importorskip('resource')
    run = subprocess.run([sys.executable, '-c', code, tmp_path/'g'], capture_output=True, text=True)
    assert run.stdout.split()==['OSError','10','5000'], run.stderr

def test_the_manifest_went_while_the_gallery_was_open(store, path):
    "What is in memory is written anew, but not over files that somebody else wrote"
    want = held(store)
    (path/'gallery.json').unlink()
    store.save()
    assert held(Store.load(path))==want
    (path/'gallery.json').unlink()
    (path/'000009.parquet').write_text('of another')
    with pytest.raises(FileExistsError, match='holds 000009.parquet'): store.save()

@pytest.mark.parametrize('harm', ['cut','flip'])
def test_no_byte_can_go_unnoticed(store, path, harm):
    "Every file cut at every length, every bit of every byte turned over: an error that says what is damaged"
    want = held(Store.load(path))
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for i in range(0, len(data), 1 if len(data)<600 else 29):
            bad = data[:i] if harm=='cut' else data[:i]+bytes([data[i]^(1<<i%8)])+data[i+1:]
            file.write_bytes(bad)
            try: found = held(Store.load(path))
            except ValueError as e: assert f'{file.name} ' in str(e) and ('damaged' in str(e) or "has the format 'gallery " in str(e)), (file.name, i, e)
            else: assert found==want and json.loads(bad)==json.loads(data), (file.name, i)
        file.write_bytes(data)
    assert held(Store.load(path))==want

@pytest.mark.parametrize('ext', ['safetensors','parquet'])
def test_damage_without_checksums(store, path, ext):
    "`check=False` looks at the lengths alone; what cannot be read is still said to be damaged"
    victim,whole = sorted(path.glob(f'*.{ext}'))[0],Store.load(path)
    data = victim.read_bytes()
    for i in [*range(0, min(len(data), 200)),len(data)-1,len(data)-5,len(data)-9]:
        victim.write_bytes(data[:i]+bytes([data[i]^0x55])+data[i+1:])
        try: found = Store.load(path, check=False)
        except ValueError as e: assert f'{victim.name} is damaged' in str(e), (i, e)
        else: assert len(found)==len(whole)

def test_a_folder_behind_links(store, path, tmp_path):
    link = tmp_path/'link'
    link.symlink_to(path)
    other = Store.load(link)
    other.add(embs(1), frame('x'))
    other.save(path)
    assert other.save(link) is None and 'x' in held(Store.load(link)) and link.is_symlink()
    dead = tmp_path/'dead'
    dead.symlink_to(tmp_path/'gone')
    with pytest.raises(FileNotFoundError, match='dead is a link to .*gone'): other.save(dead)

@pytest.mark.skipif(not hasattr(os, 'geteuid'), reason='needs Unix')
def test_a_folder_that_cannot_be_written(store, path, monkeypatch):
    store.add(embs(1), frame('x'))
    listing = sorted(path.iterdir())
    monkeypatch.setattr(os, 'access', lambda *args: False) # root may write everywhere
    with pytest.raises(PermissionError, match='cannot be written'): store.save()
    assert sorted(path.iterdir())==listing

def test_notes_are_as_json_gives_them_back(path):
    s = Store('a model', notes={10:1, 2:(1,2)})
    s.save(path)
    assert Store.load(path).notes=={'10':1,'2':[1,2]}

def test_other_files_stay(store, path):
    (path/'notes.txt').write_text('mine')
    store.add(embs(9), frame(*'ghijklmno'))
    store.save()
    assert (path/'notes.txt').read_text()=='mine'

@pytest.mark.parametrize('values,kind', [(['a',1],'mixed-integer'),([[1],[2]],'mixed'),([b'a',b'b'],'bytes')])
def test_columns_that_cannot_be_kept(values, kind):
    with pytest.raises(ValueError, match=f"'note' holds values of the kind '{kind}'"): Store('a model').add(embs(2), frame('a','b', note=values))

def test_columns_keep_their_kind(store):
    with pytest.raises(ValueError, match="'pid' held number until now, and here it holds text"): store.add(embs(1), frame('x', pid=['ann']))
    assert len(store)==5

def test_kinds_survive(path):
    s = Store('a model')
    s.add(embs(2), frame('a','b', pid=[1,None], ok=[True,False], score=[.5,None], at=pd.to_datetime(['2026-11-23 08:00+01:00',None], utc=True), who=pd.Categorical(['x','y'])))
    s.save(path)
    pd.testing.assert_frame_equal(Store.load(path).table, s.table)
    with pytest.raises(ValueError, match="'at' held time with zone"): s.add(embs(1), frame('c', at=pd.to_datetime(['2026-11-23'])))

def test_without_the_extra(store, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    store.add(embs(1), frame('x'))
    with pytest.raises(ImportError, match=r'pyramidreid\[gallery\]'): store.save()

# what lies in the folder

def test_entries_whose_manifest_is_lost_are_not_saved_over(tmp_path):
    path = tmp_path/'g'
    first = Store('a model')
    first.add(np.eye(3, dtype=np.float32), pd.DataFrame(dict(key=list('abc'))))
    first.save(path)
    manifest = (path/'gallery.json').read_bytes()
    (path/'gallery.json').unlink()
    names = sorted(o.name for o in path.iterdir())
    second = Store('a model')
    second.add(np.eye(3, dtype=np.float32)[:1], pd.DataFrame(dict(key=['x'])))
    with pytest.raises(FileExistsError, match='holds 000001.* and no gallery.json'): second.save(path)
    assert sorted(o.name for o in path.iterdir())==names
    (path/'gallery.json').write_bytes(manifest)
    assert Store.load(path).table.key.tolist()==list('abc')

def test_files_of_others_stay(tmp_path):
    path = tmp_path/'g'
    store = Store('a model')
    store.add(np.eye(3, dtype=np.float32), pd.DataFrame(dict(key=list('abc'))))
    store.save(path)
    for name in ('20261123.parquet','notes.parquet','000009.safetensors'): (path/name).write_text('mine')
    store.add(np.eye(3, dtype=np.float32), pd.DataFrame(dict(key=list('def'))))
    store.save()
    for name in ('20261123.parquet','notes.parquet','000009.safetensors'): assert (path/name).read_text()=='mine'
    assert len(list(path.glob('00000[0-8].*')))==2

def test_a_first_save_that_died(tmp_path, monkeypatch):
    "Whoever comes next begins again in the same folder, and what was left goes"
    path = tmp_path/'g'
    def one():
        res = Store('a model')
        res.add(np.eye(3, dtype=np.float32), pd.DataFrame(dict(key=list('abc'))))
        return res
    with monkeypatch.context() as m:
        def dies(*args): raise KeyboardInterrupt
        m.setattr(module, 'write_table', dies)
        m.setattr(module, '_clean', lambda *args: None) # the dead remove nothing
        with pytest.raises(KeyboardInterrupt): one().save(path)
    assert len(Store.load(path))==0 and (path/'000001.safetensors').exists()
    one().save(path)
    assert Store.load(path).table.key.tolist()==list('abc') and len(list(path.iterdir()))==3

def test_a_file_is_no_folder(tmp_path):
    (tmp_path/'g').write_text('')
    with pytest.raises(NotADirectoryError, match='a gallery is a folder'): Store('a model').save(tmp_path/'g')

# Power that fails

class Disk:
    "The worst a disk may hold if the power fails now: a file that was not flushed is empty, and of the names given and taken since a folder was flushed it knows none, all, or either kind"
    def __init__(self, root, vault):
        self.root,self.vault,self.names,self.bytes = root,vault,{},{}
        self.real = {o:getattr(os, o) for o in ('fsync','replace','unlink','rmdir','mkdir')}
        for d in [root,*(o for o in root.rglob('*') if o.is_dir())]: self.flushed(d)
        for f in root.rglob('*'): self.flushed(f)

    def listing(self, folder): return {o.name:o.stat().st_ino for o in folder.iterdir()} if folder.exists() else {}
    def flushed(self, o):
        if o.is_dir(): self.names[o] = self.listing(o)
        elif o.is_file():
            ino = o.stat().st_ino
            if not (self.vault/str(ino)).exists(): os.link(o, self.vault/str(ino)) # or its number would be given again
            self.bytes[ino] = o.read_bytes()

    def states(self, folder):
        "What `folder` may hold, name by name, once for each guess"
        if folder.name not in self.names[folder.parent]: yield {} # nobody has heard of it
        known,now = self.names.get(folder, {}),self.listing(folder)
        for names in (known, now, {k:v for k,v in known.items() if k in now}, {**known, **now}):
            res = {}
            for k,i in names.items():
                whole = self.bytes.get(i)
                if whole is not None and (self.vault/str(i)).read_bytes()!=whole: whole = b'' # written over
                if not k.startswith('.partial-'): res[k] = whole or b''
            yield res

    def watched(self, monkeypatch, before):
        "Call `before()` ahead of each touch of the file system, and learn from each flush"
        def fsync(fd):
            before()
            self.real['fsync'](fd)
            self.flushed(Path(os.readlink(f'/proc/self/fd/{fd}')))
        monkeypatch.setattr(os, 'fsync', fsync)
        for name in ('replace','unlink','rmdir','mkdir'):
            def call(*args, _real=self.real[name], **kwargs):
                before()
                return _real(*args, **kwargs)
            monkeypatch.setattr(os, name, call)

@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='needs Linux')
@pytest.mark.parametrize('first', [True,False])
def test_the_power_fails(tmp_path, monkeypatch, first):
    "Ahead of every step of a save: the state before or the state after; once it returned, the state after"
    root,path = tmp_path/'root',tmp_path/'root'/'people'
    for o in (root,tmp_path/'vault'): o.mkdir()
    s = Store('a model')
    s.add(embs(5), frame(*'abcde'))
    if not first:
        s.save(path)
        s.add(embs(4, 1), frame(*'uvwx'))
        s.save()
    before = {} if first else held(s)
    s.add(embs(6, 2), frame(*'fghijk'))
    s.remove([0])
    after,disk,seen = held(s),Disk(root, tmp_path/'vault'),[]
    def look(*wanted):
        for files in disk.states(path):
            if files in seen: continue
            place = tmp_path/f'state-{len(seen)}'
            seen.append(files)
            disk.real['mkdir'](place)
            for k,v in files.items(): (place/k).write_bytes(v)
            found = held(Store.load(place)) if 'gallery.json' in files else {}
            assert found in wanted, (sorted(files), list(found))
    with monkeypatch.context() as m:
        disk.watched(m, lambda: look(before, after))
        s.save(path)
    seen.clear()
    for i in tmp_path.glob('state-*'): i.rename(tmp_path/f'old-{i.name}')
    look(after)
