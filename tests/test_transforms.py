"""Transforms of whole batches do to each image what PIL and torchvision do to one:
exactly for given random numbers, and as often for new ones"""
import itertools

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from fastai.vision.all import IntToFloatTensor, PILImage, Pipeline, TensorImage, ToTensor, set_seed
from PIL import Image

from pyramidreid.data.transforms import *
from pyramidreid.data.transforms import _bicubic_in_two_passes

TRAIN,VALID = 0,1 # fastai's `split_idx`

def picture(height, width, seed=0):
    "Soft blobs of colour with a little noise"
    rng = np.random.default_rng(seed)
    blobs = rng.integers(0, 256, (max(2, height//8),max(2, width//8),3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(blobs).resize((width,height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth+rng.integers(-8, 9, (height,width,3))).clip(0, 255).astype(np.uint8))

def noise_picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height,width,3)).astype(np.uint8))

def batch(*ims): return torch.stack([torch.from_numpy(np.array(im)).permute(2,0,1) for im in ims])

def applied(tfm, x):
    "A batch after a transform of the training set"
    return tfm(TensorImage(x), split_idx=TRAIN).as_subclass(torch.Tensor)

def quantiles(x): return torch.quantile(x.flatten().float(), torch.linspace(.05, .95, 10))

def assert_same_quantiles(a, b, tolerance):
    torch.testing.assert_close(quantiles(a), quantiles(b), atol=tolerance, rtol=0)

def assert_binomial(n_hits, n, prob):
    "Within four standard deviations"
    assert abs(n_hits-n*prob)<=4*(n*prob*(1-prob))**.5

def image_means(x): return x.mean((1,2,3))
def image_spreads(x): return x.std((1,2,3))
def image_saturations(x): return (x.amax(1)-x.amin(1)).mean((1,2))

# resize

@pytest.mark.parametrize('make', [picture,noise_picture])
@pytest.mark.parametrize('size', [(384,128), (256,128), (128,64), (130,64), (128,90), (40,20)])
def test_resize_is_pils_to_rounding(size, make):
    "At most one level apart with uint8 arithmetic, two with floats, and that for a pixel in a hundred"
    ims = [make(128, 64, seed) for seed in range(3)]
    height,width = size
    x = batch(*ims)
    want = batch(*[im.resize((width,height), Image.Resampling.BICUBIC) for im in ims]).int()
    for resize,levels in ((resize_bicubic,1), (_bicubic_in_two_passes,2)):
        got = resize(x, size)
        assert got.dtype==torch.uint8 and got.shape==want.shape
        difference = (got.int()-want).abs()
        assert difference.max()<=levels and difference.float().mean()<.02
    assert torch.equal(ResizeEach(size)(TensorImage(x)), resize_bicubic(x, size))

def test_resize_to_the_same_size_does_nothing():
    x = batch(picture(48, 24))
    assert resize_bicubic(x, (48,24)) is x
    assert ResizeEach(32)(TensorImage(x)).shape==(1,3,32,32)
    assert type(ResizeEach((48,24))(TensorImage(x))) is TensorImage

# flip and shift

def test_flips_are_mirror_images():
    ims = [picture(20, 11, seed) for seed in range(6)]
    which = torch.tensor([1,0,0,1,1,0]).bool()
    want = batch(*[TF.hflip(im) if mirrored else im for im,mirrored in zip(ims, which)])
    assert torch.equal(flip_images(batch(*ims), which), want)

@pytest.mark.parametrize('prob', [0., .2, .5, 1.])
def test_flips_as_often_as_asked(prob):
    set_seed(0)
    columns = torch.arange(4.)
    y = applied(FlipEach(prob), columns.expand(5000,3,1,4))
    flipped = (y==columns.flip(0)).flatten(1).all(1)
    kept = (y==columns).flatten(1).all(1)
    assert (flipped|kept).all()
    assert_binomial(flipped.sum().item(), 5000, prob)

def test_every_crop_is_pils():
    pad,im = 3,picture(14, 9)
    offsets = list(itertools.product(range(-pad, pad+1), repeat=2))
    want = batch(*[im.crop((left, top, left+im.width, top+im.height)) for left,top in offsets])
    left,top = torch.tensor(offsets).T
    assert torch.equal(crop_images(batch(im).repeat(len(offsets),1,1,1), left, top, pad), want)

def test_all_crops_are_equally_likely():
    set_seed(0)
    height,width,pad = 8,6,2
    numbered = torch.arange(1., height*width+1).view(1,1,height,width).expand(5000,3,height,width)
    middle = applied(PadCropEach(pad), numbered)[:,0,height//2,width//2].long()
    shift = middle-numbered[0,0,height//2,width//2].long()
    offsets = itertools.product(range(-pad, pad+1), repeat=2)
    counts = torch.stack([(shift==top*width+left).sum() for top,left in offsets])
    assert counts.sum()==5000 and (counts-200).abs().max()<60 # 200 ± 14

# colour

@pytest.mark.parametrize('order', itertools.permutations(range(3)))
def test_recolour_is_torchvisions_in_any_order(order):
    g = torch.Generator().manual_seed(sum(10**i*o for i,o in enumerate(order)))
    x,factors = torch.rand(5,3,12,7, generator=g),torch.rand(5,3, generator=g)*2
    changes = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    want = x.clone()
    for i in order: want = torch.stack([changes[i](im, factor[i].item()) for im,factor in zip(want, factors)])
    got = recolour_images(x, factors, torch.tensor(order).repeat(5,1))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)

def test_recolour_has_an_order_for_each_image():
    set_seed(0)
    x,factors = torch.rand(6,3,12,7),1+torch.rand(6,3) # bright: without clipping at 1 the order does not matter
    orders = torch.tensor(list(itertools.permutations(range(3))))
    got = recolour_images(x, factors, orders)
    want = torch.cat([recolour_images(x[i:i+1], factors[i:i+1], orders[i:i+1]) for i in range(6)])
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got[0], recolour_images(x[:1], factors[:1], orders[5:])[0])

def test_recolour_is_pils_to_a_few_levels():
    "PIL rounds after each of the three changes"
    im = picture(48, 24)
    want = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(im, 1.2), .8), 1.3)
    got = recolour_images(batch(im).float()/255, torch.tensor([[1.2,.8,1.3]]), torch.tensor([[0,1,2]]))*255
    difference = (got-batch(want)).abs()
    assert difference.max()<4 and difference.mean()<1.5

def test_colours_vary_as_much_as_those_of_single_images():
    set_seed(0)
    im,n = picture(24, 12),1000
    one_by_one = batch(*[ColourJitter(.3)(im, split_idx=TRAIN) for _ in range(n)]).float()/255
    at_once = applied(ColourEach(.3), (batch(im).float()/255).repeat(n,1,1,1))
    for statistic in (image_means, image_spreads, image_saturations):
        assert_same_quantiles(statistic(at_once), statistic(one_by_one), .02)

# erase

class TorchvisionBoxes(torchvision.transforms.RandomErasing):
    def draw(self, n, height, width):
        "Top, left, height and width of `n` boxes; height 0 where none fitted"
        x,boxes = torch.zeros(3, height, width),[]
        for _ in range(n):
            top,left,box_height,box_width,value = self.get_params(x, self.scale, self.ratio, [0.])
            boxes.append((top, left, 0 if value is x else box_height, box_width))
        return torch.tensor(boxes)

@pytest.mark.parametrize('size', [(384,128), (48,24), (60,8)])
def test_boxes_are_torchvisions(size):
    set_seed(0)
    n,(height,width) = 4000,size
    both = erase_boxes(n, height, width),TorchvisionBoxes(p=1.).draw(n, height, width)
    for top,left,box_height,box_width in (boxes.T for boxes in both):
        assert min(top.min(), left.min(), box_height.min(), box_width.min())>=0
        assert (top+box_height).max()<=height and (left+box_width).max()<=width
    missed = [(boxes[:,2]==0).float().mean().item() for boxes in both]
    assert missed[0]==pytest.approx(missed[1], abs=.02)
    ours,theirs = (boxes[boxes[:,2]>0].double().T for boxes in both)
    row_tolerance,col_tolerance = (max(.035, 1.01/o) for o in size) # at least a pixel
    for statistic,tolerance in (
            (lambda top, left, h, w: h*w/(height*width), .02),
            (lambda top, left, h, w: (h/w).log(), .08),
            (lambda top, left, h, w: top/height, row_tolerance),
            (lambda top, left, h, w: left/width, col_tolerance),
            (lambda top, left, h, w: (top+h)/height, row_tolerance)):
        assert_same_quantiles(statistic(*ours), statistic(*theirs), tolerance)

def test_no_box_where_none_fits():
    assert (erase_boxes(50, 1, 1)[:,2]==0).all()
    x = torch.rand(20,3,1,1)
    assert torch.equal(applied(EraseEach(1.), x), x)
    assert erase_boxes(0, 8, 8).shape==(0,4)

def test_noise_in_the_boxes_and_nowhere_else():
    set_seed(0)
    x = torch.full((40,3,48,24), 9.)
    which,boxes = torch.arange(0, 40, 2),erase_boxes(20, 48, 24)
    y = erase_images(x, which, boxes)
    assert (x==9).all() and torch.equal(y[1::2], x[1::2])
    noises = []
    for im,(top,left,height,width) in zip(y[which], boxes.tolist()):
        inside = torch.zeros(48, 24, dtype=bool)
        inside[top:top+height,left:left+width] = True
        assert (im[:,~inside]==9).all() and (im[:,inside]!=9).all()
        noises.append(im[:,inside].flatten())
    assert len({round(noise[0].item(), 4) for noise in noises})==20
    noise = torch.cat(noises)
    assert noise.mean().abs()<.03 and abs(noise.std()-1)<.03

@pytest.mark.parametrize('prob', [0., .2, .5, 1.])
def test_erases_as_often_as_asked(prob):
    set_seed(0)
    y = applied(EraseEach(prob), torch.zeros(2000,3,16,8))
    n_erased = (y!=0).flatten(1).any(1).sum().item()
    if prob<1: assert_binomial(n_erased, 2000, prob)
    else: assert n_erased>=1960 # now and then no box fits

# the recipes

def names(tfms): return [type(tfm).__name__ for tfm in tfms]

def test_the_transforms_of_a_recipe():
    item,after = person_tfms()
    assert names(item)==['Resize', 'FlipItem'] and names(after)==['EraseEach']
    item,after = person_tfms(batch=True)
    assert names(item)==['Resize'] and names(after)==['FlipEach', 'EraseEach']
    item,after = strong_tfms()
    assert names(item)==['Resize', 'FlipItem', 'PadCrop', 'ColourJitter'] and names(after)==['EraseEach']
    item,after = strong_tfms(batch=True)
    assert names(item)==['Resize'] and names(after)==['FlipEach', 'EraseEach', 'PadCropEach', 'ColourEach']
    item,after = strong_tfms(pad=0, erase=0, colour=0, batch=True)
    assert names(item)==['Resize'] and names(after)==['FlipEach']

def test_the_order_of_batch_transforms():
    "Flips while images are small, erasing after everything else"
    pipeline = Pipeline([IntToFloatTensor(), ResizeEach(8), *strong_tfms(batch=True)[1]])
    assert names(pipeline.fs)==['FlipEach', 'ResizeEach', 'PadCropEach', 'IntToFloatTensor', 'ColourEach', 'EraseEach']

@pytest.mark.parametrize('recipe', [person_tfms,strong_tfms])
def test_both_kinds_have_the_same_mean_and_spread(recipe):
    "Of each pixel over many draws, and of each draw over its pixels"
    set_seed(0)
    im,size,n = picture(32, 16),(48,24),800
    item,after = recipe(size)
    load = Pipeline([*item, ToTensor()], split_idx=TRAIN)
    loaded = TensorImage(torch.stack([load(PILImage.create(im)) for _ in range(n)]))
    one_by_one = Pipeline([IntToFloatTensor(), *after], split_idx=TRAIN)(loaded)
    _,after = recipe(size, batch=True)
    at_once = Pipeline([IntToFloatTensor(), ResizeEach(size), *after], split_idx=TRAIN)
    at_once = at_once(TensorImage(batch(im).repeat(n,1,1,1)))
    assert type(at_once) is type(one_by_one) is TensorImage and at_once.shape==one_by_one.shape

    a,b = (x.as_subclass(torch.Tensor) for x in (at_once,one_by_one))
    standard_error = ((a.var(0)+b.var(0))/n).sqrt()
    assert ((a.mean(0)-b.mean(0)).abs()/standard_error).mean()<1.3 # 0.8 for the same distribution
    spread_difference = a.std(0)-b.std(0)
    assert spread_difference.abs().mean()<.04 and spread_difference.mean().abs()<.015
    for statistic in (image_means, image_spreads): assert_same_quantiles(statistic(a), statistic(b), .02)

# every transform

def name_of(tfm): return type(tfm).__name__

EACH = [FlipEach(), PadCropEach(3), ColourEach(.2), EraseEach(.5)]

@pytest.mark.parametrize('tfm', EACH, ids=name_of)
def test_validation_images_are_left_alone(tfm):
    set_seed(0)
    x = TensorImage(torch.rand(16,3,12,8))
    assert tfm(x, split_idx=VALID) is x and not torch.equal(tfm(x, split_idx=TRAIN), x)

@pytest.mark.parametrize('tfm', EACH, ids=name_of)
def test_a_seed_decides_and_nothing_is_changed_in_place(tfm):
    x = torch.rand(16,3,12,8)
    before,results = x.clone(),[]
    for seed in (1,1,2):
        set_seed(seed)
        results.append(applied(tfm, x))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(x, before)
    state = torch.get_rng_state()
    first = applied(tfm, x)
    torch.set_rng_state(state)
    assert torch.equal(applied(tfm, x), first)

@pytest.mark.parametrize('tfm', [*EACH, ResizeEach((24,12))], ids=name_of)
def test_no_shape_depends_on_values_on_the_device(tfm):
    "On the meta device there are shapes and no values, so waiting for a value fails"
    set_seed(0)
    dtype = torch.uint8 if isinstance(tfm, (FlipEach,PadCropEach,ResizeEach)) else torch.float32
    x = TensorImage(torch.empty(16,3,12,8, dtype=dtype, device='meta'))
    y = tfm(x, split_idx=TRAIN)
    assert y.device.type=='meta' and y.dtype==x.dtype and y.shape[:2]==x.shape[:2]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('erase', [0, .5])
def test_on_a_gpu_nothing_waits_and_the_images_are_the_same(erase):
    "But for the noise of erasing, which is drawn on the GPU"
    x = batch(*[picture(32, 16, seed) for seed in range(16)])
    _,after = strong_tfms((48,24), erase=erase, batch=True)
    pipeline = Pipeline([IntToFloatTensor(), ResizeEach((48,24)), *after], split_idx=TRAIN)
    set_seed(0)
    on_cpu = pipeline(TensorImage(x))
    on_gpu = TensorImage(x.cuda())
    pipeline(on_gpu) # the first call loads kernels
    set_seed(0)
    torch.cuda.set_sync_debug_mode('error')
    try: result = pipeline(on_gpu)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert result.shape==on_cpu.shape
    if not erase: assert (result.cpu()-on_cpu).abs().max()<2.5/255
