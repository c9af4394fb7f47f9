"""A pretend GPU for machines without one. Import it before the library under test:

    import fakegpu                      # compiles fakegpu.cpp once (a minute or two), registers the device 'fakegpu'
    from pyramidreid.all import *
    fakegpu.make_default()              # fastai's default_device() is now 'fakegpu'

    with fakegpu.watch() as seen: learn.fit(1)
    seen.show()                         # each line where the host waited for the device, or copied to or from it

README.md says what it can and cannot show."""
import collections
import hashlib
import os
import sys
import traceback
import types
from pathlib import Path

import torch
from filelock import FileLock


def _build():
    from torch.utils.cpp_extension import load
    source = Path(__file__).with_name('fakegpu.cpp')
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode() + sys.version.encode()).hexdigest()[:12]
    out = Path(os.environ.get('FAKEGPU_CACHE', Path.home()/'.cache'/'fakegpu'))/key
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault('MAX_JOBS', '1')
    with FileLock(out/'build.lock'): # One process at a time, so that torch's own lock was left by one that was killed
        (out/'lock').unlink(missing_ok=True)
        return load('fakegpu_c', [str(source)], build_directory=str(out), extra_cflags=['-O1','-w'], with_cuda=False)

class _Device:
    "`torch.fakegpu.device`"
    def __init__(self, device=None): pass
    def __enter__(self): return self
    def __exit__(self, *args): pass

def _device_module():
    "`torch.fakegpu`, as far as training with fastai asks for it; its random numbers are the CPU's"
    module = types.ModuleType('torch.fakegpu')
    functions = dict(
        is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
        set_device=lambda device: None, _is_in_bad_fork=lambda: False, synchronize=lambda *args: None,
        manual_seed_all=lambda seed: None, manual_seed=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16], is_bf16_supported=lambda *args, **kwargs: True,
        get_rng_state=lambda *args: torch.get_rng_state(), get_rng_state_all=lambda: [torch.get_rng_state()],
        set_rng_state=lambda *args: None, set_rng_state_all=lambda states: None, device=_Device)
    for name,function in functions.items(): setattr(module, name, function)
    return module

_waits,_on = collections.Counter(),[False]

def _note(kind, what):
    "Called by the device for each wait and each copy"
    if not _on[0]: return
    stack = [frame for frame in traceback.extract_stack()[:-1] if Path(frame.filename)!=Path(__file__)]
    own = [frame for frame in stack if 'pyramidreid/' in frame.filename or 'fastai/' in frame.filename]
    frame = (own or stack or [traceback.FrameSummary('backward', 0, '', line='')])[-1]
    where = f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
    _waits[(kind, '' if kind=='item' else what, where, (frame.line or '')[:90])] += 1

class watch:
    "Count what happens on the device inside the block: `waits`, `counts` of operations, `launches` of kernels"
    def __enter__(self):
        _waits.clear()
        C.reset()
        _on[0] = True
        return self

    def __exit__(self, *args):
        _on[0] = False
        self.waits,self.counts,self.launches = dict(_waits),C.counts(),C.launches()

    def n(self, *kinds):
        "How often it waited or copied in one of these ways"
        return sum(n for (kind,*_),n in self.waits.items() if kind in kinds)

    def n_waits(self):
        "How often the host waited for the device"
        return self.n('D2H', 'item', 'wait', 'H2D')

    def show(self, per=1):
        "Print each line that waited or copied, most frequent first; numbers are divided by `per`, e.g. the steps"
        lines = collections.Counter()
        for (kind,what,where,line),n in self.waits.items(): lines[(kind, '' if '2' in kind else what, where, line)] += n
        for (kind,what,where,line),n in lines.most_common():
            print(f'{n/per:7.2f}  {kind:12} {what:22.22} {where:38} {line}')

def make_default():
    "Let fastai put loaders and models on the pretend GPU from now on, and let its `MixedPrecision` work there"
    import fastai.callback.fp16 as fp16
    import fastai.vision.all  # noqa: F401, so that all modules are loaded
    for name,module in list(sys.modules.items()):
        if name.startswith('fastai') and callable(getattr(module, 'default_device', None)):
            module.default_device = lambda use=-1: torch.device('fakegpu', 0)
    fp16.autocast = lambda device, **kwargs: torch.autocast('fakegpu', **kwargs)
    fp16.GradScaler = lambda device, **kwargs: torch.amp.GradScaler('fakegpu', **kwargs)

def memory():
    "Bytes on the device: now, and at most since the last `C.reset_peak()`"
    return C.memory()

# Parameters stay the same objects when a module moves, as on CUDA
torch.__future__.set_swap_module_params_on_conversion(True)
torch.utils.rename_privateuse1_backend('fakegpu')
torch._register_device_module('fakegpu', _device_module())
C = _build()
torch.utils.generate_methods_for_privateuse1_backend()
C.set_hook(_note)
