"Roles, optional dependencies, atomic writes and progress bars"
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from pyramidreid import core
from pyramidreid.core import (
    Role,
    atomic_write,
    flush_to_disk,
    partial_folder,
    remove_leftovers,
    require_extra,
    with_progress,
)

# roles

@pytest.mark.parametrize('name,role', [('train',Role.TRAIN), ('QUERY',Role.QUERY), ('Gallery',Role.GALLERY)])
def test_a_role_by_its_name(name, role): assert Role.of(name) is role

@pytest.mark.parametrize('name', ['valid', '', None, 1, 'of'])
def test_an_unknown_role_is_named(name):
    with pytest.raises(ValueError, match=f"^{name!r} is not a valid role"): Role.of(name)

def test_the_numbers_of_roles_stay():
    "They are stored in targets and files"
    assert [int(role) for role in (Role.TRAIN,Role.QUERY,Role.GALLERY)]==[0,1,2]

# optional dependencies

def test_a_missing_module_names_its_extra():
    with pytest.raises(ImportError, match=r"nothing_here is not installed.*pip install 'pyramidreid\[gallery\]'") as e:
        require_extra('nothing_here', 'gallery')
    assert isinstance(e.value.__cause__, ModuleNotFoundError)

def test_a_module_that_is_there_is_returned(): assert require_extra('json', 'none') is sys.modules['json']

# atomic writes

def files_below(path): return sorted(o.relative_to(path).as_posix() for o in path.rglob('*') if o.is_file())

def test_the_content_is_there_after_the_block_only(tmp_path):
    dest = tmp_path/'deep'/'down'/'f.txt'
    with atomic_write(str(dest)) as tmp:
        tmp.write_text('new')
        assert tmp.name==dest.name and not dest.exists()
    assert dest.read_text()=='new' and files_below(tmp_path)==['deep/down/f.txt']

def test_a_folder_is_not_written_over(tmp_path):
    with pytest.raises(IsADirectoryError, match='models is a folder: give the name of a file'):
        (tmp_path/'models').mkdir()
        with atomic_write(tmp_path/'models'): raise AssertionError('the block is not run')
    assert files_below(tmp_path)==[]

@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
@pytest.mark.parametrize('old', [None,'old'])
def test_a_failed_block_changes_nothing(tmp_path, error, old):
    dest = tmp_path/'f.txt'
    if old: dest.write_text(old)
    before = files_below(tmp_path)
    with pytest.raises(error), atomic_write(dest) as tmp:
        tmp.write_text('half')
        raise error
    assert files_below(tmp_path)==before and os.listdir(tmp_path)==before
    if old: assert dest.read_text()==old

@pytest.mark.skipif(os.name=='nt', reason='Windows has no such permissions')
def test_permissions_of_a_written_file(tmp_path):
    "A new file has those of any new file, whatever wrote it; one that is replaced keeps its own"
    def mode(path): return path.stat().st_mode & 0o777
    dest,usual = tmp_path/'f.txt',tmp_path/'usual'
    usual.touch()
    def write():
        with atomic_write(dest) as tmp:
            tmp.write_text('text')
            tmp.chmod(0o600) # as safetensors does
    write()
    assert mode(dest)==mode(usual)
    for kept in (0o640, 0o444, 0o600):
        dest.chmod(kept)
        write()
        assert mode(dest)==kept and files_below(tmp_path)==['f.txt','usual']

def test_a_block_that_writes_nothing_fails(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path/'f.txt'): pass
    assert not os.listdir(tmp_path)

KILLED = """
import os, signal, sys
from pyramidreid.core import atomic_write
with atomic_write(sys.argv[1]) as tmp:
    tmp.write_text('half')
    os.kill(os.getpid(), signal.SIGKILL)
"""

@pytest.mark.skipif(os.name=='nt', reason='Windows has no SIGKILL')
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    "Of whatever file of the folder; what is being written stays, in this process and in another"
    with atomic_write(tmp_path/'mine') as mine:
        mine.write_text('mine')
        killed = subprocess.run([sys.executable,'-c',KILLED,tmp_path/'cache'])
        assert killed.returncode==-signal.SIGKILL and len(list(tmp_path.glob('.partial-*/cache')))==1
        with atomic_write(tmp_path/'other') as other:
            other.write_text('other')
            assert not list(tmp_path.glob('.partial-*/cache'))
        remove = f"from pyramidreid.core import remove_leftovers\nremove_leftovers({str(tmp_path)!r})"
        subprocess.run([sys.executable,'-c',remove], check=True)
    assert sorted(os.listdir(tmp_path))==['mine','other']

def make_leftover(folder, age, name='.partial-x'):
    "A partial folder of an earlier version, in which something was written `age` seconds ago"
    path = folder/name
    path.mkdir()
    (path/'half').write_text('half')
    then = time.time()-age
    for o in (path/'half', path): os.utime(o, (then,then))
    return path

def test_leftovers_without_a_lock_wait_for_a_day(tmp_path):
    old,new = make_leftover(tmp_path, 90_000, '.partial-old'),make_leftover(tmp_path, 80_000, '.partial-new')
    remove_leftovers(tmp_path)
    assert not old.exists() and (new/'half').exists()

def test_nothing_but_leftovers_is_removed(tmp_path):
    "No file, no folder of another name, and nothing that a link leads to"
    target = make_leftover(tmp_path, 90_000, 'target')
    (tmp_path/'.partial-link').symlink_to(target)
    (tmp_path/'.partial-file').write_text('')
    make_leftover(tmp_path, 90_000, '.mine.tmp')
    before = sorted(os.listdir(tmp_path))
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path))==before and (target/'half').exists()
    remove_leftovers(tmp_path, '.mine.*')
    assert not (tmp_path/'.mine.tmp').exists()

def test_a_partial_folder_that_was_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    "Another process removes it between its making and its lock"
    first,acquired = [],core._acquired
    def slow(lock):
        if first: return acquired(lock)
        first.append(1)
        for path in tmp_path.glob('.partial-*'): path.rmdir()
        return False
    monkeypatch.setattr(core, '_acquired', slow)
    with partial_folder(tmp_path) as folder: (folder/'f').write_text('here')
    assert first and not os.listdir(tmp_path)

def test_without_locks_on_the_disk_a_day_must_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(core, '_acquired', lambda lock: None)
    with atomic_write(tmp_path/'a') as a, atomic_write(tmp_path/'b') as b:
        a.write_text('a')
        b.write_text('b')
    assert sorted(os.listdir(tmp_path))==['a','b']

def test_the_content_is_flushed_before_the_file_is_moved(tmp_path, monkeypatch):
    "Or a power cut could leave the new name with no content"
    steps,replace = [],os.replace
    def flushed(path): steps.append(('flush', path.read_text() if path.is_file() else path))
    def moved(src, dest):
        steps.append(('move', dest))
        replace(src, dest)
    monkeypatch.setattr(core, 'flush_to_disk', flushed)
    monkeypatch.setattr(os, 'replace', moved)
    with atomic_write(tmp_path/'f.txt') as tmp: tmp.write_text('new')
    assert steps==[('flush','new'), ('move',tmp_path/'f.txt'), ('flush',tmp_path)]

def test_files_and_folders_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, 'fsync', lambda fd: flushed.append(os.fstat(fd).st_ino))
    (tmp_path/'f.txt').touch()
    for path in (tmp_path/'f.txt', tmp_path): flush_to_disk(path)
    assert flushed==[path.stat().st_ino for path in (tmp_path/'f.txt', tmp_path)]

# progress bars

@pytest.fixture
def bars(monkeypatch):
    "Arguments of each bar that was made; the bar itself is its items"
    made = []
    def progress_bar(items, total, leave):
        made.append((total,leave))
        return items
    monkeypatch.setattr('fastprogress.fastprogress.progress_bar', progress_bar)
    return made

def on_terminal(monkeypatch, terminal, jupyter=False):
    monkeypatch.setattr(core, '_in_jupyter', lambda: jupyter)
    monkeypatch.setattr(core.sys, 'stdout', types.SimpleNamespace(isatty=lambda: terminal))

@pytest.mark.parametrize('terminal,jupyter,shown', [(True,False,True), (False,True,True), (False,False,False)])
def test_a_bar_is_shown_where_somebody_sees_it(bars, monkeypatch, terminal, jupyter, shown):
    with monkeypatch.context() as context:
        on_terminal(context, terminal, jupyter)
        result = list(with_progress([1,2,3]))
    assert result==[1,2,3] and bars==[(3,False)]*shown

def test_no_bar_for_a_single_item_or_if_not_wanted(bars, monkeypatch):
    with monkeypatch.context() as context:
        on_terminal(context, True)
        assert list(with_progress([1]))==[1] and list(with_progress([]))==[]
        assert list(with_progress([1,2], show=False))==[1,2]
    assert not bars

def test_the_length_of_an_iterator_is_given(bars, monkeypatch):
    with monkeypatch.context() as context:
        on_terminal(context, True)
        result = list(with_progress(iter('abc'), total=3))
    assert result==['a','b','c'] and bars==[(3,False)]
    with pytest.raises(TypeError): with_progress(iter('abc'))

def test_an_empty_partial_folder_is_removed(tmp_path):
    "Its writer was killed before its lock was there, or after it was gone"
    (tmp_path/'.partial-x').mkdir()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())

def test_a_new_partial_folder_that_was_taken_for_a_leftover(tmp_path, monkeypatch):
    "The writer makes another"
    make,taken = core._new_lock,[]
    def take_first(folder):
        if not taken:
            taken.append(folder)
            folder.rmdir()
        return make(folder)
    monkeypatch.setattr(core, '_new_lock', take_first)
    monkeypatch.setattr(core, '_acquired', lambda lock: None) # as filelock says of a folder that is not there
    with partial_folder(tmp_path/'a') as folder:
        assert taken and folder.is_dir() and folder!=taken[0]

# Windows, as far as another system can play it

def test_a_file_that_a_reader_has_open_is_replaced_when_it_is_closed(tmp_path, monkeypatch):
    "Windows refuses until then; elsewhere a refusal is final"
    calls,replace = [],os.replace
    def refuse_twice(*args):
        calls.append(args)
        if len(calls)<3: raise PermissionError(13, 'The process cannot access the file')
        replace(*args)
    monkeypatch.setattr(os, 'replace', refuse_twice)
    with pytest.raises(PermissionError), atomic_write(tmp_path/'a') as tmp: tmp.write_text('x')
    assert len(calls)==1 and not list(tmp_path.iterdir())
    calls.clear()
    monkeypatch.setattr(core, '_WINDOWS', True)
    with atomic_write(tmp_path/'a') as tmp: tmp.write_text('x')
    assert len(calls)==3 and (tmp_path/'a').read_text()=='x'

def test_a_refusal_of_windows_that_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(core, '_WINDOWS', True)
    def refuse(*args): raise PermissionError(13, 'The process cannot access the file')
    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(PermissionError): core._replace(tmp_path/'a', tmp_path/'b', seconds=.05)

def test_folders_are_not_flushed_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(core, '_WINDOWS', True)
    monkeypatch.setattr(os, 'open', None)
    flush_to_disk(tmp_path)

WITHOUT_UNIX = """
import importlib, os, pkgutil, signal, sys
import fastai.vision.all, matplotlib.pyplot, pandas, torch, filelock
for name in ('fcntl','resource','termios','pwd','grp'): sys.modules[name] = None
for name in ('register_at_fork','fork','mkfifo','statvfs'): # fchmod is for filelock, which has its own way on Windows
    if hasattr(os, name): delattr(os, name)
for name in ('SIGHUP','SIGKILL','SIGALRM','SIGUSR1'):
    if hasattr(signal, name): delattr(signal, name)
class msvcrt:
    LK_NBLCK,LK_UNLCK,log = 2,0,[]
    def locking(fd, mode, n): msvcrt.log.append(mode)
sys.modules['msvcrt'] = msvcrt
import pyramidreid
for module in pkgutil.walk_packages(pyramidreid.__path__, 'pyramidreid.'):
    if not module.name.endswith('__main__'): importlib.import_module(module.name)
from pathlib import Path
from pyramidreid.cli.entry import main
from pyramidreid.gallery.store import Store
import numpy as np
store = Store('a model')
store.add(np.eye(2), pandas.DataFrame(dict(key=['a','b'])))
store.save(Path(sys.argv[1])/'g')
assert len(Store.load(Path(sys.argv[1])/'g'))==2
assert msvcrt.log==[msvcrt.LK_NBLCK, msvcrt.LK_UNLCK], msvcrt.log
assert main(['embed', 'no model', 'x.jpg', '--out', 'x.npz'])==2
"""

@pytest.mark.slow
def test_nothing_of_unix_is_needed(tmp_path):
    "All modules can be imported, a gallery saved, a command run without what Windows lacks"
    pytest.importorskip('pyarrow', reason='needs the extra gallery')
    subprocess.run([sys.executable,'-Wignore','-c',WITHOUT_UNIX,tmp_path], check=True, capture_output=True, timeout=300)
