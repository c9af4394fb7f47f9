"""Everything that needs a GPU, in one command of at most 8 minutes, what matters most first: every path of the library
that computes on one (the cases of tests/fakegpu, mixed precision, `torch.compile`, `fit_paper` at its own size, ranking
and re-ranking at Market-1501's size against the CPU), then the speed of head and training step in each precision, the
loader beside the step, and Market-1501 for the time that is left.

A machine with a GPU and nothing of this repository needs three commands:

    git clone URL pyramidreid && cd pyramidreid
    make .venv/.ready                     # Python 3.10 or later; torch is the build for its CUDA that pip finds
    .venv/bin/python benchmarks/gpu.py --data Market-1501-v15.09.15 --weights resnet50.safetensors

Without `--data` people are drawn for what needs images, and Market-1501 is left out; without `--weights` the training
on Market-1501 downloads ImageNet weights. Where no network can be reached, carry over the wheels of `pip download`, the
repository, the data and the weights; PYTHONPATH=. stands in for an installation.

Each part runs in a process of its own, which is killed when its time is over, so one that crashes, hangs or runs out of
memory takes no other with it. Results are in OUT/gpu.json after each part; what the parts print, and the checkpoints of
the training, are in OUT/gpu/. The same command again runs the parts that have not passed yet with this code on this
kind of GPU: Market-1501 goes on where it stopped. `--again PART` repeats a part that passed, `--only PART` runs no
other, and `case` stands for all cases.

`--device cpu --reduced` and `--device fakegpu --reduced` try the script itself, small, where no GPU is."""
import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pyramidreid.core import atomic_write  # noqa: E402

COMPILES = 240       # Seconds that the pretend GPU may take to be compiled
EXTRA_FOLDER = 'gpu' # Below OUT: what the parts print, their results one by one, checkpoints

# ---- the plan

class Part(NamedTuple):
    "A part of the run"
    name:str
    about:str           # What it does
    seconds:float       # Time limit; Market-1501 has what is left
    beside:bool=False   # May it run beside others? What is timed may not
    reduced:tuple=()    # Devices on which the reduced form has it
    devices:tuple=('cuda','fakegpu','cpu') # Where it can run at all

NOT_ON_CPU = ('cuda','fakegpu')
REDUCED_CASES = dict(ranks_on_the_device=NOT_ON_CPU+('cpu',), waits_once_in_a_step=('fakegpu',))

def case_parts():
    "A part for each case of tests/fakegpu"
    text = (ROOT/'tests'/'fakegpu'/'cases.py').read_text(encoding='utf-8')
    names = re.findall(r'\w+', re.search(r'^CASES = \[(.*?)\]', text, re.M|re.S)[1])
    for name in names:
        devices = NOT_ON_CPU if name.startswith('waits_') or 'on_the_cpu' in name else NOT_ON_CPU+('cpu',)
        yield Part(f'case:{name}', name.replace('_', ' '), 120, True, REDUCED_CASES.get(name, ()), devices)

def full_plan():
    "All parts, what matters most first"
    everywhere = NOT_ON_CPU+('cpu',)
    return [
        *case_parts(),
        Part('fp16', 'training in float16 with GradScaler', 60, True, NOT_ON_CPU, NOT_ON_CPU),
        Part('bf16', 'training in bfloat16', 60, True, NOT_ON_CPU, NOT_ON_CPU),
        Part('channels_last', 'training with channels last, against contiguous images', 60, True, everywhere),
        Part('compile', 'two steps with torch.compile, against the same without', 60, True, (), ('cuda','cpu')),
        Part('paper', 'two steps of fit_paper: ResNet-50, 384×128, 64 images', 60, False, everywhere),
        Part('ranking', "evaluation of Market-1501's size against the CPU", 60, False, everywhere),
        Part('reranking', "re-ranking of Market-1501's size against the CPU", 90, False, everywhere),
        Part('head', 'head and losses against a loop over branches and anchors', 45, False, everywhere),
        Part('step', 'a training step taken apart, in each precision and memory format', 75, False, everywhere),
        Part('loader', 'images per second of the loader beside the training step', 90, False, everywhere),
        Part('market', 'Market-1501 by the modern recipe, resumed where it stopped', 480, False, everywhere)]

def plan(device, reduced):
    "The parts for a device; reduced ones have three times the time, since a CPU may be slow"
    parts = [part for part in full_plan() if device in part.devices]
    if not reduced: return parts
    return [part._replace(seconds=3*part.seconds) for part in parts if device in part.reduced]

def named(parts, words):
    "Those parts that `words` name, by name or by what stands before the colon. Raises `ValueError` for other words"
    known = {part.name for part in parts} | {part.name.split(':')[0] for part in parts}
    unknown = [word for word in words if word not in known]
    if unknown: raise ValueError(f"{', '.join(unknown)}: no such part on this device. The parts are "
                                 f"{', '.join(part.name for part in parts)}")
    return [part for part in parts if {part.name, part.name.split(':')[0]} & set(words)]

def few_threads(jobs):
    "The environment of one of `jobs` children that share the cores; a number of threads that is set already stays"
    threads = max(1, (os.cpu_count() or 1)//jobs)
    return {'OMP_NUM_THREADS': str(threads), **os.environ}

# ---- one child process, which runs one or several parts

def read_json(file):
    "A JSON file, or an empty dict if it is missing or half written"
    try: return json.loads(file.read_text(encoding='utf-8'))
    except (OSError,ValueError): return {}

def last_line(text, default=''):
    "The last line that is not empty"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else default

class Child:
    """A process that runs `parts` in their order, each within its seconds. It writes `PART.json` in `folder` when it
    begins a part, with the status 'running', and when it ends it. `to_start` are seconds until the first begins"""
    def __init__(self, parts, command, folder, deadline, to_start=0, environment=None):
        self.parts,self.folder,self.deadline = list(parts),folder,deadline
        self.since,self.to_start = time.monotonic(),to_start
        self.beside = all(part.beside for part in parts)
        self.results = {}
        for part in parts: self.file(part).unlink(missing_ok=True)
        self.log = folder/f'{parts[0].name.replace(":", "-")}.log'
        with self.log.open('wb') as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)

    def file(self, part): return self.folder/f'{part.name.replace(":", "-")}.json'

    def end(self, part, **entry):
        "Note how a part ended, after what it wrote itself"
        now = time.monotonic()
        self.results[part.name] = {**read_json(self.file(part)), 'seconds': round(now-self.since, 1), **entry}
        self.parts.remove(part)
        self.since,self.to_start = now,0

    def poll(self):
        "Take what has ended; kill the process if its part has had its time. Is it still running?"
        running = self.process.poll() is None
        for part in list(self.parts):
            entry = read_json(self.file(part))
            if entry.get('status','running')=='running': break
            self.end(part, seconds=entry['seconds'])
        if not running: return self.ended()
        if not self.parts: return True
        limit = self.parts[0].seconds+self.to_start
        now = time.monotonic()
        if now<self.deadline and now-self.since<limit: return True
        self.kill()
        end = dict(status='timeout', error=f'no end after {limit:.0f} s')
        if now>=self.deadline: end = dict(status='stopped', error='the time of the whole run is over')
        self.end(self.parts[0], **end)
        return False

    def ended(self):
        "The process has ended; a part that it has not ended crashed. False, since nothing is running"
        if self.parts:
            text = self.log.read_text(encoding='utf-8', errors='replace')
            code = self.process.returncode
            how = f'killed by {signal.Signals(-code).name}' if code<0 else f'the process ended with {code}'
            error = f'{how}; {last_line(text)}' if last_line(text) else how
            self.end(self.parts[0], status='crashed', error=error[:500])
        self.kill() # What it may have left running
        return False

    def kill(self):
        "End the process and all that it started"
        try: os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError,PermissionError): pass
        self.process.wait()

# ---- the run

NOTED = ('date','code','hardware','torch') # What each part notes of its run

class Run:
    "Runs parts in children and keeps `gpu.json`; `command` makes the command line of a child for some parts"
    def __init__(self, file, about, command, minutes=8, jobs=1, together=False, to_start=0):
        self.file,self.about,self.command = file,about,command
        self.jobs,self.together,self.to_start = jobs,together,to_start
        self.deadline = time.monotonic()+60*minutes
        self.folder = file.parent/EXTRA_FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries = read_entries(file, about)

    def missing(self, parts, again=()):
        "The parts that have not passed, and those to be run again"
        repeated = {part.name for part in again}
        return [part for part in parts if part.name in repeated or not self.passed(part)]

    def passed(self, part):
        "Has a part passed with this code, and on this kind of GPU as far as it is known?"
        entry = self.entries.get(part.name, {})
        machine = self.about.get('hardware')
        return (entry.get('status')=='passed' and entry.get('code')==self.about['code']
                and machine in (None, entry.get('hardware')))

    def record(self, name, entry):
        "Write `gpu.json` with the entry of a part, and print it"
        self.about.update(entry.pop('about', {}))
        self.entries[name] = {**entry, **{key: self.about[key] for key in NOTED if key in self.about}}
        note = {**self.about, 'parts': self.entries}
        with atomic_write(self.file) as partial_file:
            partial_file.write_text(json.dumps(note, indent=1, ensure_ascii=False), encoding='utf-8')
        print(f"{entry['status']:10} {entry['seconds']:6.1f} s  {name}: {one_line(entry)}", flush=True)

    def next_parts(self, todo, children):
        "The parts of the next child, taken from `todo`; none if it has to wait"
        if self.together: return [todo.pop(0) for _ in list(todo)] if not children else []
        free = len(children)<self.jobs if todo[0].beside and all(c.beside for c in children) else not children
        return [todo.pop(0)] if free else []

    def start(self, parts):
        command = self.command(parts, self.deadline-time.monotonic())
        at_once = self.jobs if parts[0].beside else 1
        return Child(parts, command, self.folder, self.deadline, self.to_start, few_threads(at_once))

    def run(self, parts):
        "Run the parts. What no time was left for stays as it was"
        todo,children = list(parts),[]
        try:
            while todo or children:
                if time.monotonic()>self.deadline-5: todo.clear()
                taken = self.next_parts(todo, children) if todo else []
                if taken: children.append(self.start(taken))
                else: time.sleep(.05)
                children = [child for child in children if self.follow(child, todo)]
        finally:
            for child in children: child.kill()

    def follow(self, child, todo):
        "Record what a child has ended. Is it still running? If not, the parts it never began are to be run by another"
        running = child.poll()
        for name,entry in child.results.items(): self.record(name, entry)
        child.results.clear()
        if not running: todo[:0] = child.parts
        return running

def read_entries(file, about):
    "The parts in `gpu.json` so far. Raises `ValueError` if they were run on another device, or in the other form"
    note = read_json(file)
    if not note: return {}
    if not isinstance(note, dict): raise ValueError(f"{file} is not of this script: choose another folder with --out")
    differ = [f'{key}: {note.get(key)!r} there, {about[key]!r} now' for key in ('device','reduced')
              if note.get(key)!=about[key]]
    if differ: raise ValueError(f"{file} has another run ({'; '.join(differ)}): choose another folder with --out")
    of_all = {key: note[key] for key in NOTED if key in note} # in a file of an earlier version
    return {name: {**of_all, **entry} for name,entry in note.get('parts', {}).items()}

# ---- tables

def one_line(entry):
    "What came of a part, in a line"
    return ' · '.join(filter(None, [entry.get('error'), (entry.get('result') or {}).get('text')]))

def table(rows):
    "Dicts of equal keys as a Markdown table"
    lines = [list(rows[0]), ['---']*len(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    return '\n'.join(f"| {' | '.join(line)} |" for line in lines)

def summary(note, parts):
    "All parts with their state, and the tables of those that have one"
    entries,rows = note.get('parts', {}),[]
    machines = {entry['hardware'] for entry in entries.values() if 'hardware' in entry}
    for part in parts:
        entry = entries.get(part.name, {'status': 'not run', 'seconds': 0})
        row = {'part': part.name, 'status': entry['status'], 'seconds': f"{entry['seconds']:.0f}"}
        if len(machines)>1: row['machine'] = entry.get('hardware', '')
        rows.append({**row, 'result': one_line(entry).replace('|', '/')})
    tables = [table(rows)]
    for part in parts:
        found = (entries.get(part.name, {}).get('result') or {}).get('rows')
        if found: tables.append(f'**{part.name}**: {part.about}\n\n{table(found)}')
    about = [str(note[key]) for key in ('command','hardware','date','torch') if note.get(key)]
    return '\n\n'.join([' · '.join(about), *tables])

# ---- the command

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', type=Path, help='the folder of Market-1501, with bounding_box_train in it')
    add('--weights', type=Path, help='file of ImageNet weights of a ResNet-50')
    add('--minutes', type=float, default=8, help='nothing runs longer; default 8')
    add('--device', choices=('cuda','fakegpu','cpu'), help='default: cuda')
    add('--reduced', action='store_true', help='small sizes and few parts, to try the script')
    add('--only', nargs='+', metavar='PART', default=(), help='run these parts alone')
    add('--again', nargs='+', metavar='PART', default=(), help='run these parts also if they passed')
    add('--list', action='store_true', help='name the parts, and run none')
    add('--jobs', type=int, default=min(6, max(1, (os.cpu_count() or 1)//2)),
        help='parts at a time, of those that are not timed')
    add('--out', type=Path, help='folder of gpu.json; default benchmarks/results, or demo/gpu-DEVICE for the others')
    args = parser.parse_args(argv)
    if args.device not in (None,'cuda') and not args.reduced:
        parser.error(f'--device {args.device} is there to try the script: add --reduced')
    for name in ('data','weights'):
        path = getattr(args, name)
        if path and not path.exists(): parser.error(f'--{name}: there is no {path}')
    if args.jobs<1 or args.minutes<=0: parser.error('--jobs is at least 1, and --minutes above 0')
    if args.data and not (args.data/'bounding_box_train').is_dir():
        parser.error(f'--data: {args.data} has no folder bounding_box_train: give the folder of Market-1501 itself')
    return args

def gpu_name():
    "The name of this machine's GPU; None: there is none"
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None

NO_GPU = """PyTorch finds no GPU here. On a machine with one, `nvidia-smi` lists it, and
  python -c 'import torch; print(torch.version.cuda, torch.cuda.is_available())'
prints a version and True; if it prints None, install a build of PyTorch for CUDA.
To try the script without a GPU: --device cpu --reduced, or --device fakegpu --reduced"""

def version_of_code():
    "Short hash of the source of the package and of this benchmark, which changes with any module"
    modules = [*sorted((ROOT/'pyramidreid').rglob('*.py')), *sorted((ROOT/'benchmarks').glob('gpu*.py'))]
    return hashlib.sha1(b''.join(module.read_bytes() for module in modules)).hexdigest()[:7]

def child_command(args, device, folder):
    "`command(parts, seconds left)` for `Run`"
    def command(parts, left):
        words = [sys.executable, Path(__file__).with_name('gpu_parts.py'), *(part.name for part in parts)]
        words += ['--device', device, '--folder', folder, '--seconds', f'{left:.1f}']
        if args.reduced: words.append('--reduced')
        if args.data: words += ['--data', args.data.absolute()]
        if args.weights: words += ['--weights', args.weights.absolute()]
        return list(map(str, words))
    return command

def main(argv=None):
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(143)) # So that children are killed then, too
    args = parse(argv)
    device = args.device or 'cuda'
    parts = plan(device, args.reduced)
    try: chosen,again = named(parts, args.only) if args.only else parts,named(parts, args.again)
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    if args.list:
        for part in chosen: print(f'{part.name:44} {part.seconds:4.0f} s  {part.about}')
        return 0
    machine = gpu_name() if device=='cuda' else None
    if device=='cuda' and machine is None:
        print(NO_GPU, file=sys.stderr)
        return 2
    return run_parts(args, device, parts, chosen, again, machine)

def run_parts(args, device, parts, chosen, again, machine=None):
    "Run the chosen parts and print the table; 0 if all of them passed, or had no data or no time"
    folder = args.out or (ROOT/'benchmarks'/'results' if device=='cuda' else ROOT/'demo'/f'gpu-{device}')
    arguments = [Path(arg).name for arg in sys.argv[1:]]
    about = dict(command=' '.join(['python benchmarks/gpu.py', *arguments]), date=time.strftime('%Y-%m-%d'),
                 device=device, reduced=args.reduced, code=version_of_code())
    if machine: about['hardware'] = machine
    command = child_command(args, device, (folder/EXTRA_FOLDER).absolute())
    file = folder.absolute()/'gpu.json'
    to_start = COMPILES if device=='fakegpu' else 0
    try: run = Run(file, about, command, args.minutes, args.jobs, args.reduced and device!='cuda', to_start)
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    run.run(run.missing(chosen, again))
    print('\n'+summary(read_json(file), parts))
    ended = [run.entries.get(part.name, {}).get('status') for part in chosen]
    return 1 if {'failed','crashed','timeout'} & set(ended) else 0

if __name__=='__main__': sys.exit(main())
