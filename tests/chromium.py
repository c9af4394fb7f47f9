"A real browser for tests: headless Chromium, driven by its DevTools protocol over a websocket"
import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

PROGRAM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update '
         '--disable-sync --no-first-run --no-default-browser-check --remote-debugging-port=0').split()

def wait_for(found, seconds=60):
    "What `found()` returns, once it is true"
    end = time.monotonic()+seconds
    while time.monotonic()<end:
        res = found()
        if res: return res
        time.sleep(.05)
    raise TimeoutError(f'{found} was never true')

class Tab:
    "A tab of the browser, and what it asked for and complained of"
    def __init__(self, socket):
        self.socket,self.count,self.events = socket,0,[]
        for domain in ('Page','Runtime','Network','Log'): self.call(f'{domain}.enable')

    def call(self, method, **params):
        "Call a method of the protocol; return its result"
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get('id')==self.count:
                assert 'error' not in message, message
                return message['result']
            self.events.append(message)

    def js(self, code):
        "The value of an expression"
        res = self.call('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in res, res
        return res['result'].get('value')

    @property
    def text(self): return self.js('document.body ? document.body.innerText : ""')

    def loaded(self, path=''):
        "Wait for a page whose address contains `path`, pictures included"
        wait_for(lambda: path in self.js('location.href') and self.js('document.readyState')=='complete')

    def goto(self, url):
        self.call('Page.navigate', url='about:blank')
        self.loaded('about:blank')
        self.call('Page.navigate', url=url)
        self.loaded(url.partition('#')[0].partition('?token')[0])

    def look(self, width=1280, height=900, dark=False):
        "Set the size of the window, and the colour scheme"
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = dict(name='prefers-color-scheme', value='dark' if dark else 'light')
        self.call('Emulation.setEmulatedMedia', features=[scheme])

    def screenshot(self, file):
        data = self.call('Page.captureScreenshot', format='png')['data']
        Path(file).write_bytes(base64.b64decode(data))

    @property
    def requests(self):
        "Addresses that the tab has asked for"
        found = [o['params']['request']['url'] for o in self.events if o['method']=='Network.requestWillBeSent']
        return [url for url in found if not url.startswith('about:')]
    @property
    def complaints(self):
        "What the browser logged as an error, such as a breach of the policy"
        entries = [o['params']['entry'] for o in self.events if o['method']=='Log.entryAdded']
        thrown = [o['params'] for o in self.events if o['method']=='Runtime.exceptionThrown']
        return [o for o in entries if o['level']=='error']+thrown

@contextmanager
def chromium():
    "Yield a `Tab`"
    from websockets.sync.client import connect
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen([PROGRAM, *FLAGS, f'--user-data-dir={folder}', 'about:blank'],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env=os.environ | dict(HOME=folder))
        try:
            file = Path(folder)/'DevToolsActivePort'
            wait_for(lambda: file.exists() and '\n' in file.read_text())
            port = int(file.read_text().split()[0])
            tabs = f'http://127.0.0.1:{port}/json/list'
            pages = wait_for(lambda: [o for o in json.load(urlopen(tabs)) if o['type']=='page'])
            with connect(pages[0]['webSocketDebuggerUrl'], max_size=None) as socket: yield Tab(socket)
        finally:
            process.terminate()
            process.wait(30)
