"Fifty children add to a gallery, remove, and save, and each is killed at a random moment. Run by test_store.py; imports neither torch nor fastai"
import json
import os
import random
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet

from pyramidreid.gallery.gallery import Gallery
from pyramidreid.gallery.store import Store, read_manifest

DIM = 512

class Model:
    "An embedding is drawn from the picture's own bytes"
    fingerprint = 'a model'
    def embed(self, images): return np.stack([vector(np.asarray(o)) for o in images])

def picture(key): return np.random.default_rng(zlib.crc32(key.encode())).integers(0, 255, (8,4,3), np.uint8)
def vector(pixels): return np.random.default_rng(zlib.crc32(np.ascontiguousarray(pixels).tobytes())).standard_normal(DIM)
def pid(key): return zlib.crc32(key.encode())%97

def child(path, log, seed):
    "Say what shall be saved, save it, say that it was; without end"
    rng,n = random.Random(seed),0
    say = lambda *o: os.write(log, (json.dumps(o)+'\n').encode())
    gallery = Gallery.load(path, Model()) if (path/'gallery.json').exists() else Gallery(Model())
    while True:
        keys = [f'{seed}-{n}-{i}' for i in range(rng.randint(1, 30))]
        old = rng.sample(sorted(gallery.keys), min(len(gallery), rng.randint(0, 5)))
        say('will', keys, old)
        gallery.add([picture(k) for k in keys], keys=keys, pid=[pid(k) for k in keys])
        if old: gallery.remove(old)
        gallery.save(path)
        say('did', n)
        n += 1

def saved(path):
    "Keys in the folder, if every entry is as it was added"
    if not (path/'gallery.json').exists(): return set()
    store = Store.load(path)
    table,embs = store.table,{i:e for s in store.segments for i,e in zip(s.ids, s.embs)}
    for i,k,p in zip(table.index, table.key, table.get('pid', table.key)): # begun and never saved: no column yet
        x = vector(picture(k))
        assert p==pid(k) and np.allclose(embs[i], x/np.linalg.norm(x), atol=1e-6), k
    return set(table.key)

def main(path, kills=50):
    rng,known,res,last = random.Random(0),set(),dict(kills=0, saves=0, inside=0, left=0, unsure_kept=0),set()
    for seed in range(kills):
        out,log = os.pipe()
        if not (pid := os.fork()):
            os.close(out)
            child(path, log, seed)
        os.close(log)
        time.sleep(rng.uniform(.02, .4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(out) as f: lines = [json.loads(o) for o in f.read().splitlines()]
        pending = None
        for what,*o in lines:
            if what=='did': known,pending = pending,None
            else: pending = (known|set(o[0]))-set(o[1])
        found,about = saved(path),read_manifest(path)
        assert found==known or pending is not None and found==pending, f'kill {seed}: {len(known)} entries were saved, {len(found)} are there'
        listed = {n for s in (about or {'segments':[]})['segments'] for n,_,_ in s['files']} | {'gallery.json'}
        res['kills'] += 1
        res['saves'] += sum(o[0]=='did' for o in lines)
        res['inside'] += pending is not None
        res['unsure_kept'] += found!=known
        res['left'] += bool({o.name for o in path.iterdir()}-listed) if path.exists() else 0
        known = found
    heavy = [m for m in ('torch','fastai') if m in sys.modules]
    print(json.dumps(dict(res, entries=len(known), heavy=heavy)))

if __name__=='__main__': main(Path(sys.argv[1]), int(sys.argv[2]))
