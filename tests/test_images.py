"Pictures as a viewer shows them, in 8 bits, and errors that name what is wrong"
import itertools
import os
import struct

import numpy as np
import pytest
from PIL import Image

from pyramidreid.images import find_images, is_rotated, load_pixels, read_rgb

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

@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_sixteen_bits_are_divided_by_256(tmp_path, suffix):
    deep = np.arange(0, 2**16, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path/f'deep.{suffix}')
    assert np.array_equal(np.asarray(read_rgb(tmp_path/f'deep.{suffix}'))[...,1], deep//256)

@pytest.mark.parametrize('dtype,mode', [('int32','I'), ('float32','F')])
def test_thirty_two_bits_are_an_error(dtype, mode):
    im = Image.fromarray(np.ones((4,2), dtype))
    with pytest.raises(ValueError, match=rf'^query has 32 bits per pixel \(mode {mode}\)'): read_rgb(im, 'query')

def test_arrays_of_colour_and_of_grey():
    colour = noise(8, 12)
    assert np.array_equal(read_rgb(colour), colour)
    grey = colour[...,0]
    assert np.array_equal(read_rgb(grey), np.stack([grey]*3, -1))

INVALID_ARRAYS = [
    ('float64', (8,4,3)), ('bool', (8,4)), ('uint8', (8,4,4)),
    ('uint8', (3,8,4)), ('uint8', (8,4,1)), ('uint8', (0,4,3)), ('uint8', (5,)), ('uint8', (1,8,4,3))]
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
    assert found(tmp_path)==['a/a.jpg', 'b/b.jpg', 'b/other/a.jpg']

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
    for image in (tmp_path/'deep.jp2', Image.open(tmp_path/'deep.jp2')):
        assert np.array_equal(read_rgb(image), np.stack([deep//256]*3, -1))
    big_endian = Image.frombytes('I;16B', (20,40), deep.astype('>u2').tobytes())
    assert np.array_equal(np.asarray(read_rgb(big_endian))[...,0], deep//256)

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
