"""What `fakegpu.py` offers, for a real device: `cases.py` runs on it, too. The kinds of waits cannot be told apart
there, copies that do not wait are not seen, and on a CPU no wait is."""
import collections
import os
import traceback
import warnings
from pathlib import Path

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8') # Before CUDA starts: the same results in each run

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

DEVICE = os.environ['CASES_DEVICE']
HERE = Path(__file__).name

def make_default():
    "Let fastai put loaders and models on the device, and let results repeat, in full single precision"
    from fastai.torch_core import default_device
    default_device(DEVICE!='cpu')
    torch.backends.cudnn.benchmark,torch.backends.cudnn.deterministic = False,True
    torch.backends.cudnn.allow_tf32,torch.backends.cuda.matmul.allow_tf32 = False,False
    torch.use_deterministic_algorithms(True, warn_only=True)

class _Operations(TorchDispatchMode):
    "Counts the operations with tensors on the device"
    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        tensors = [o for o in tree_leaves((args, kwargs, res)) if isinstance(o, torch.Tensor)]
        if any(o.device.type==DEVICE for o in tensors): self.counts[func.name()] += 1
        return res

def _line_of_ours():
    "File, number and text of the line that is running, in pyramidreid or fastai if it is"
    stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).name not in (HERE, 'warnings.py')]
    own = [frame for frame in stack if 'pyramidreid/' in frame.filename or 'fastai/' in frame.filename]
    frame = (own or stack)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}",(frame.line or '')[:90]

class watch:
    "Count what happens on the device inside the block: `waits`, `counts` of operations, and `launches`, all of them"
    def __enter__(self):
        self.waits,self.operations,self.caught = collections.Counter(),_Operations(),warnings.catch_warnings()
        self.caught.__enter__()
        warnings.showwarning,self.shown = self._note,warnings.showwarning
        warnings.filterwarnings('always', '.*synchronizing CUDA operation')
        if DEVICE=='cuda': torch.cuda.set_sync_debug_mode('warn')
        self.operations.__enter__()
        return self

    def _note(self, message, *args, **kwargs):
        if 'synchronizing CUDA operation' in str(message): self.waits[('wait', 'synchronises', *_line_of_ours())] += 1
        else: self.shown(message, *args, **kwargs)

    def __exit__(self, *args):
        self.operations.__exit__(*args)
        if DEVICE=='cuda': torch.cuda.set_sync_debug_mode('default')
        self.caught.__exit__(*args)
        self.waits,self.counts = dict(self.waits),dict(self.operations.counts)
        self.launches = sum(self.counts.values())

    def n_waits(self):
        "How often the host waited for the device"
        return sum(self.waits.values())

    def show(self, per=1):
        "Print each line that waited, most frequent first; numbers are divided by `per`, e.g. the steps"
        for (_,_,where,line),n in collections.Counter(self.waits).most_common():
            print(f'{n/per:7.2f}  {where:38} {line}')
