"Galleries on disk: crashes, power failures, damage, and several processes at once"
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip('pyarrow', reason='needs the extra gallery')

from pyramidreid.core import ReIDWarning, partial_folder
from pyramidreid.gallery import store as module
from pyramidreid.gallery.store import Store, file_record, read_embeddings, read_manifest, write_embeddings


def embs(n, seed=0): return np.random.default_rng(seed).standard_normal((n,6)).astype(np.float32)
def frame(keys, **columns): return pd.DataFrame(dict(key=list(keys), **columns))

def content(store):
    "Embedding of each entry by its key"
    rows = [row for s in store.segments for row in zip(s.table.key, s.embs, s.gone)]
    return {key:emb.tolist() for key,emb,gone in rows if not gone}

def content_of(path): return content(Store.load(path)) if (path/'gallery.json').exists() else {}

def new_store(keys='', **kwargs):
    res = Store('a model', **kwargs)
    if keys: res.add(embs(len(keys)), frame(keys))
    return res

def numbered(prefix, n): return [f'{prefix}{i}' for i in range(n)]
def disk_full(*args): raise OSError(28, 'No space left on device')

def listed_files(store):
    "Names of the files that a saved gallery consists of"
    index = [store.index['file'][0]] if store.index else []
    return {record[0] for s in store.segments for record in s.files} | {'gallery.json','gallery.lock',*index}

@pytest.fixture
def path(tmp_path): return tmp_path/'people'

@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    "A save removes stale files at once, and not the first save after a minute"
    monkeypatch.setattr(module, '_STALE_SECONDS', 0)

@pytest.fixture
def store(path):
    "Saved twice: abcd, then without b and with e and f"
    res = Store('a model')
    res.add(embs(4), frame('abcd', pid=[1,2,None,4]))
    res.save(path)
    res.add(embs(2, 1), frame('ef', cam=['door','hall']))
    res.remove([1])
    res.save()
    return res

# Killed and interrupted

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_fifty_kills(tmp_path):
    "kill -9 at random moments: whatever was saved is there, and nothing heavy was imported"
    command = [sys.executable, Path(__file__).parent/'kill_gallery.py', tmp_path/'killed', '50']
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'})
    assert run.returncode==0, run.stderr[-2000:]
    res = json.loads(run.stdout)
    print(res)
    assert res['kills']==50
    assert res['heavy']==[]
    assert res['inside']>=10
    assert res['entries']>0

class Crash(BaseException): pass

def crash_at(monkeypatch, n):
    "From the `n`-th operation of the file system on, each raises `Crash`"
    remaining = n
    def counted(f):
        def call(*args, **kwargs):
            nonlocal remaining
            remaining -= 1
            if remaining<=0: raise Crash
            return f(*args, **kwargs)
        return call
    for name in ('fsync','replace','rmdir','unlink'): monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, 'unlink', counted(Path.unlink))

def check_next_save(path, before):
    "After a crash, the next save goes through and leaves no stale files"
    again = Store.load(path) if (path/'gallery.json').exists() else new_store()
    again.add(embs(1, 3), frame('z'))
    again.save(path)
    assert content_of(path)=={**before, 'z':embs(1, 3)[0].tolist()}
    assert {o.name for o in path.iterdir()}==listed_files(again)

@pytest.mark.parametrize('first', [True,False])
def test_a_crash_at_every_step(path, tmp_path, monkeypatch, first):
    "Stop before the first, second, … operation: on disk is the state before or after, and the next save goes through"
    if not first: new_store('abcde').save(path)
    before,n,finished = content_of(path),0,False
    while not finished:
        n += 1
        folder = tmp_path/f'try-{n}'
        if not first: shutil.copytree(path, folder)
        s = new_store('abcde') if first else Store.load(folder)
        s.add(embs(6, 2), frame('fghijk'))
        s.remove([0])
        after = content(s)
        with monkeypatch.context() as m:
            crash_at(m, n)
            try:
                s.save(folder)
                finished = True
            except Crash: pass
        found = content_of(folder)
        assert found in (before,after), n
        if not finished: check_next_save(folder, found)
    assert n>5
    assert found==after

@pytest.mark.parametrize('victim', ['_write_table','write_embeddings','_write_manifest','file_record','atomic_write'])
@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'),KeyboardInterrupt()])
def test_a_failed_save_leaves_nothing(store, path, monkeypatch, victim, error):
    "Not even complete files that no manifest lists; and the next save goes through"
    store.index = dict(file=None, note={}, write=lambda f: f.write_bytes(b'an index'))
    store.save()
    before,files = content(store),sorted(path.iterdir())
    store.index['file'] = None
    store.add(embs(2), frame('xy'))
    def fail(*args): raise error
    with monkeypatch.context() as m:
        m.setattr(module, victim, fail)
        with pytest.raises(type(error)): store.save()
    assert sorted(path.iterdir())==files
    assert content_of(path)==before
    store.save()
    again = Store.load(path)
    assert set(content(again))==set('acdefxy')
    assert again.index['file'][0].startswith('000004-')
    assert (path/again.index['file'][0]).read_bytes()==b'an index'

def test_interrupted_after_the_manifest(store, path, monkeypatch):
    "Then the save is complete, and the next one goes through"
    real = module._write_manifest
    def write_and_interrupt(*args):
        real(*args)
        raise KeyboardInterrupt
    store.add(embs(2), frame('xy'))
    with monkeypatch.context() as m:
        m.setattr(module, '_write_manifest', write_and_interrupt)
        with pytest.raises(KeyboardInterrupt): store.save()
    assert set(content_of(path))==set('acdefxy')
    store.add(embs(1, 5), frame('z'))
    store.save()
    assert content_of(path)==content(store)

def test_a_first_save_that_died(path, monkeypatch):
    "The next save starts again in the same folder, and removes what was left"
    def die(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(module, '_write_table', die)
        m.setattr(module, '_remove_named', lambda *args: None) # A killed process removes nothing
        with pytest.raises(KeyboardInterrupt): new_store('abc').save(path)
    assert len(Store.load(path))==0
    assert len(list(path.glob('000001-*.safetensors')))==1
    new_store('abc').save(path)
    assert list(content_of(path))==list('abc')
    assert len(list(path.iterdir()))==4

def test_a_full_disk(store, path, monkeypatch):
    before,files = content_of(path),sorted(path.iterdir())
    store.add(embs(2), frame('xy'))
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', disk_full)
        with pytest.raises(OSError, match='No space left'): store.save()
    assert content_of(path)==before
    assert sorted(path.iterdir())==files
    store.save()
    assert set(content_of(path))==set('acdefxy')

def test_files_that_may_not_grow(tmp_path):
    "As on a full disk, but from the operating system: an error, and all that was saved is there"
    pytest.importorskip('resource')
    code = """
import resource,sys
import numpy as np, pandas as pd
from pyramidreid.gallery.store import Store

def limit(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
def frame(start, end): return pd.DataFrame(dict(key=[str(i) for i in range(start, end)]))
x = np.random.default_rng(0).standard_normal((5000,8)).astype(np.float32)
store = Store('a model')
store.add(x[:10], frame(0, 10))
store.save(sys.argv[1])
store.add(x[10:], frame(10, 5000))
limit(100_000)
try: store.save()
except OSError as e: print(type(e).__name__)
print(len(Store.load(sys.argv[1])))
limit(resource.RLIM_INFINITY)
store.save()
print(len(Store.load(sys.argv[1])))
"""
    run = subprocess.run([sys.executable, '-c', code, tmp_path/'g'], capture_output=True, text=True)
    assert run.stdout.split()==['OSError','10','5000'], run.stderr

# Power failures

class Disk:
    """The worst a disk may hold if the power fails now: a file that was not flushed is empty, and of the changes
    to a folder since it was flushed the disk knows none, all, or only one kind"""
    def __init__(self, root, vault):
        self.root,self.vault,self.names,self.bytes = root,vault,{},{}
        self.real = {name:getattr(os, name) for name in ('fsync','replace','unlink','rmdir','mkdir')}
        everything = list(root.rglob('*'))
        for folder in [root,*(o for o in everything if o.is_dir())]: self.flushed(folder)
        for file in everything: self.flushed(file)

    def inodes(self, folder): return {o.name:o.stat().st_ino for o in folder.iterdir()} if folder.exists() else {}

    def flushed(self, o):
        "Note what the disk holds for sure"
        if o.is_dir(): self.names[o] = self.inodes(o)
        elif o.is_file():
            inode = o.stat().st_ino
            kept = self.vault/str(inode)
            if not kept.exists(): os.link(o, kept) # A deleted file's inode would be reused
            self.bytes[inode] = o.read_bytes()

    def file_content(self, inode):
        "Content of a file on disk: as it was flushed, or nothing"
        flushed = self.bytes.get(inode)
        if flushed is None or (self.vault/str(inode)).read_bytes()!=flushed: return b''
        return flushed

    def states(self, folder):
        "What `folder` may hold, `{name: content}`, once for each possibility"
        if folder.name not in self.names[folder.parent]: yield {} # Its own creation was not flushed
        old,new = self.names.get(folder, {}),self.inodes(folder)
        only_deletions = {k:v for k,v in old.items() if k in new}
        only_creations = {**old, **new}
        for names in (old, new, only_deletions, only_creations):
            yield {name:self.file_content(i) for name,i in names.items() if not name.startswith('.partial-')}

    def watch(self, monkeypatch, before):
        "Call `before()` ahead of each operation of the file system, and learn from each flush"
        def fsync(fd):
            before()
            self.real['fsync'](fd)
            self.flushed(Path(os.readlink(f'/proc/self/fd/{fd}')))
        def watched(f):
            def call(*args, **kwargs):
                before()
                return f(*args, **kwargs)
            return call
        monkeypatch.setattr(os, 'fsync', fsync)
        for name in ('replace','unlink','rmdir','mkdir'): monkeypatch.setattr(os, name, watched(self.real[name]))

@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='needs Linux')
@pytest.mark.parametrize('first', [True,False])
def test_the_power_fails(tmp_path, monkeypatch, first):
    "Ahead of every step of a save: the state before or after; once it returned, the state after"
    root,path,vault = tmp_path/'root',tmp_path/'root'/'people',tmp_path/'vault'
    root.mkdir()
    vault.mkdir()
    s = new_store('abcde')
    if not first:
        s.save(path)
        s.add(embs(4, 1), frame('uvwx'))
        s.save()
    before = {} if first else content(s)
    s.add(embs(6, 2), frame('fghijk'))
    s.remove([0])
    after,disk,n_states = content(s),Disk(root, vault),0

    def check_states(seen, *expected):
        nonlocal n_states
        for files in disk.states(path):
            if files in seen: continue
            seen.append(files)
            folder = tmp_path/f'state-{n_states}'
            n_states += 1
            disk.real['mkdir'](folder)
            for name,data in files.items(): (folder/name).write_bytes(data)
            found = content_of(folder)
            assert found in expected, (sorted(files), list(found))

    seen = []
    with monkeypatch.context() as m:
        disk.watch(m, lambda: check_states(seen, before, after))
        s.save(path)
    assert n_states>3
    check_states([], after)

# What is saved

def test_saved_and_loaded(store, path):
    again = Store.load(path)
    pd.testing.assert_frame_equal(again.table, store.table)
    assert content(again)==content(store)
    assert list(content(again))==list('acdef')
    assert len(again)==5
    assert again.table.pid.tolist()[0]==1
    assert again.table.cam.isna().sum()==3

def test_many_small_saves_make_few_segments(path):
    s = Store('a model')
    for i in range(70):
        s.add(embs(1, i), frame([f'k{i}']))
        s.save(path)
    assert len(s.segments)<=7
    assert len(list(path.iterdir()))==2*len(s.segments)+2
    assert content_of(path)=={f'k{i}':embs(1, i)[0].tolist() for i in range(70)}

def test_entries_one_by_one_are_one_segment_in_memory(path):
    "Not an array and a table for each, over which every search would loop"
    s,names = Store('a model'),numbered('k', 300)
    for i,name in enumerate(names):
        s.add(embs(1, i), frame([name], pid=i) if i%2 else frame([name], cam='door'))
    assert len(s.segments)==1
    assert content(s)=={name:embs(1, i)[0].tolist() for i,name in enumerate(names)}
    table = s.table
    assert table.index.tolist()==list(range(300))
    assert table.pid[1::2].tolist()==list(range(1, 300, 2)) and table.pid[::2].isna().all()
    assert table.cam[::2].eq('door').all() and table.cam[1::2].isna().all()
    s.save(path)
    pd.testing.assert_frame_equal(Store.load(path).table, table, check_dtype=False)

def test_the_joins_of_small_tables_copy_few_rows(monkeypatch):
    copied,join = [],module._concat_tables
    def counting_join(tables):
        copied.append(sum(map(len, tables)))
        return join(tables)
    monkeypatch.setattr(module, '_concat_tables', counting_join)
    s = Store('a model')
    for i in range(2000): s.add(embs(1, i), frame([str(i)]))
    assert len(s.table)==2000
    assert sum(copied)<=4*2000

def test_a_segment_in_memory_has_an_end(monkeypatch, path):
    monkeypatch.setattr(module, '_SEGMENT_ROWS', 10)
    s = Store('a model')
    for i in range(7): s.add(embs(3, i), frame(numbered(f'{i}-', 3)))
    assert [len(o.ids) for o in s.segments]==[9,9,3]
    s.add(embs(30, 7), frame(numbered('many', 30)))
    s.add(embs(1, 8), frame('x'))
    assert [len(o.ids) for o in s.segments]==[9,9,3,30,1]
    before = content(s)
    s.save(path)
    assert content(s)==content_of(path)==before and len(before)==21+30+1

def test_a_saved_segment_is_not_extended(store, path):
    "Its arrays are files"
    store.add(embs(1, 7), frame('x'))
    assert [s.files is None for s in store.segments]==[False,False,True]
    store.add(embs(1, 8), frame('y'))
    assert len(store.segments)==3 and list(content(store))==list('acdefxy')

def test_an_entry_replaced_again_and_again_leaves_no_rows():
    s = new_store('ab')
    for i in range(500): # `a` is always the oldest but one
        s.remove(s.table.index[-1:])
        s.add(embs(1, i), frame('b', pid=i))
    assert sum(len(o.ids) for o in s.segments)<=6
    assert s.table.key.tolist()==['a','b'] and s.table.pid.tolist()[1]==499
    assert s.table.index[-1]==501

def test_an_emptied_store_may_have_other_kinds_of_columns():
    s = Store('a model')
    s.add(embs(2), frame('ab', pid=[1,2], time=pd.to_datetime(['2026-11-23 08:00']*2)))
    s.remove([0,1])
    s.add(embs(1), frame('c', pid='ann', time=pd.to_datetime(['2026-11-23 08:00+01:00'])))
    assert s.kinds==dict(key='text', pid='text', time='time with zone')
    assert s.table.pid.tolist()==['ann'] and s.table.time.dt.tz is not None

@pytest.mark.parametrize('seed', range(5))
def test_a_random_life_in_small_segments(monkeypatch, path, seed):
    "Adds of every size, removals, saves and loads beside a dict"
    monkeypatch.setattr(module, '_SEGMENT_ROWS', 8)
    rng = np.random.default_rng(seed)
    s,expected = Store('a model'),{}
    for step in range(120):
        action = rng.choice(['add','add one','add one','remove','remove one','save','load'])
        if action.startswith('add'):
            n = 1 if action=='add one' else int(rng.integers(1, 12))
            keys = numbered(f'{step}-', n)
            s.add(embs(n, step), frame(keys, pid=step))
            expected.update(zip(keys, embs(n, step).tolist()))
        elif action.startswith('remove') and expected:
            n = 1 if action=='remove one' else int(rng.integers(1, len(expected)+1))
            ids = rng.choice(s.table.index, n, replace=False)
            for key in s.table.key[ids]: del expected[key]
            s.remove(ids)
        elif action=='save': s.save(path)
        elif action=='load' and s.path:
            s.save()
            s = Store.load(path)
        assert content(s)==expected and list(content(s))==list(expected)
        assert s.table.key.tolist()==list(expected) and len(s)==len(expected)
        assert s.table.index.is_monotonic_increasing

def test_old_files_do_not_change(path):
    s = Store('a model')
    s.add(embs(100), frame(numbered('', 100)))
    s.save(path)
    old = {o:(o.read_bytes(),o.stat().st_mtime_ns) for o in path.glob('0*')}
    s.add(embs(3, 1), frame('abc'))
    s.remove([5])
    s.save()
    assert old=={o:(o.read_bytes(),o.stat().st_mtime_ns) for o in old}
    s.remove(range(60))
    s.save()
    assert not any(o.exists() for o in old)
    assert list(content_of(path))==[*numbered('', 100)[60:],*'abc']

def test_everything_removed(store, path):
    store.remove(range(9))
    store.save()
    again = Store.load(path)
    assert len(again)==len(again.table)==0
    assert {o.name for o in path.iterdir()}=={'gallery.json','gallery.lock'}
    assert again.add(embs(1), frame('a')).tolist()==[6]

def test_emptied_and_filled_again(store, path):
    "A segment whose rows are all gone disappears, and so does a whole block of rows"
    store.remove(range(6))
    store.add(embs(1, 3), frame('x'))
    store.save()
    assert content_of(path)=={'x':embs(1, 3)[0].tolist()}
    store.add(embs(9000, 4), frame(numbered('n', 9000)))
    store.remove(range(7, 7+4096))
    store.save()
    assert len(content_of(path))==1+9000-4096
    assert content_of(path)==content(store)

def test_half_precision(path):
    s = new_store('abcd', dtype='float16')
    s.save(path)
    again = Store.load(path)
    assert again.segments[0].embs.dtype==np.float16
    assert np.allclose(again.segments[0].embs, embs(4), atol=2e-3)
    with pytest.raises(ValueError, match="'float32' or 'float16'"): Store('a model', dtype='int8')

def test_blocks_of_embeddings_make_a_safetensors_file(tmp_path):
    x,ids,ours,theirs = embs(50),np.arange(50)*3,tmp_path/'ours.safetensors',tmp_path/'theirs.safetensors'
    record = write_embeddings(ours, ids, [x[:7],x[7:8],x[8:]], 6, 'float32')
    assert record==file_record(ours)
    assert record[:2]==['ours.safetensors',ours.stat().st_size]
    arrays = load_file(ours)
    assert np.array_equal(arrays['embeddings'], x)
    assert np.array_equal(arrays['ids'], ids)
    save_file(dict(embeddings=x, ids=ids), theirs)
    found_ids,found = read_embeddings(theirs)
    assert np.array_equal(found_ids, ids)
    assert np.array_equal(found, x)

def test_notes_come_back_as_json(path):
    Store('a model', notes={10:1, 2:(1,2)}).save(path)
    assert Store.load(path).notes=={'10':1,'2':[1,2]}

def test_without_the_extra(store, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    store.add(embs(1), frame('x'))
    with pytest.raises(ImportError, match=r'pyramidreid\[gallery\]'): store.save()

# Columns

@pytest.mark.parametrize('values,kind', [(['a',1],'mixed-integer'),([[1],[2]],'mixed'),([b'a',b'b'],'bytes')])
def test_columns_that_cannot_be_stored(values, kind):
    with pytest.raises(ValueError, match=f"'note' holds values of the kind '{kind}'"):
        Store('a model').add(embs(2), frame('ab', note=values))

def test_columns_keep_their_kind(store):
    with pytest.raises(ValueError, match="'pid' held numbers until now, and here it holds text"):
        store.add(embs(1), frame('x', pid=['ann']))
    assert len(store)==5

def test_kinds_survive(path):
    s = Store('a model')
    times = pd.to_datetime(['2026-11-23 08:00+01:00',None], utc=True)
    who = pd.Categorical(['x','y'])
    s.add(embs(2), frame('ab', pid=[1,None], ok=[True,False], score=[.5,None], at=times, who=who))
    s.save(path)
    pd.testing.assert_frame_equal(Store.load(path).table, s.table)
    without_zone = frame('c', at=pd.to_datetime(['2026-11-23']))
    with pytest.raises(ValueError, match="'at' held times with a zone"): s.add(embs(1), without_zone)

# Damage

@pytest.mark.parametrize('damage,message', [
    (lambda data: data[:-9], 'has .* bytes and had'),
    (lambda data: data[:len(data)//2]+bytes([data[len(data)//2]^4])+data[len(data)//2+1:], 'checksum is wrong'),
    (lambda data: b'', 'has 0 bytes')], ids=['truncated','one bit','emptied'])
@pytest.mark.parametrize('ext', ['safetensors','parquet'])
def test_damaged_segments(store, path, ext, damage, message):
    file = sorted(path.glob(f'*.{ext}'))[0]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f'{file.name} is damaged: .*{message}'): Store.load(path)

@pytest.mark.parametrize('text', ['', '{', '[]', '{"format": "gallery 1"}', 'null'])
def test_damaged_manifest(store, path, text):
    (path/'gallery.json').write_text(text)
    with pytest.raises(ValueError, match='gallery.json is damaged'): Store.load(path)

def test_changed_manifest(store, path):
    file = path/'gallery.json'
    file.write_text(file.read_text().replace('a model', 'b model'))
    with pytest.raises(ValueError, match='checksum'): Store.load(path)

def check_damage_is_noticed(path, file, bad, expected):
    "A damaged file is an error that names it, or changes nothing"
    good = file.read_bytes()
    file.write_bytes(bad)
    try: found = content_of(path)
    except ValueError as e:
        assert f'{file.name} ' in str(e)
        assert 'damaged' in str(e) or "has the format 'gallery " in str(e)
    else:
        assert found==expected
        assert json.loads(bad)==json.loads(good) # Only white space of the manifest
    file.write_bytes(good)

@pytest.mark.parametrize('damage', ['truncate','flip'])
def test_every_damage_is_noticed(store, path, damage):
    "Files truncated at any length, and a flipped bit in any byte; large files at every 29th"
    expected = content_of(path)
    for file in sorted(path.iterdir()): # The lock is empty
        data = file.read_bytes()
        for i in range(0, len(data), 1 if len(data)<600 else 29):
            if damage=='truncate': bad = data[:i]
            else: bad = data[:i]+bytes([data[i]^(1<<i%8)])+data[i+1:]
            check_damage_is_noticed(path, file, bad, expected)
    assert content_of(path)==expected

@pytest.mark.parametrize('ext', ['safetensors','parquet'])
def test_damage_without_checksums(store, path, ext):
    "`check=False` compares only the lengths; a file that cannot be read is still reported as damaged"
    file,n_entries = sorted(path.glob(f'*.{ext}'))[0],len(Store.load(path))
    data,n_errors = file.read_bytes(),0
    for i in [*range(min(len(data), 200)),len(data)-1,len(data)-5,len(data)-9]:
        file.write_bytes(data[:i]+bytes([data[i]^0x55])+data[i+1:])
        try: found = Store.load(path, check=False)
        except ValueError as e:
            n_errors += 1
            assert f'{file.name} is damaged' in str(e), i
        else: assert len(found)==n_entries, i
    assert n_errors>0

def test_a_missing_file(store, path):
    file = sorted(path.glob('*.parquet'))[0]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f'incomplete: {file.name} is missing'): Store.load(path)

def test_no_gallery_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no gallery'): Store.load(tmp_path)
    with pytest.raises(ValueError, match='never saved'): Store('a model').save()

def test_a_newer_format(store, tmp_path, monkeypatch):
    path = tmp_path/'new'
    with monkeypatch.context() as m:
        m.setattr(module, '_FORMAT', 'gallery 2')
        store.save(path)
    with pytest.raises(ValueError, match="'gallery 2'"): Store.load(path)
    (path/'gallery.json').write_text('{"format": "gallery 3", "sha256": "of a newer kind"}')
    with pytest.raises(ValueError, match="'gallery 3'.*use a newer pyramidreid"): Store.load(path)

# Several processes

def test_two_writers(store, path):
    other = Store.load(path)
    other.add(embs(1), frame('x'))
    other.save()
    store.add(embs(1), frame('y'))
    with pytest.raises(RuntimeError, match='changed by another process'): store.save()
    assert list(content_of(path))==list('acdefx')

WRITER = """
import sys,time
import numpy as np, pandas as pd
from pyramidreid.gallery import store as module
from pyramidreid.gallery.store import Store

path,name = sys.argv[1:]
real = module._write_manifest
def slow(*args): # Gives the others time to interfere
    time.sleep(.01)
    real(*args)
module._write_manifest = slow
n = 0
while n<6:
    store = Store.load(path)
    store.add(np.ones((1,6), np.float32), pd.DataFrame(dict(key=[f'{name}-{n}'])))
    try: store.save()
    except RuntimeError as e: assert 'changed by another process' in str(e)
    else: n += 1
"""

READER = """
import sys
from pyramidreid.gallery.store import Store

seen = set()
while len(seen)<19:
    keys = set(Store.load(sys.argv[1]).table.key)
    assert seen<=keys
    seen = keys
"""

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_three_writers_and_two_readers(path):
    "No entry that was saved is lost, and readers see a whole gallery that only grows"
    new_store(['first']).save(path)
    scripts = [WRITER]*3+[READER]*2
    jobs = [subprocess.Popen([sys.executable, '-c', code, path, str(i)], stderr=subprocess.PIPE, text=True)
            for i,code in enumerate(scripts)]
    try:
        for i,job in enumerate(jobs):
            _,err = job.communicate(timeout=120)
            assert job.returncode==0, (i, err)
    finally:
        for job in jobs: job.kill()
    assert set(content_of(path))=={'first'} | {f'{i}-{n}' for i in range(3) for n in range(6)}

# Several processes without a working lock

UNLOCKED = """
import sys,time
import numpy as np, pandas as pd
from pyramidreid.gallery import store as module
from pyramidreid.gallery.store import Store

path,name,start = sys.argv[1:]
module._wait_for_lock = lambda *args: None
while time.time()<float(start): time.sleep(.001)
for i in range(15):
    for _ in range(100):
        store = Store.load(path)
        store.add(np.ones((1,6), np.float32), pd.DataFrame(dict(key=[f'{name}-{i}'])))
        try: store.save()
        except RuntimeError as e: assert 'changed by another process' in str(e)
        else: break
    else: raise SystemExit('never saved')
    print(f'{name}-{i}')
"""

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_two_writers_without_a_lock(path):
    "As where locks do not work: nothing saved before is lost, and hardly anything of what they add"
    new_store(numbered('old', 20)).save(path)
    start = str(time.time()+3)
    jobs = [subprocess.Popen([sys.executable, '-c', UNLOCKED, path, name, start], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for name in 'ab']
    try: outputs = [job.communicate(timeout=120) for job in jobs]
    finally:
        for job in jobs: job.kill()
    assert [job.returncode for job in jobs]==[0,0], outputs
    saved,found = [name for out,_ in outputs for name in out.split()],set(content_of(path))
    assert len(saved)==30
    assert set(numbered('old', 20))<=found<=set(numbered('old', 20)+saved)
    assert len(found)>=40

@pytest.fixture
def unlocked(monkeypatch):
    monkeypatch.setattr(module, '_locked', lambda path: nullcontext())
    monkeypatch.setattr(module, '_STALE_SECONDS', 60)

def between(monkeypatch, victim, other):
    "Call `other` once, just before the next call of the module's `victim`"
    real = getattr(module, victim)
    def call(*args, **kwargs):
        monkeypatch.setattr(module, victim, real)
        other()
        return real(*args, **kwargs)
    monkeypatch.setattr(module, victim, call)

@pytest.mark.parametrize('n', [1,30])
@pytest.mark.parametrize('victim', ['_write_table','_stale_files','_write_manifest','flush_to_disk'])
def test_another_writer_in_the_middle_of_a_save(store, path, unlocked, monkeypatch, victim, n):
    "Without a lock. The first notices, and nothing of the second is lost, whether or not segments were merged"
    other = Store.load(path)
    other.add(embs(n, 5), frame(numbered('other', n)))
    store.add(embs(n, 6), frame(numbered('mine', n)))
    between(monkeypatch, victim, other.save)
    with pytest.raises(RuntimeError, match='changed by another process'): store.save()
    assert list(content_of(path))==[*'acdef',*numbered('other', n)]
    again = Store.load(path)
    again.add(embs(1, 7), frame('z'))
    again.save()
    assert list(content_of(path))==[*'acdef',*numbered('other', n),'z']

@pytest.mark.parametrize('n', [1,30])
def test_two_writers_at_the_last_moment(store, path, unlocked, monkeypatch, n):
    "The worst case: the second manifest replaces the first, one add is lost, and the first writer is told"
    other,before = Store.load(path),read_manifest(path)
    other.add(embs(n, 5), frame(numbered('other', n)))
    store.add(embs(n, 6), frame(numbered('mine', n)))
    real,replaced = os.replace,[]
    def replace(src, dest):
        real(src, dest)
        if Path(dest).name!='gallery.json': return
        replaced.append(dest)
        if len(replaced)==1: other.save()
    def read(folder): return before if len(replaced)==1 else read_manifest(folder)
    monkeypatch.setattr(os, 'replace', replace)
    monkeypatch.setattr(module, 'read_manifest', read)
    with pytest.raises(RuntimeError, match='changed by another process'): store.save()
    assert len(replaced)==2
    assert list(content_of(path))==[*'acdef',*numbered('other', n)]

def test_another_writer_goes_on_from_a_save_under_way(store, path, unlocked, monkeypatch):
    "Nothing is lost, and the first save is complete"
    store.add(embs(30, 5), frame(numbered('mine', 30)))
    real = os.replace
    def replace_and_go_on(src, dest):
        real(src, dest)
        if Path(dest).name!='gallery.json': return
        monkeypatch.setattr(os, 'replace', real)
        other = Store.load(path)
        other.add(embs(1, 6), frame('x'))
        other.save()
    monkeypatch.setattr(os, 'replace', replace_and_go_on)
    store.save()
    assert list(content_of(path))==[*'acdef',*numbered('mine', 30),'x']
    store.add(embs(1, 7), frame('y'))
    with pytest.raises(RuntimeError, match='changed by another process'): store.save()

def test_stale_files_are_removed_after_a_minute(store, path, monkeypatch):
    "Another writer without a lock, or a reader, may still need them"
    monkeypatch.setattr(module, '_STALE_SECONDS', 60)
    now = time.time()
    monkeypatch.setattr(module.time, 'time', lambda: now)
    old = listed_files(store)-{'gallery.json','gallery.lock'}
    store.add(embs(30), frame(numbered('n', 30)))
    store.save()
    assert set(read_manifest(path)['stale'])==old
    for seconds,left in ((30,old),(29,old),(2,set())):
        now += seconds
        store.add(embs(1), frame([f'{now}']))
        store.save()
        assert {o.name for o in path.iterdir()} & old==left

def test_what_killed_writers_left_is_removed_and_nothing_else(store, path):
    "A writer that holds its lock may write for longer than a minute"
    (path/'.partial-killed').mkdir()
    (path/'.partial-killed'/'.lock').write_bytes(b'')
    (path/'.partial-killed'/'rest').write_bytes(b'x')
    with partial_folder(path) as writing:
        for i in range(2):
            store.add(embs(1, i), frame([f'later {i}']))
            store.save()
        assert writing.exists()
    assert not list(path.glob('.partial-*'))

def test_a_folder_that_cannot_be_locked(store, path, monkeypatch):
    "A warning, and the save goes on"
    if module.fcntl is None: pytest.skip('needs Unix')
    def refuse(*args): raise OSError(37, 'No locks available')
    monkeypatch.setattr(module.fcntl, 'lockf', refuse)
    store.add(embs(1), frame('x'))
    with pytest.warns(ReIDWarning, match='cannot be locked .*No locks available'): store.save()
    assert 'x' in content_of(path)

def test_threads_wait_for_each_other(path):
    new_store(['first']).save(path)
    def writer(name):
        n = 0
        while n<5:
            s = Store.load(path)
            s.add(embs(1), frame([f'{name}-{n}']))
            with suppress(RuntimeError):
                s.save()
                n += 1
    with ThreadPoolExecutor(3) as pool: list(pool.map(writer, range(3)))
    assert set(content_of(path))=={'first'} | {f'{i}-{n}' for i in range(3) for n in range(5)}

def test_a_gallery_of_an_earlier_version(store, path):
    "Files named by number only, and no note of stale ones"
    expected,manifest = content_of(path),read_manifest(path)
    del manifest['stale']
    for i,segment in enumerate(manifest['segments']):
        for record in segment['files']:
            new = f'00000{i+1}'+('-1' if i else '')+Path(record[0]).suffix
            (path/record[0]).rename(path/new)
            record[0] = new
    (path/'gallery.lock').unlink()
    checksum = module._content_checksum(manifest)
    (path/'gallery.json').write_text(json.dumps({**manifest, 'checksum':checksum}))
    again = Store.load(path)
    assert content(again)==expected
    again.add(embs(30), frame(numbered('n', 30)))
    again.save()
    assert list(content_of(path))==[*'acdef',*numbered('n', 30)]
    assert {o.name for o in path.iterdir()}==listed_files(again)

def test_a_reader_while_another_process_saves(store, path, monkeypatch):
    "The old segments disappear after the manifest was read: the new manifest is read"
    real,saved = module.read_manifest,False
    def read_then_save(folder):
        nonlocal saved
        res = real(folder)
        if not saved:
            saved = True
            store.add(embs(20), frame(numbered('n', 20)))
            store.save()
        return res
    monkeypatch.setattr(module, 'read_manifest', read_then_save)
    assert len(Store.load(path))==25

# Folders

def test_not_over_another_gallery(store, path):
    with pytest.raises(FileExistsError, match='already holds a gallery'): new_store('x').save(path)

def test_saved_to_a_second_folder(store, path, tmp_path):
    copy = tmp_path/'copy'
    store.save(copy)
    assert content_of(copy)==content_of(path)
    store.add(embs(1), frame('x'))
    store.save()
    assert 'x' in content_of(copy)
    assert 'x' not in content_of(path)

def test_the_folder_was_deleted(store, path):
    "The embeddings mapped into memory still exist, and are written again"
    expected = content(store)
    shutil.rmtree(path)
    store.save()
    assert content_of(path)==expected

def test_the_manifest_was_deleted_while_the_gallery_was_open(store, path):
    "What is in memory is written again, but not over files of another gallery"
    expected = content(store)
    (path/'gallery.json').unlink()
    store.save()
    assert content_of(path)==expected
    (path/'gallery.json').unlink()
    (path/'000009.parquet').write_text('of another')
    with pytest.raises(FileExistsError, match='holds 000009.parquet'): store.save()

def test_entries_without_a_manifest_are_not_overwritten(path):
    new_store('abc').save(path)
    manifest = (path/'gallery.json').read_bytes()
    (path/'gallery.json').unlink()
    files = sorted(path.iterdir())
    with pytest.raises(FileExistsError, match='holds 000001.* and no gallery.json'): new_store('x').save(path)
    assert sorted(path.iterdir())==files
    (path/'gallery.json').write_bytes(manifest)
    assert list(content_of(path))==list('abc')

def test_other_files_stay(path):
    s = new_store('abc')
    s.save(path)
    others = [path/name for name in ('notes.txt','20261123.parquet','notes.parquet','000009.safetensors')]
    for file in others: file.write_text('mine')
    s.add(embs(3), frame('def'))
    s.save()
    assert [file.read_text() for file in others]==['mine']*4
    assert len(list(path.glob('00000[0-8]-*')))==2

def test_a_folder_behind_links(store, path, tmp_path):
    link = tmp_path/'link'
    link.symlink_to(path)
    other = Store.load(link)
    other.add(embs(1), frame('x'))
    other.save(path)
    other.save(link)
    assert 'x' in content_of(link)
    assert link.is_symlink()
    dead = tmp_path/'dead'
    dead.symlink_to(tmp_path/'missing')
    with pytest.raises(FileNotFoundError, match='dead is a link to .*missing'): other.save(dead)

@pytest.mark.skipif(not hasattr(os, 'geteuid'), reason='needs Unix')
def test_a_folder_that_cannot_be_written(store, path, monkeypatch):
    store.add(embs(1), frame('x'))
    files = sorted(path.iterdir())
    monkeypatch.setattr(os, 'access', lambda *args: False) # Root may write everywhere
    with pytest.raises(PermissionError, match='cannot be written'): store.save()
    assert sorted(path.iterdir())==files

def test_a_file_is_not_a_folder(path):
    path.write_text('')
    with pytest.raises(NotADirectoryError, match='a gallery is a folder'): Store('a model').save(path)
    assert path.read_text()==''

def test_a_manifest_that_was_begun(path, monkeypatch):
    "An empty manifest counts as a gallery that was never saved"
    with monkeypatch.context() as m:
        m.setattr(module, 'write_embeddings', disk_full)
        with pytest.raises(OSError, match='No space left'): new_store('abc').save(path)
    assert read_manifest(path)['generation']==0
    assert len(Store.load(path))==0
