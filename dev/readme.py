"Write README.md from nbs/index.ipynb, or with --check exit with an error if it is out of date."
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent

def readme():
    "The notebook's text and outputs as Markdown, with links relative to the top folder"
    exporter = MarkdownExporter(exclude_input=True)
    text,_ = exporter.from_filename(str(root/'nbs'/'index.ipynb'))
    text = re.sub(r'\]\((?=images/|[\w/]+\.ipynb)', '](nbs/', text)
    text = text.replace('](../', '](')
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

def main():
    target = root/'README.md'
    if '--check' not in sys.argv:
        target.write_text(readme(), encoding='utf-8')
        return
    if not target.exists() or target.read_text(encoding='utf-8')!=readme():
        sys.exit('README.md is out of date: run `make readme`')
    print('README.md is up to date.')

if __name__=='__main__': main()
