"""Run notebooks as tests, several at a time, each in its own process: one that fails or hangs does not affect others.
`python dev/notebooks.py`, or with notebooks or folders to run. Cells marked `#| slow` run with `--slow` only;
`--slow-only` runs only the notebooks with such cells, in full."""
import argparse
import multiprocessing as mp
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parent.parent
LIMIT = 600 # seconds for one notebook

# Imported once, before the processes are forked. No threads have been started by then.
PRELOAD = ['torch', 'fastai.vision.all', 'nbdev.test', 'matplotlib.pyplot', 'pandas']

def find_notebooks(paths):
    "The notebooks among `paths` and below them"
    for path in map(Path, paths): yield from sorted(path.rglob('*.ipynb')) if path.is_dir() else [path]

def has_slow_cells(notebook): return '#| slow' in notebook.read_text(encoding='utf-8')

def run_here(notebook, slow, folder):
    "Run one notebook in this process, with `folder` for its temporary files; exits with 1 if a cell fails"
    os.environ['TMPDIR'] = tempfile.tempdir = folder
    # Workers of a DataLoader see the classes that a page defines only if they are forked
    if sys.platform=='linux': mp.set_start_method('fork', force=True)
    from nbdev.test import test_nb
    passed,_ = test_nb(notebook, skip_flags=[] if slow else ['slow'], basepath=root)
    sys.exit(0 if passed else 1)

def run(notebook, slow, context):
    "Run one notebook in a process of its own: (notebook, what went wrong or '', seconds)"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix='reid-', ignore_cleanup_errors=True) as folder:
        problem = run_in(context.Process(target=run_here, args=(notebook, slow, folder)))
    return notebook,problem,time.perf_counter()-began

def run_in(process):
    "Start a process, wait for its end or kill it after `LIMIT` seconds; what went wrong or ''"
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        return f'stopped after {LIMIT} s'
    if not process.exitcode: return ''
    return 'failed' if process.exitcode==1 else f'ended with exit code {process.exitcode}'

def report(result):
    notebook,problem,seconds = result
    print(f'{seconds:6.1f} s  {notebook.relative_to(root)}{"  "+problem.upper() if problem else ""}', flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', default=[root/'nbs'], help='notebooks or folders of them')
    parser.add_argument('--slow', action='store_true', help='run the cells marked slow too')
    parser.add_argument('--slow-only', action='store_true', help='run the notebooks with such cells, with them')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='notebooks at a time')
    args = parser.parse_args()
    context = mp.get_context('forkserver' if sys.platform=='linux' else 'spawn')
    if sys.platform=='linux': context.set_forkserver_preload(PRELOAD)
    notebooks = [o.resolve() for o in find_notebooks(args.paths)]
    if args.slow_only: notebooks = [o for o in notebooks if has_slow_cells(o)]
    slow = args.slow or args.slow_only
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda o: run(o, slow, context), notebooks):
            results.append(result)
            report(result)
    failed = [o for o in results if o[1]]
    print(f'{len(results)-len(failed)} passed, {len(failed)} failed')
    if failed: sys.exit('Failed: '+', '.join(str(o[0].relative_to(root)) for o in failed))

if __name__=='__main__': main()
