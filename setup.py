"Package metadata comes from `settings.ini`, the only place for it."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}
extras['dev'] += sorted({o for name,needs in extras.items() if name!='dev' for o in needs}) # the tests use every extra

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], license='Apache-2.0', python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['pyramidreid', 'pyramidreid.*']),
    package_data={'pyramidreid': ['py.typed', 'pretrained/README.md', 'pretrained/*/*', 'web/static/*']},
    install_requires=cfg['requirements'].split(), extras_require=extras,
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    classifiers=[
        'Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3'],
    entry_points={'nbdev': ['pyramidreid=pyramidreid._modidx:d'], 'console_scripts': cfg['console_scripts'].split()},
)
