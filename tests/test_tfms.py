"Transforms of whole batches do to each image what PIL and torchvision do to one: exactly for a given draw, and as often for a random one"
import itertools

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from fastai.vision.all import IntToFloatTensor, PILImage, Pipeline, TensorImage, ToTensor, set_seed
from PIL import Image

from pyramidreid.data.transforms import *
from pyramidreid.data.transforms import _in_two_passes


def picture(h, w, seed=0):
    "Soft blobs of colour with a little noise"
    g = np.random.default_rng(seed)
    im = Image.fromarray(g.integers(0, 256, (max(2,h//8),max(2,w//8),3)).astype(np.uint8)).resize((w,h), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(im).astype(int)+g.integers(-8, 9, (h,w,3))).clip(0,255).astype(np.uint8))

def batch(*ims): return torch.stack([torch.from_numpy(np.array(im)).permute(2,0,1) for im in ims])
def draw(tfm, x): return tfm(TensorImage(x), split_idx=0).as_subclass(torch.Tensor)
def quantiles(x): return torch.quantile(x.flatten().float(), torch.linspace(.05, .95, 10))

# resize

@pytest.mark.parametrize('noise', [False,True])
@pytest.mark.parametrize('to', [(384,128),(256,128),(128,64),(130,64),(128,90),(40,20)])
def test_resize_is_pils_to_rounding(to, noise):
    "At most a level apart by PyTorch's arithmetic of bytes, two by that of floats, and that for a pixel in a hundred"
    ims = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (128,64,3)).astype(np.uint8)) if noise else picture(128, 64, i) for i in range(3)]
    x,want = batch(*ims),batch(*[im.resize(to[::-1], Image.Resampling.BICUBIC) for im in ims]).int()
    for f,levels in ((resize_bicubic,1),(_in_two_passes,2)):
        got = f(x, to)
        assert got.dtype==torch.uint8 and got.shape==want.shape
        off = (got.int()-want).abs()
        assert off.max()<=levels and off.float().mean()<.02
    assert torch.equal(ResizeEach(to)(TensorImage(x)), resize_bicubic(x, to))

def test_resize_to_the_same_size_does_nothing():
    x = batch(picture(48, 24))
    assert resize_bicubic(x, (48,24)) is x
    assert ResizeEach(32)(TensorImage(x)).shape==(1,3,32,32)
    assert type(ResizeEach((48,24))(TensorImage(x))) is TensorImage

# flip and shift

def test_flips_are_mirror_images():
    ims = [picture(20, 11, i) for i in range(6)]
    which = torch.tensor([1,0,0,1,1,0]).bool()
    want = batch(*[TF.hflip(im) if w else im for im,w in zip(ims,which)])
    assert torch.equal(flip_images(batch(*ims), which), want)

@pytest.mark.parametrize('prob', [0.,.2,.5,1.])
def test_flips_as_often_as_asked(prob):
    set_seed(0)
    y = draw(FlipEach(prob), torch.arange(4.).expand(5000,3,1,4))
    n = (y[:,0,0,0]==3).sum().item()
    assert abs(n-5000*prob) <= 4*(5000*prob*(1-prob))**.5
    assert ((y==y[:,:1]).all()) and set(y[:,0,0,0].tolist())<={0.,3.}

def test_every_cut_is_pils():
    pad,im = 3,picture(14, 9)
    places = list(itertools.product(range(-pad,pad+1), repeat=2))
    want = batch(*[im.crop((l,t,l+im.width,t+im.height)) for l,t in places])
    left,top = torch.tensor(places).T
    assert torch.equal(crop_images(batch(im).repeat(len(places),1,1,1), left, top, pad), want)

def test_cuts_are_everywhere_alike():
    set_seed(0)
    h,w,pad = 8,6,2
    code = torch.arange(1., h*w+1).view(1,1,h,w).expand(5000,3,h,w)
    y = draw(PadCropEach(pad), code)[:,0,h//2,w//2].long()-1-(h//2*w+w//2)
    counts = torch.stack([(y==t*w+l).sum() for t in range(-pad,pad+1) for l in range(-pad,pad+1)])
    assert counts.sum()==5000 and (counts-200).abs().max()<60 # 200 ± 14

# colour

@pytest.mark.parametrize('order', itertools.permutations(range(3)))
def test_recolour_is_torchvisions_in_any_order(order):
    g = torch.Generator().manual_seed(sum(10**i*o for i,o in enumerate(order)))
    x,factors = torch.rand(5,3,12,7, generator=g),torch.rand(5,3, generator=g)*2
    ops = (TF.adjust_brightness,TF.adjust_contrast,TF.adjust_saturation)
    want = x.clone()
    for o in order: want = torch.stack([ops[o](im, f[o].item()) for im,f in zip(want,factors)])
    got = recolour_images(x, factors, torch.tensor(order).repeat(5,1))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)

def test_recolour_has_an_order_for_each_image():
    x,factors = torch.rand(6,3,12,7),torch.rand(6,3)*2
    orders = torch.tensor(list(itertools.permutations(range(3))))
    got = recolour_images(x, factors, orders)
    want = torch.cat([recolour_images(x[i:i+1], factors[i:i+1], orders[i:i+1]) for i in range(6)])
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got[0], recolour_images(x[:1], factors[:1], orders[5:])[0])

def test_recolour_is_pils_to_some_levels():
    "PIL rounds after each of the three"
    im = picture(48, 24)
    f = dict(brightness=1.2, contrast=.8, saturation=1.3)
    want = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(im, f['brightness']), f['contrast']), f['saturation'])
    got = recolour_images(batch(im).float()/255, torch.tensor([list(f.values())]), torch.tensor([[0,1,2]]))*255
    assert (got-batch(want)).abs().max()<4 and (got-batch(want)).abs().mean()<1.5

def test_colours_vary_as_much_as_those_of_single_images():
    set_seed(0)
    im,n = picture(24, 12),1000
    single = batch(*[ColourJitter(.3)(im, split_idx=0) for _ in range(n)]).float()/255
    whole = draw(ColourEach(.3), (batch(im).float()/255).repeat(n,1,1,1))
    for stat in (lambda o: o.mean((1,2,3)), lambda o: o.std((1,2,3)), lambda o: (o.amax(1)-o.amin(1)).mean((1,2))):
        torch.testing.assert_close(quantiles(stat(whole)), quantiles(stat(single)), atol=.02, rtol=0)

# erase

class Boxes(torchvision.transforms.RandomErasing):
    "torchvision's boxes: top, left, height, width; height 0 where none fitted"
    def draw(self, n, h, w):
        x,res = torch.zeros(3,h,w),[]
        for _ in range(n):
            t,l,bh,bw,v = self.get_params(x, self.scale, self.ratio, [0.])
            res.append((t,l,0 if v is x else bh,bw))
        return torch.tensor(res)

@pytest.mark.parametrize('size', [(384,128),(48,24),(60,8)])
def test_boxes_are_torchvisions(size):
    set_seed(0)
    n = 4000
    ours,theirs = erase_boxes(n, *size),Boxes(p=1.).draw(n, *size)
    for b in (ours,theirs): assert ((b[:,0]+b[:,2]<=size[0]) & (b[:,1]+b[:,3]<=size[1])).all() and (b>=0).all()
    missed = [(b[:,2]==0).float().mean().item() for b in (ours,theirs)]
    assert missed[0]==pytest.approx(missed[1], abs=.02)
    ours,theirs = (b[b[:,2]>0].double() for b in (ours,theirs))
    area,shape = (lambda b: b[:,2]*b[:,3]/(size[0]*size[1])),(lambda b: (b[:,2]/b[:,3]).log())
    row,col = (max(.035, 1.01/o) for o in size)
    for stat,tol in ((area,.02),(shape,.08),(lambda b: b[:,0]/size[0],row),(lambda b: b[:,1]/size[1],col),(lambda b: (b[:,0]+b[:,2])/size[0],row)):
        torch.testing.assert_close(quantiles(stat(ours)), quantiles(stat(theirs)), atol=tol, rtol=0)

def test_no_box_where_none_fits():
    assert (erase_boxes(50, 1, 1)[:,2]==0).all()
    x = torch.rand(20,3,1,1)
    assert torch.equal(draw(EraseEach(1.), x), x)
    assert erase_boxes(0, 8, 8).shape==(0,4)

def test_noise_in_the_boxes_and_nowhere_else():
    set_seed(0)
    x = torch.full((40,3,48,24), 9.)
    which,boxes = torch.arange(0,40,2),erase_boxes(20, 48, 24)
    y = erase_images(x, which, boxes)
    assert (x==9).all() and torch.equal(y[1::2], x[1::2])
    values = []
    for i,(t,l,h,w) in zip(which, boxes.tolist()):
        inside = torch.zeros(48,24, dtype=bool)
        inside[t:t+h,l:l+w] = True
        assert (y[i][:,~inside]==9).all() and (y[i][:,inside]!=9).all()
        values.append(y[i][:,inside].flatten())
    assert len({round(v[0].item(),4) for v in values})==20
    values = torch.cat(values)
    assert values.mean().abs()<.03 and abs(values.std()-1)<.03

@pytest.mark.parametrize('prob', [0.,.2,.5,1.])
def test_erases_as_often_as_asked(prob):
    set_seed(0)
    n = 2000
    y = draw(EraseEach(prob), torch.zeros(n,3,16,8))
    hit = (y!=0).flatten(1).any(1).sum().item()
    assert abs(hit-n*prob) <= 4*(n*prob*(1-prob))**.5+.02*n*(prob==1)

# all together

def through(item, after, im, n):
    load = Pipeline([*item, ToTensor()], split_idx=0)
    return Pipeline([IntToFloatTensor(), *after], split_idx=0)(TensorImage(torch.stack([load(PILImage.create(im)) for _ in range(n)])))

@pytest.mark.parametrize('tfms', [person_tfms,strong_tfms])
def test_both_kinds_have_the_same_mean_and_spread(tfms):
    "Of each pixel over many draws, and of each draw over its pixels"
    set_seed(0)
    im,size,n = picture(32, 16),(48,24),800
    single = through(*tfms(size), im, n)
    resize,after = tfms(size, batch=True)
    whole = Pipeline([IntToFloatTensor(), ResizeEach(size), *after], split_idx=0)(TensorImage(batch(im).repeat(n,1,1,1)))
    assert type(whole) is type(single) is TensorImage and whole.shape==single.shape
    a,b = (o.as_subclass(torch.Tensor) for o in (whole,single))
    se = (b.var(0)/n+a.var(0)/n).sqrt()
    assert ((a.mean(0)-b.mean(0)).abs()/se).mean()<1.3 # 0.8 if alike
    assert (a.std(0)-b.std(0)).abs().mean()<.04 and (a.std(0)-b.std(0)).mean().abs()<.015
    for stat in (lambda o: o.mean((1,2,3)), lambda o: o.std((1,2,3))):
        torch.testing.assert_close(quantiles(stat(a)), quantiles(stat(b)), atol=.02, rtol=0)

def test_what_is_made():
    names = lambda o: [type(t).__name__ for t in o]
    assert [names(o) for o in person_tfms()]==[['Resize','FlipItem'],['EraseEach']]
    assert [names(o) for o in person_tfms(batch=True)]==[['Resize'],['FlipEach','EraseEach']]
    assert [names(o) for o in strong_tfms()]==[['Resize','FlipItem','PadCrop','ColourJitter'],['EraseEach']]
    assert [names(o) for o in strong_tfms(batch=True)]==[['Resize'],['FlipEach','EraseEach','PadCropEach','ColourEach']]
    assert [names(o) for o in strong_tfms(pad=0, erase=0, colour=0, batch=True)]==[['Resize'],['FlipEach']]
    assert names(Pipeline([IntToFloatTensor(), ResizeEach(8), *strong_tfms(batch=True)[1]]).fs)==['FlipEach','ResizeEach','PadCropEach','IntToFloatTensor','ColourEach','EraseEach']

EACH = [FlipEach(), PadCropEach(3), ColourEach(.2), EraseEach(.5)]

@pytest.mark.parametrize('tfm', EACH, ids=lambda o: type(o).__name__)
def test_validation_images_are_left_alone(tfm):
    x = TensorImage(torch.rand(16,3,12,8))
    assert tfm(x, split_idx=1) is x and not torch.equal(tfm(x, split_idx=0), x)

@pytest.mark.parametrize('tfm', EACH, ids=lambda o: type(o).__name__)
def test_a_seed_decides_and_nothing_is_changed_in_place(tfm):
    x = torch.rand(16,3,12,8)
    given = x.clone()
    res = []
    for seed in (1,1,2):
        set_seed(seed)
        res.append(draw(tfm, x))
    assert torch.equal(res[0], res[1]) and not torch.equal(res[0], res[2]) and torch.equal(x, given)
    state = torch.get_rng_state()
    first = draw(tfm, x)
    torch.set_rng_state(state)
    assert torch.equal(draw(tfm, x), first)

@pytest.mark.parametrize('tfm', [*EACH, ResizeEach((24,12))], ids=lambda o: type(o).__name__)
def test_no_shape_depends_on_what_is_on_the_device(tfm):
    "On the meta device there are shapes and no values, so whoever waits for a value fails"
    set_seed(0)
    x = TensorImage(torch.empty(16,3,12,8, dtype=torch.uint8 if isinstance(tfm, (FlipEach,PadCropEach,ResizeEach)) else torch.float32, device='meta'))
    y = tfm(x, split_idx=0)
    assert y.device.type=='meta' and y.dtype==x.dtype and y.shape[:2]==x.shape[:2]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu_nobody_waits_and_all_is_the_same():
    x = batch(*[picture(32, 16, i) for i in range(16)])
    pipe = lambda erase: Pipeline([IntToFloatTensor(), ResizeEach((48,24)), *strong_tfms((48,24), erase=erase, batch=True)[1]], split_idx=0)
    set_seed(0)
    here = pipe(0)(TensorImage(x))
    there = x.cuda()
    for erase in (0,.5):
        pipe(erase)(TensorImage(there)) # the first call loads kernels
        set_seed(0)
        torch.cuda.set_sync_debug_mode('error')
        try: out = pipe(erase)(TensorImage(there))
        finally: torch.cuda.set_sync_debug_mode('default')
        if not erase: assert (out.cpu()-here).abs().max()<2.5/255
