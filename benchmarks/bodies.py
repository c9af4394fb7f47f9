"""What a backbone costs: parameters of the whole model, multiply-adds for one crop, and crops per second on one core.
`python benchmarks/bodies.py` measures what is not in `results/bodies.json` yet, `--again` everything; `NAME …` chooses
backbones. Each line is written when it is measured.

The model is the pyramid of 6 parts, all levels, 128 dimensions for each branch, 751 identities. A body of stride 16
has 16 rows at 256×128, which 6 parts do not divide: there the model has 4. Multiply-adds are those of the embedding,
counted by PyTorch (half of its FLOPs). Crops per second: PyTorch, float32, batches of 16 at the larger size, 1 thread,
the median of several batches."""
import argparse
import json
import os
import statistics
import time

import torch
from common import circumstances, markdown, noted, results, write_runs, write_table

N_IDS,EMB_SZ,BATCH = 751,128,16
SIZES = {6:(384,128), 4:(256,128)} # by number of parts
PATCH_14 = {6:(336,112), 4:(224,112)} # as many patches of 14 pixels as of 16 in those

# Name: last stride, sizes
BODIES = {name: (1,SIZES) for name in (
    'resnet18', 'resnet50', 'tf_efficientnet_lite0', 'tf_efficientnet_lite1', 'tf_efficientnet_lite2',
    'mobilenetv2_100', 'mobilenetv4_conv_small', 'repvit_m0_9', 'tiny_vit_5m_224', 'fastvit_t8', 'convnextv2_atto',
    'convnextv2_nano', 'vit_tiny_patch16_224', 'vit_small_patch16_224', 'vit_base_patch16_224',
    'deit_small_patch16_224')}
BODIES['eva02_small_patch14_224'] = (1,PATCH_14)
BODIES |= {name: (1,SIZES) for name in ('swin_tiny_patch4_window7_224', 'swin_base_patch4_window7_224')}
BODIES |= {name: (2,SIZES) for name in ('efficientformerv2_s0', 'efficientformerv2_s1')}

def build(name, n_parts):
    "The whole model, with random weights, for the size that goes with `n_parts`"
    from fastai.vision.all import resnet18, resnet50

    from pyramidreid.models.backbone import create_backbone
    from pyramidreid.models.pyramid import PyramidNet
    last_stride,sizes = BODIES[name]
    arch = dict(resnet18=resnet18, resnet50=resnet50).get(name, name)
    body = create_backbone(arch, pretrained=False, last_stride=last_stride, size=sizes[n_parts])
    return PyramidNet(body, N_IDS, n_parts=n_parts, emb_sz=EMB_SZ).eval()

def multiply_adds(model, size):
    "Multiply-adds of a model for one image, as PyTorch counts them; no value is computed"
    from torch.utils.flop_counter import FlopCounterMode
    model = model.to('meta')
    with torch.no_grad(),FlopCounterMode(display=False) as counter: model(torch.empty(1, 3, *size, device='meta'))
    return counter.get_total_flops()//2

def crops_per_second(model, size, seconds):
    "The median of as many batches as fit into `seconds`, at least two"
    x,times,start = torch.randn(BATCH, 3, *size),[],time.perf_counter()
    with torch.no_grad():
        model(x[:2]) # warms up
        while len(times)<2 or time.perf_counter()-start<seconds:
            begun = time.perf_counter()
            model(x)
            times.append(time.perf_counter()-begun)
    return BATCH/statistics.median(times)

def measure(name, seconds):
    "A row of the table"
    last_stride,sizes = BODIES[name]
    model = build(name, 6)
    with torch.no_grad(): rows,columns = model.body(torch.zeros(1, 3, *sizes[6])).shape[-2:]
    rate = crops_per_second(model, sizes[6], seconds)
    return dict(
        name=name, last_stride=last_stride, size=sizes[6], map=[rows,columns], small_size=sizes[4],
        parameters=sum(p.numel() for p in model.parameters()), macs=multiply_adds(model, sizes[6]),
        small_macs=multiply_adds(build(name, 4), sizes[4]), crops_per_second=rate, load=os.getloadavg()[0],
        hardware=circumstances()['hardware'], date=circumstances()['date'])

def table_of(runs):
    "The table as shown, a frame"
    import pandas as pd
    def text(size): return '{}×{}'.format(*size)
    def cost(run, key, size): return f'{run[key]/1e9:.2f}' + ('' if run[size][1]==128 else f' ({text(run[size])})')
    rows = {run['name']: {
        'map at 384×128': text(run['map']), 'parameters, M': f"{run['parameters']/1e6:.1f}",
        'GMACs at 384×128': cost(run, 'macs', 'size'), 'GMACs at 256×128': cost(run, 'small_macs', 'small_size'),
        'crops/s, one core': f"{run['crops_per_second']:.1f}"} for run in runs}
    return pd.DataFrame(rows).T.rename_axis('body')

def busy_words(runs):
    "A warning, if the machine had other work while it was measured"
    busy = max(run['load'] for run in runs)
    if busy<=1.5: return ''
    return f'The machine had other work (load average up to {busy:.1f}): all speeds are too low.'

def page_table():
    "Table and conditions for the page on backbones, as Markdown"
    info,runs = json.loads((results/'bodies.json').read_text()),noted('bodies.json')
    version = info['torch'].split('+')[0]
    source = f"`python benchmarks/bodies.py` · {info['hardware']} · {info['date']} · torch {version}"
    return '\n\n'.join(filter(None, [markdown(table_of(runs)), source, busy_words(runs)]))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='backbones; all if none are given')
    parser.add_argument('--again', action='store_true', help='measure what is in the results already')
    parser.add_argument('--seconds', type=float, default=4., help='seconds for the speed of each')
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BODIES]
    if unknown: parser.error(f"{', '.join(unknown)}: choose from {', '.join(BODIES)}")
    torch.set_num_threads(1)
    done = {run['name']: run for run in noted('bodies.json')}
    for name in args.names or BODIES:
        if name in done and not args.again: continue
        done[name] = json.loads(json.dumps(measure(name, args.seconds)))
        print(name, f"{done[name]['crops_per_second']:.1f} crops/s", flush=True)
        write_runs('bodies.json', [done[known] for known in BODIES if known in done], None)
    runs = noted('bodies.json')
    text = 'The whole model: 6 parts, all levels, 128 dimensions a branch, 751 identities; at 256×128, 4 parts.'
    write_table('bodies', 'What a backbone costs', markdown(table_of(runs)), f'{text} {busy_words(runs)}'.strip())

if __name__=='__main__': main()
