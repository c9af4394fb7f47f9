"""Run by test_evaluation: print how far memory grows, in MB, with a mapped gallery (its file is the argument), and with
queries that have 100,000 matches each; and that evaluation needs neither fastai nor CUDA"""
import sys
import threading
from pathlib import Path

import numpy as np
import torch

from pyramidreid.evaluation.distances import Distances
from pyramidreid.evaluation.protocols import evaluate_cameras, evaluate_single_shot  # noqa: F401
from pyramidreid.evaluation.retrieval import evaluate, evaluate_distances

assert 'fastai' not in sys.modules and not torch.cuda.is_initialized()

def anonymous_mb():
    "Anonymous memory of this process, in MB"
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon'))/1024

def growth(f):
    "How far anonymous memory grows during `f`, in MB, and what `f` returns"
    start,peak,done = anonymous_mb(),0,threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(.002): peak = max(peak, anonymous_mb())
    watcher = threading.Thread(target=watch)
    watcher.start()
    res = f()
    done.set()
    watcher.join()
    return round(peak-start),res

def mapped_gallery(file):
    gallery,pids = np.load(file, mmap_mode='r'),np.arange(60_000)%1500
    queries = np.array(gallery[:30])
    def run(gallery): return evaluate(queries, gallery, pids[:30], pids[:len(gallery)], distance='euclidean')
    run(gallery[:100])
    mb,res = growth(lambda: run(gallery))
    assert res.rank1==1
    return mb

def many_matches():
    x = np.random.default_rng(0).standard_normal((100_000,8))
    dist = Distances(x[:24], x, 'euclidean')
    evaluate_distances(Distances(x[:3], x[:9], 'euclidean'), [1]*3, [1]*9)
    mb,res = growth(lambda: evaluate_distances(dist, [1]*24, np.ones(100_000, int)))
    assert res.mAP==1
    return mb

print(mapped_gallery(sys.argv[1]), many_matches(), torch.cuda.is_initialized())
