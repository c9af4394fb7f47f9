"Pictures as a viewer shows them, in 8 bits, and errors that name what is wrong"
import os

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
