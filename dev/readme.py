"Write README.md from nbs/index.ipynb, or with --check exit with an error unless it is fresh."
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent

def readme():
    "The notebook as Markdown, its links seen from the top folder"
    text,_ = MarkdownExporter().from_filename(str(root/'nbs'/'index.ipynb'))
    text = re.sub(r'\]\((?=images/|[\w/]+\.ipynb)', '](nbs/', text)
    return text.replace('](../', '](').strip()+'\n'

if __name__=='__main__':
    dest = root/'README.md'
    if '--check' not in sys.argv: dest.write_text(readme())
    elif not dest.exists() or dest.read_text()!=readme(): sys.exit('README.md is not what nbs/index.ipynb says: run `make readme`')
    else: print('README.md is fresh.')
