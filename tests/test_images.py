"Pictures as a viewer shows them, in 8 bits, and errors that name what is wrong"
import errno
import io
import itertools
import math
import os
import re
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, IcoImagePlugin, Image, PngImagePlugin

import pyramidreid
from pyramidreid import images
from pyramidreid.images import (
    check_image,
    check_pixel_range,
    deep_kind,
    deep_values,
    escape_bytes,
    find_images,
    is_access_error,
    is_rotated,
    load_pixels,
    measure_range,
    open_image_file,
    read_rgb,
    survey_folder,
)

ORIENTATION = 0x0112

def noise(height, width, seed=0): return np.random.default_rng(seed).integers(0, 256, (height,width,3), dtype=np.uint8)

@pytest.fixture
def rotated(tmp_path):
    "A file that is stored on its side"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(noise(8, 12)).save(tmp_path/'rotated.png', exif=exif)
    return tmp_path/'rotated.png'

def test_an_image_is_rotated_once(rotated):
    stored = Image.open(rotated)
    assert is_rotated(stored)
    upright = read_rgb(rotated)
    assert np.array_equal(upright, np.rot90(np.asarray(stored), -1))
    assert not is_rotated(upright) and np.array_equal(read_rgb(upright), upright)

@pytest.mark.parametrize('orientation', [0, 1, 9, 'wide'])
def test_an_unknown_orientation_is_upright(orientation):
    im = Image.fromarray(noise(8, 12))
    im.getexif()[ORIENTATION] = orientation
    assert not is_rotated(im) and np.array_equal(read_rgb(im), im)

def test_exif_data_that_cannot_be_read_says_nothing(monkeypatch):
    im = Image.fromarray(noise(8, 12))
    def unreadable(): raise ZeroDivisionError
    monkeypatch.setattr(im, 'getexif', unreadable)
    assert not is_rotated(im) and np.array_equal(read_rgb(im), im)

@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'YCbCr', 'HSV'])
def test_any_mode_becomes_rgb(mode):
    im = Image.fromarray(noise(8, 12)).convert(mode)
    assert read_rgb(im).mode=='RGB' and np.array_equal(read_rgb(im), im.convert('RGB'))

# more than 8 bits

def scaled_by_hand(values, low, high):
    "Value by value, three channels"
    def level(value): return round(255*(min(max(float(value), low), high)-low)/(high-low))
    grey = np.array([[level(value) for value in row] for row in values])
    return np.stack([grey]*3, -1)

THERMAL = np.random.default_rng(5).integers(7300, 8300, (32,16)) # counts of 14 bits
DEEP = {'png':'uint16', 'tif':'uint16', 'jp2':'uint16', 'tiff':'int32', 'pfm':'float32', 'pgm':'int32'}

@pytest.mark.parametrize('suffix,dtype', DEEP.items())
def test_deep_grey_is_scaled_by_a_given_range(tmp_path, suffix, dtype):
    "No level is lost: 14-bit counts of a scene had seven of them, or fewer"
    file,values = tmp_path/f'deep.{suffix}',THERMAL.astype(dtype)
    Image.fromarray(values).save(file)
    expected = scaled_by_hand(THERMAL, 7400, 8200)
    for image in (file, Image.open(file), values):
        assert np.array_equal(read_rgb(image, pixel_range=(7400,8200)), expected)
    assert len(np.unique(expected))>150

@pytest.mark.parametrize('suffix,dtype', DEEP.items())
def test_deep_grey_without_a_range_is_an_error(tmp_path, suffix, dtype):
    "It names the file, the values, and what to do"
    file,values = tmp_path/f'deep.{suffix}',THERMAL.astype(dtype)
    Image.fromarray(values).save(file)
    span = f'values from {values.min():,.0f} to {values.max():,.0f}, and which of them are black and white'
    for image,name in ((file,'deep'), (Image.open(file),'query'), (values,'query')):
        with pytest.raises(ValueError, match=f'{name}.*{span}.*pixel_range='): read_rgb(image, 'query')
    assert load_pixels([file], (32,16), pixel_range=(7400,8200)).shape==(1,32,16,3)

def test_true_sixteen_bits_are_said_too(tmp_path):
    deep = np.arange(0, 2**16, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path/'deep.png')
    with pytest.raises(ValueError, match='values from 0 to 65,472'): read_rgb(tmp_path/'deep.png')
    assert np.array_equal(read_rgb(tmp_path/'deep.png', pixel_range=(0,65535)), scaled_by_hand(deep, 0, 65535))

def test_floats_end_at_one_or_at_255():
    grey = noise(8, 12)
    assert np.array_equal(read_rgb(grey/255, pixel_range=(0,1)), grey)
    assert np.array_equal(read_rgb(grey.astype(float), pixel_range=(0,255)), grey)
    for image in (grey/255, grey.astype('float32'), grey.astype(int)):
        with pytest.raises(ValueError, match='^query is an array of .* which of them'): read_rgb(image, 'query')

def test_a_range_does_not_touch_8_bits(rotated):
    colour = noise(8, 12)
    for image in (colour, colour[...,0], Image.fromarray(colour).convert('P'), rotated):
        assert np.array_equal(read_rgb(image, pixel_range=(7400,8200)), read_rgb(image))

def test_a_deep_picture_is_turned_upright(tmp_path):
    exif,values = Image.Exif(),THERMAL.astype(np.uint16)
    exif[ORIENTATION] = 6
    Image.fromarray(values).save(tmp_path/'turned.png', exif=exif)
    found = read_rgb(tmp_path/'turned.png', pixel_range=(7400,8200))
    assert np.array_equal(found, np.rot90(scaled_by_hand(THERMAL, 7400, 8200), -1))

def test_where_zero_is_white(tmp_path):
    "TIFF's tag 262; Pillow follows it with 8 bits only"
    Image.fromarray(THERMAL.astype(np.uint16)).save(tmp_path/'a.tif', tiffinfo={262:0})
    data = bytearray((tmp_path/'a.tif').read_bytes())
    at = data.find(struct.pack('<HHI', 262, 3, 1))+8
    data[at:at+2] = b'\0\0'
    (tmp_path/'white.tif').write_bytes(data)
    found = read_rgb(tmp_path/'white.tif', pixel_range=(7400,8200))
    assert np.array_equal(found, 255-scaled_by_hand(THERMAL, 7400, 8200))

@pytest.mark.parametrize('pixel_range', [(5,5), (9,2), 3, 'high', (1,2,3), (0,np.inf), ('0','1'), {0:1}])
def test_a_range_is_two_ascending_numbers(pixel_range):
    with pytest.raises(ValueError, match='give the values of black and white'): check_pixel_range(pixel_range)

def test_a_range_in_another_unit_is_noticed():
    for pixel_range in ((0,1), (20,40), (10000,20000)):
        with pytest.raises(ValueError, match='all outside of pixel_range'): read_rgb(THERMAL, pixel_range=pixel_range)

def test_not_a_number_is_named():
    values = THERMAL.astype(float)
    values[3,4] = np.nan
    with pytest.raises(ValueError, match='^query: 1 of 512 values are not a number'):
        read_rgb(values, 'query', (7400,8200))

def test_to_look_at_a_picture_its_own_range_does():
    "Also where pixels are missing or all are equal"
    low,high = THERMAL.min(),THERMAL.max()
    assert np.array_equal(read_rgb(THERMAL, pixel_range='own'), scaled_by_hand(THERMAL, low, high))
    assert not np.asarray(read_rgb(np.full((4,4), 7000), pixel_range='own')).any()
    assert np.asarray(read_rgb(np.array([[np.nan,0.,1.]]), pixel_range='own')).tolist()==[[[0]*3, [0]*3, [255]*3]]

def png_of(values, colour_type):
    "A PNG of 16 bits per channel, which Pillow cannot write"
    height,width = values.shape[:2]
    def chunk(name, data):
        return struct.pack('>I', len(data))+name+data+struct.pack('>I', zlib.crc32(name+data))
    rows = b''.join(b'\0'+row.astype('>u2').tobytes() for row in values)
    header = struct.pack('>IIBBBBB', width, height, 16, colour_type, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', header)+chunk(b'IDAT', zlib.compress(rows))+chunk(b'IEND', b'')

@pytest.mark.parametrize('colour_type,channels', [(2,3), (4,2), (6,4)], ids=['RGB','LA','RGBA'])
def test_sixteen_bit_colour_is_read_only_by_its_full_range(tmp_path, colour_type, channels):
    "Pillow keeps the upper 8 bits and says nothing: 14-bit counts would be 64 levels"
    values = np.random.default_rng(0).integers(0, 2**14, (8,6,channels))
    (tmp_path/'deep.png').write_bytes(png_of(values, colour_type))
    for pixel_range in (None, (0,16383)):
        for image in (tmp_path/'deep.png', Image.open(tmp_path/'deep.png')):
            with pytest.raises(ValueError, match='16 bits per colour, and Pillow reads only'):
                read_rgb(image, 'query', pixel_range)
    found = read_rgb(tmp_path/'deep.png', pixel_range=(0,65535))
    assert np.array_equal(np.asarray(found)[...,0], values[...,0]>>8)
    assert deep_kind(Image.open(tmp_path/'deep.png'))=='colour'

def test_ppm_of_sixteen_bits(tmp_path):
    (tmp_path/'deep.ppm').write_bytes(b'P6 2 2 65535\n'+np.full(12, 1000, '>u2').tobytes())
    (tmp_path/'plain.ppm').write_bytes(b'P6 2 2 255\n'+bytes(range(12)))
    with pytest.raises(ValueError, match='16 bits per colour'): read_rgb(tmp_path/'deep.ppm')
    assert np.asarray(read_rgb(tmp_path/'plain.ppm')).ravel().tolist()==list(range(12))

def test_565_colours_are_8_bit_pictures(tmp_path):
    "Their raw mode is called BGR;16, for two bytes per pixel"
    header = struct.pack('<IiiHHIIiiII', 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)+struct.pack('<III', 0xf800, 0x7e0, 0x1f)
    start = b'BM'+struct.pack('<IHHI', 14+len(header)+4, 0, 0, 14+len(header))
    (tmp_path/'a.bmp').write_bytes(start+header+b'\0\xf8\x1f\0')
    assert np.asarray(read_rgb(tmp_path/'a.bmp')).tolist()==[[[255,0,0],[0,0,255]]]

@pytest.mark.parametrize('mode', ['La','RGBa'])
def test_premultiplied_alpha(mode):
    im = Image.fromarray(noise(8, 12)).convert(mode.upper())
    assert np.abs(np.asarray(read_rgb(im.convert(mode)), int)-np.asarray(im.convert('RGB'), int)).max()<=1

def test_the_range_is_measured_without_the_outermost_pixels(tmp_path):
    "numpy's percentiles over all pixels of a few small pictures; 8-bit ones do not count"
    values = np.random.default_rng(1).integers(7000, 9000, (5,40,20)).astype(np.uint16)
    values[0,0] = 0 # a dead row
    files = [tmp_path/f'{i}.png' for i in range(5)]
    for file,picture in zip(files, values): Image.fromarray(picture).save(file)
    Image.fromarray(noise(8, 12)).save(tmp_path/'8.png')
    low,high = np.percentile(values, (1,99.9))
    assert measure_range([*files, tmp_path/'8.png'], percentiles=(1,99.9))==(np.floor(low),np.ceil(high))
    assert measure_range(files, n=2)==measure_range([files[0],files[4]])
    assert measure_range([tmp_path/'8.png'])==measure_range([])==None # noqa: E711
    with pytest.raises(ValueError, match='All of these 16 pixels are 7: there is no range'):
        measure_range([np.full((4,4), 7)])

def test_deep_values(tmp_path):
    Image.fromarray(THERMAL.astype(np.uint16)).save(tmp_path/'deep.png')
    Image.fromarray(noise(8, 12)).save(tmp_path/'8.png')
    assert np.array_equal(deep_values(tmp_path/'deep.png'), THERMAL) and deep_values(tmp_path/'8.png') is None
    (tmp_path/'text.png').write_text('hello')
    with pytest.raises(OSError, match='text.png is not a valid image'): deep_values(tmp_path/'text.png')

def test_arrays_of_colour_and_of_grey():
    colour = noise(8, 12)
    assert np.array_equal(read_rgb(colour), colour)
    grey = colour[...,0]
    assert np.array_equal(read_rgb(grey), np.stack([grey]*3, -1))

INVALID_ARRAYS = [
    ('float64', (8,4,3)), ('bool', (8,4)), ('complex64', (8,4)), ('uint8', (8,4,4)), ('uint16', (8,4,4)),
    ('uint8', (3,8,4)), ('uint8', (8,4,1)), ('uint8', (5,)), ('uint8', (1,8,4,3))]
@pytest.mark.parametrize('dtype,shape', INVALID_ARRAYS)
def test_an_invalid_array_is_described(dtype, shape):
    array = np.zeros(shape, dtype)
    with pytest.raises(ValueError, match='^query is an array of') as e: read_rgb(array, 'query')
    assert f'{dtype}, shape {shape}: give uint8' in str(e.value)

@pytest.mark.parametrize('item', [None, 3, b'bytes', [1,2]])
def test_what_is_not_an_image_is_described(item):
    kind = type(item).__name__
    with pytest.raises(ValueError, match=f'^query is of type {kind}: give the path'): read_rgb(item, 'query')

def test_an_image_without_pixels():
    with pytest.raises(ValueError, match=r'^query has no pixels \(0×5\)'): read_rgb(Image.new('RGB', (0,5)), 'query')
    for shape in ((0,4,3), (4,0), (0,0,3)):
        with pytest.raises(ValueError, match=r'^query has no pixels'): read_rgb(np.zeros(shape, np.uint8), 'query')

def test_a_file_that_cannot_be_read_is_named(tmp_path):
    whole = tmp_path/'whole.png'
    Image.fromarray(noise(30, 20)).save(whole)
    for name,content in (('text.jpg',b'hello'), ('empty.jpg',b''), ('cut.png',whole.read_bytes()[:-500])):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(OSError, match=f'{name} is not a valid image, or is cut off'): read_rgb(tmp_path/name)
    with pytest.raises(FileNotFoundError, match='no image file .*nobody.jpg'): read_rgb(tmp_path/'nobody.jpg')
    with pytest.raises(FileNotFoundError, match='no image file'): read_rgb(tmp_path)

# pixels for a model

def test_pixels_are_resized_by_pils_bicubic_filter(rotated):
    array = noise(40, 30)
    pixels = load_pixels([array,rotated], (24,16))
    want = [Image.fromarray(array), read_rgb(rotated)]
    want = np.stack([np.asarray(im.resize((16,24), Image.Resampling.BICUBIC)) for im in want])
    assert pixels.dtype==np.uint8 and np.array_equal(pixels, want)

def test_pixels_of_no_images(): assert load_pixels([], (24,16)).shape==(0,24,16,3)

def test_an_error_numbers_the_image():
    items = [noise(8, 4), noise(8, 4), 3]
    with pytest.raises(ValueError, match='^image 12 is of type int'): load_pixels(items, (24,16), start=10)

# finding images

def touch(folder, *names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).touch()

def found(folder): return [file.relative_to(folder).as_posix() for file in find_images(folder)]

def test_images_are_files_with_the_suffix_of_an_image(tmp_path):
    touch(tmp_path, 'b.webp', 'A.JFIF', 'c.jpeg', 'd.txt', 'e.mpg', 'f.pdf', 'jpg', 'deep/down/g.png')
    assert found(tmp_path)==['A.JFIF', 'b.webp', 'c.jpeg', 'deep/down/g.png']
    assert find_images(str(tmp_path))==find_images(tmp_path)

def test_hidden_files_and_folders_are_left_out(tmp_path):
    touch(tmp_path, 'a.jpg', '._a.jpg', '.trash/b.jpg', 'deep/.c.jpg')
    assert found(tmp_path)==['a.jpg']

def test_links_are_followed_but_not_in_a_circle(tmp_path):
    touch(tmp_path, 'a/a.jpg', 'b/b.jpg')
    for link,target in (('a/up','..'), ('a/self','.'), ('b/other','../a')):
        os.symlink(target, tmp_path/link, target_is_directory=True)
    assert found(tmp_path)==['a/a.jpg', 'b/b.jpg']

def test_a_folder_reached_twice_is_read_once(tmp_path):
    "At its own path if it has one below the folder; else through the first of the links to it"
    inside,outside = tmp_path/'inside',tmp_path/'outside'
    touch(inside, 'z/own.jpg')
    touch(outside, 'deep/far.jpg')
    links = dict(a=inside/'z', c=outside/'deep', b=outside, d='../outside', e='..')
    for name,target in links.items(): os.symlink(target, inside/name, target_is_directory=True)
    assert found(inside)==['b/deep/far.jpg', 'z/own.jpg']
    survey = survey_folder(inside)
    assert survey['repeated']==[inside/name for name in 'acd']
    assert survey['folder']==[inside/name for name in ('b','b/deep','e','z')]

def test_a_link_to_itself_does_not_refuse_the_folder(tmp_path):
    touch(tmp_path, 'a.jpg')
    for name in ('self.jpg','self'): os.symlink(name, tmp_path/name)
    assert found(tmp_path)==['a.jpg','self.jpg']
    assert survey_folder(tmp_path)['other']==[tmp_path/'self']
    with pytest.raises(FileNotFoundError, match='no image file .*self.jpg: it links to itself'):
        read_rgb(tmp_path/'self.jpg')

def test_a_missing_folder_has_no_images(tmp_path): assert find_images(tmp_path/'none')==[]

def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    scandir = os.scandir
    def closed(path):
        if str(path).endswith('closed'): raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    (tmp_path/'closed').mkdir()
    monkeypatch.setattr(os, 'scandir', closed) # permissions do not stop root
    with pytest.raises(PermissionError, match='closed'): find_images(tmp_path)

# formats and EXIF data in the wild

ROTATIONS = { # of the stored pixels, by EXIF orientation
    1: lambda x: x,
    2: lambda x: x[:,::-1],
    3: lambda x: x[::-1,::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90}
SAVE_OPTIONS = dict(webp=dict(lossless=True), jpg=dict(quality=100, subsampling=0))

@pytest.fixture
def photo(tmp_path):
    "A JPEG of noise in large blocks, without EXIF data"
    Image.fromarray(noise(6, 3).repeat(16, 0).repeat(16, 1)).save(tmp_path/'photo.jpg')
    return tmp_path/'photo.jpg'

@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'tif'])
@pytest.mark.parametrize('orientation', ROTATIONS)
def test_exif_turns_an_image_as_the_standard_says(tmp_path, suffix, orientation):
    "For a file, and for an image that was opened elsewhere, before and after it was handled"
    stored,file,exif = noise(5, 3).repeat(16, 0).repeat(16, 1),tmp_path/f'photo.{suffix}',Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(file, exif=exif, **SAVE_OPTIONS.get(suffix, {}))
    expected,seen = ROTATIONS[orientation](stored).astype(int),read_rgb(file)
    assert np.asarray(seen).shape==expected.shape
    assert abs(np.asarray(seen)-expected).max()<=(4 if suffix=='jpg' else 0)
    opened = Image.open(file)
    for image in (Image.open(file), opened.copy(), opened.convert('RGB'), seen, read_rgb(seen)):
        assert np.array_equal(read_rgb(image), seen)

def with_exif(data, *entries):
    "A JPEG's bytes with an EXIF block of entries `(tag, type, count, value)`"
    packed = b''.join(struct.pack('<HHII', *entry) for entry in entries)
    exif = b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<H', len(entries)) + packed + bytes(44)
    return data[:2] + b'\xff\xe1' + struct.pack('>H', len(exif)+2) + exif + data[2:]

def test_other_exif_entries_do_not_matter(photo, tmp_path):
    "Entries of every type, with values that fit or not, beside the one that turns the image"
    data,turn,file = photo.read_bytes(),(ORIENTATION, 3, 1, 6),tmp_path/'more.jpg'
    file.write_bytes(with_exif(data, turn))
    expected = np.asarray(read_rgb(file))
    assert expected.shape[:2]==Image.open(photo).size
    tags = (0x010f, 0x0131, 0x02bc, 0x8769, 0x8825, 0x927c, 0xa005)
    for entry in itertools.product(tags, range(14), ((1,7), (2,40), (9,2**31))):
        tag,kind,(count,value) = entry
        file.write_bytes(with_exif(data, turn, (tag, kind, count, value)))
        for image in (file, Image.open(file)): assert np.array_equal(read_rgb(image), expected), entry

def test_damaged_exif_data_is_ignored(photo, tmp_path):
    data,file = photo.read_bytes(),tmp_path/'damaged.jpg'
    file.write_bytes(data[:2] + b'\xff\xe1' + (28).to_bytes(2, 'big') + b'Exif\0\0' + b'\xff'*20 + data[2:])
    assert np.array_equal(read_rgb(file), Image.open(photo))

def test_sixteen_bits_of_jpeg_2000_and_of_big_endian_data(tmp_path):
    deep = np.random.default_rng(0).integers(0, 2**16, (40,20), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path/'deep.jp2')
    expected = scaled_by_hand(deep, 0, 65535)
    for image in (tmp_path/'deep.jp2', Image.open(tmp_path/'deep.jp2')):
        assert np.array_equal(read_rgb(image, pixel_range=(0,65535)), expected)
    big_endian = Image.frombytes('I;16B', (20,40), deep.astype('>u2').tobytes())
    assert np.array_equal(read_rgb(big_endian, pixel_range=(0,65535)), expected)

def test_a_decompression_bomb_is_named(photo, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(OSError, match='photo.jpg .*decompression bomb'): read_rgb(photo)

def damaged(data, rng, cut, at_head):
    "The bytes with three of them changed, and cut off at random"
    changed = bytearray(data[:rng.integers(len(data))] if cut else data)
    reach = min(len(changed), 300) if at_head else len(changed)
    for position in rng.integers(0, max(1, reach), 3):
        changed[position:position+1] = bytes(rng.integers(0, 256, 1, dtype=np.uint8))
    return bytes(changed)

@pytest.mark.parametrize('suffix', ['jpg', 'png', 'gif', 'webp', 'tif', 'bmp', 'jp2', 'avif'])
def test_a_damaged_file_is_read_or_named(photo, tmp_path, suffix):
    image,file,rng = Image.open(photo),tmp_path/f'damaged.{suffix}',np.random.default_rng(0)
    try: image.save(file)
    except (KeyError, ValueError, OSError) as e: pytest.skip(f'Pillow cannot write {suffix} here: {e}')
    data,named = file.read_bytes(),0
    for i in range(60):
        file.write_bytes(damaged(data, rng, cut=i%3==0, at_head=i%2==1))
        try: assert read_rgb(file).mode=='RGB'
        except (OSError, ValueError) as e:
            named += 1
            assert str(file) in str(e)
    assert named

# files from strangers

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 128\n%%EndComments\nshowpage\n'

def test_no_picture_starts_ghostscript(tmp_path, monkeypatch):
    started = []
    def record(*args, **kwargs):
        started.append(args)
        return Image.new('RGB', (64,128)).im
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', record)
    crop = tmp_path/'crop.jpg'
    crop.write_bytes(EPS)
    for reader in (read_rgb, deep_values, lambda file: load_pixels([file], (8,4))):
        with pytest.raises(OSError, match='crop.jpg is not a valid image'): reader(crop)
    with pytest.raises(OSError, match='image is not a valid image'): read_rgb(io.BytesIO(EPS))
    with pytest.raises(OSError, match='image is of format EPS'): read_rgb(Image.open(crop)) # its owner opened it
    assert not started

def test_every_picture_is_opened_with_a_list_of_formats():
    "`Image.open` occurs once in the package, and fastai's and Matplotlib's readers do not"
    sources = [file.read_text() for file in Path(pyramidreid.__file__).parent.rglob('*.py')]
    calls = [call for source in sources for call in re.findall(r'Image\.open\([^#\n]*', source)]
    assert len(calls)==1 and 'formats=image_formats()' in calls[0]
    assert not any(re.search(r'\b(imread|load_image)\(|PILImage\.create\(fn', source) for source in sources)

@pytest.mark.parametrize('error', [TypeError, IndexError, KeyError, MemoryError, RecursionError, ZeroDivisionError,
    AssertionError, OverflowError, EOFError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError])
@pytest.mark.parametrize('method', ['_open','load'])
def test_whatever_a_decoder_raises_is_named(tmp_path, monkeypatch, error, method):
    Image.fromarray(noise(8, 12)).save(tmp_path/'a.png')
    def fails(self): raise error('deep inside')
    monkeypatch.setattr(PngImagePlugin.PngImageFile, method, fails)
    for reader in (read_rgb, lambda file: load_pixels([file], (8,4))):
        with pytest.raises(OSError, match='a.png is not a valid image, or is cut off'): reader(tmp_path/'a.png')

def test_an_error_without_words_is_named_by_its_type(tmp_path, monkeypatch):
    Image.fromarray(noise(8, 12)).save(tmp_path/'a.png')
    def fails(self): raise MemoryError
    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', fails)
    with pytest.raises(OSError, match=r'cut off \(MemoryError\)'): read_rgb(tmp_path/'a.png')

@pytest.fixture
def pipe(tmp_path):
    "A FIFO called x.jpg; whoever opens it gets an empty file after two seconds"
    if not hasattr(os, 'mkfifo'): pytest.skip('no FIFOs here')
    os.mkfifo(tmp_path/'x.jpg')
    writer = os.open(tmp_path/'x.jpg', os.O_RDWR)
    timer = threading.Timer(2, os.close, [writer])
    timer.start()
    yield tmp_path/'x.jpg'
    timer.join()

def test_only_regular_files_are_opened(pipe, tmp_path):
    os.symlink('/dev/zero', tmp_path/'endless.jpg')
    for reader in (read_rgb, deep_values, check_image):
        with pytest.raises(OSError, match=r'x.jpg is not a regular file but a pipe \(FIFO\): remove it'): reader(pipe)
    with pytest.raises(OSError, match='endless.jpg is not a regular file but a dev'): read_rgb(tmp_path/'endless.jpg')
    assert found(tmp_path)==['endless.jpg','x.jpg'] # Whoever reads them says what they are

LATIN = os.fsdecode(b'caf\xe9.png')

def test_a_name_that_is_not_utf_8(tmp_path):
    file = tmp_path/LATIN
    try: Image.fromarray(noise(8, 12)).save(file)
    except OSError: pytest.skip('this file system knows UTF-8 only')
    assert find_images(tmp_path)==[file] and np.array_equal(read_rgb(file), noise(8, 12))
    file.write_bytes(b'hello')
    with pytest.raises(OSError) as e: read_rgb(file)
    assert r'caf\udce9.png is not a valid image' in str(e.value)
    assert str(e.value).encode()

def test_bytes_of_a_name_as_escapes():
    for text,shown in {LATIN:r'caf\xe9.png', 'a b.jpg':'a b.jpg', 'Zoë–1 日本.png':'Zoë–1 日本.png'}.items():
        assert escape_bytes(text)==shown

def refuse(monkeypatch, number):
    def refused(file, *args, **kwargs): raise OSError(number, os.strerror(number), str(file))
    monkeypatch.setattr(Image, 'open', refused) # permissions do not stop root

@pytest.mark.parametrize('number', [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_file_that_may_not_be_read_may_be_a_picture(tmp_path, monkeypatch, number):
    Image.fromarray(noise(8, 12)).save(tmp_path/'a.png')
    refuse(monkeypatch, number)
    with pytest.raises(OSError, match='a.png cannot be read .* make it readable, or leave it out') as e:
        read_rgb(tmp_path/'a.png')
    assert e.value.errno==number and is_access_error(e.value)
    assert isinstance(e.value, PermissionError)==(number==errno.EACCES)

def test_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    stat = os.stat
    def closed(path, *args, **kwargs):
        if str(path).endswith('a.png'): raise PermissionError(13, 'Permission denied', str(path))
        return stat(path, *args, **kwargs)
    monkeypatch.setattr(os, 'stat', closed)
    with pytest.raises(PermissionError, match='a.png'): read_rgb(tmp_path/'a.png')

def test_a_picture_is_not_decoded_if_its_header_says_that_it_is_too_large(tmp_path, monkeypatch):
    Image.new('1', (9000,9000)).save(tmp_path/'large.png')
    def decoded(self): raise AssertionError('decoded')
    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', decoded)
    message = 'has 9,000×9,000 pixels, more than the 67,108,864 allowed: scale it down, or raise pyramidreid.images.M'
    for reader in (read_rgb, lambda file: read_rgb(Image.open(file))):
        with pytest.raises(OSError, match=message): reader(tmp_path/'large.png')
    monkeypatch.setattr(images, 'MAX_PIXELS', 9000*9000)
    with pytest.raises(OSError, match='decoded'): read_rgb(tmp_path/'large.png')

def icon_of(png, side):
    "An icon whose directory says that the PNG in it has `side` pixels"
    entry = struct.pack('<BBBBHHII', side, side, 0, 0, 1, 32, len(png), 22)
    return struct.pack('<HHH', 0, 1, 1)+entry+png

def tiff_of_one_tile(size, tile):
    "A grey TIFF, not compressed, whose only tile may be larger than itself"
    tags = {256:size[0], 257:size[1], 258:8, 259:1, 262:1, 277:1, 322:tile[0], 323:tile[1], 324:200,
            325:math.prod(tile)}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag,value in tags.items())
    head = struct.pack('<2sHIH', b'II', 42, 8, len(tags))+entries+bytes(4)
    return head.ljust(200, b'\0')+bytes(math.prod(tile))

def test_a_picture_larger_than_its_header_says(tmp_path, monkeypatch):
    "In an icon the header is not that of the picture, and a TIFF may have tiles larger than itself"
    buffer = io.BytesIO()
    Image.new('L', (60,50)).save(buffer, 'png')
    (tmp_path/'a.ico').write_bytes(icon_of(buffer.getvalue(), 16))
    (tmp_path/'a.tif').write_bytes(tiff_of_one_tile((12,8), (80,64)))
    monkeypatch.setattr(images, 'MAX_PIXELS', 2999)
    with pytest.raises(OSError, match='a.ico has 60×50 pixels'): read_rgb(tmp_path/'a.ico')
    with pytest.raises(OSError, match='a.tif has 80×64 pixels'): read_rgb(tmp_path/'a.tif')

def test_an_icon_is_not_decoded_if_a_picture_in_it_is_too_large(tmp_path, monkeypatch):
    "Pillow decodes an icon when it opens it, so that its size must be known before, whatever the file is called"
    def decoded(self): raise AssertionError('decoded')
    monkeypatch.setattr(IcoImagePlugin.IcoImageFile, 'load', decoded)
    png = io.BytesIO()
    Image.new('1', (9000,9000)).save(png, 'png')
    bitmap = struct.pack('<IiiHHIIiiII', 40, 9000, -18000, 1, 1, 0, 0, 0, 0, 0, 0) # the lower half is the mask
    for picture in (png.getvalue(), bitmap):
        (tmp_path/'a.jpg').write_bytes(icon_of(picture, 16))
        for file in (tmp_path/'a.jpg', io.BytesIO(icon_of(picture, 16))):
            with pytest.raises(OSError, match='has 9,000×9,000 pixels, more than the 67,108,864 allowed'):
                read_rgb(file)
    small = io.BytesIO()
    Image.new('L', (60,50)).save(small, 'png')
    (tmp_path/'a.jpg').write_bytes(icon_of(small.getvalue(), 16))
    with pytest.raises(OSError, match='decoded'): read_rgb(tmp_path/'a.jpg')

class Stream(io.RawIOBase):
    "Bytes that can only be read once, in their order, as from a network"
    def __init__(self, data): self.buffer = io.BytesIO(data)
    def read(self, n=-1): return self.buffer.read(n)
    def readable(self): return True

def test_a_stream_is_read_once(tmp_path):
    Image.fromarray(noise(8, 12)).save(tmp_path/'a.png')
    assert np.array_equal(read_rgb(Stream((tmp_path/'a.png').read_bytes())), noise(8, 12))
    with pytest.raises(OSError, match='not a valid image'): read_rgb(Stream(b'\0\0\1\0\xff\xff'))

def test_a_file_may_not_be_much_longer_than_the_largest_picture(tmp_path):
    "Some decoders read all of it"
    with open(tmp_path/'a.webp', 'wb') as f: f.truncate(2**40) # it has no blocks on the disk
    with pytest.raises(OSError, match='a.webp has 1,099,511,627,776 bytes, more than'): read_rgb(tmp_path/'a.webp')

@pytest.mark.parametrize('size,at_once', [((2048,2048),1), ((64,32),4)])
def test_large_pictures_are_decoded_one_after_the_other(tmp_path, monkeypatch, size, at_once):
    Image.new('1', size).save(tmp_path/'a.png')
    running,most,load = [],[0],PngImagePlugin.PngImageFile.load
    def slow_load(self):
        running.append(1)
        most[0] = max(most[0], len(running))
        time.sleep(.1)
        running.pop()
        return load(self)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', slow_load)
    threads = [threading.Thread(target=read_rgb, args=[tmp_path/'a.png']) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert most==[at_once]

def test_a_forked_process_does_not_wait_for_a_thread_that_is_not_there(tmp_path):
    if not hasattr(os, 'fork'): pytest.skip('no fork here')
    held = threading.Event()
    done = threading.Event()
    def hold():
        with images._one_at_a_time:
            held.set()
            done.wait(20)
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    pid = os.fork()
    if not pid: os._exit(0 if images._one_at_a_time.acquire(blocking=False) else 1)
    status = os.waitpid(pid, 0)[1]
    done.set()
    thread.join()
    assert status==0

def test_open_picture_gives_the_unloaded_image(tmp_path):
    Image.fromarray(noise(8, 12)).save(tmp_path/'a.png')
    with open_image_file(tmp_path/'a.png') as im: assert im.size==(12,8) and im.tile
