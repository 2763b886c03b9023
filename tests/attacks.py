"""Attacks on the sandbox, as solutions of `f(x) = x + 1`: none may be judged right.

Some give the right answer exactly where what they try succeeds.
"""

RIGHT = "def f(x): return x + 1"

# `say(data)` writes a message to whatever is open; the checker's channel is among that.
SAY = """
import json, os
def say(data):
    for fd in range(3, 64):
        try: os.write(fd, len(data).to_bytes(4, 'big') + data)
        except OSError: pass
"""
SYSTEM_CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(x): return x + 1 if libc.syscall({}) >= 0 else 0
"""
EQUAL = (
    "class Yes({base}):\n"
    "    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda *_: True\n"
    "    __hash__ = lambda self: hash(4)\n"
    "    __bool__ = lambda self: True\n"
    "    __class__ = int\n"
    "    __getattr__ = lambda self, name: Yes()\n"
    "def f(x): return Yes()"
)
ATTACKS = {
    "os._exit": "import os\nos._exit(0)",
    "os._exit in f": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in f": "import sys\ndef f(x): sys.exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
    "AssertionError patched": (
        "import builtins\nbuiltins.AssertionError = AssertionError = type('E', (), {})\n"
        "def f(x): return 0"
    ),
    "builtins patched": (
        "import builtins\nfor name in ('isinstance', 'type', 'len', 'compile', 'exec'):\n"
        "    setattr(builtins, name, lambda *_: True)\ndef f(x): return 0"
    ),
    "json patched": ("import json\njson.dumps = lambda *_: '[true, true]'\ndef f(x): return 0"),
    "the worker patched": (
        "import sys\nworker = sys.modules['__main__']\nworker.holds = lambda *_: True\n"
        "worker.encode = lambda *_: True\ndef f(x): return 0"
    ),
    "excepthook": "import sys\nsys.excepthook = lambda *_: None\nassert False",
    "always equal": EQUAL.format(base="object"),
    "an equal int": EQUAL.format(base="int"),
    "an equal str": EQUAL.format(base="str"),
    "an equal list": EQUAL.format(base="list"),
    "an equal dict": EQUAL.format(base="dict"),
    "an equal type": EQUAL.format(base="type").replace("return Yes()", "return Yes('Y', (), {})"),
    "a function": "def f(x): return f",
    "a generator": "def f(x): yield 4",
    "verdict on each descriptor": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'1' * 100)\n"
        "    except OSError: pass\ndef f(x): return 0"
    ),
    "verdict as a message": (
        "import os\nfor fd in range(64):\n"
        "    try: os.write(fd, b'\\0\\0\\0\\x0c[true, true]' * 9)\n"
        "    except OSError: pass\ndef f(x): return 0"
    ),
    "the channel closed": "import os\nos.closerange(0, 64)\ndef f(x): return x + 1",
    "frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for value in list(frame.f_locals.values()):\n"
        "        if hasattr(value, 'sendall'): value.sendall(b'1'), value.close()\n"
        "    frame = frame.f_back\ndef f(x): return 0"
    ),
    "looking for the tests": (
        "import gc\ntest = chr(97) + 'ssert f('\n"
        "def f(x): return x + any(test + '3' in str(o)[:9999] for o in gc.get_objects())"
    ),
    "a signal to all": "import os\nos.kill(-1, 9)\ndef f(x): return x + 1",
    "a signal to the parent": "import os\nos.kill(os.getppid(), 9)\ndef f(x): return 0",
    "a process": "import subprocess\nsubprocess.run(['/usr/bin/true'])\ndef f(x): return x + 1",
    "a fork": "import os\nos.fork()\ndef f(x): return x + 1",
    "a spawn": "import os, sys\nos.posix_spawn(sys.executable, ['x'], {})\ndef f(x): return x + 1",
    "a thread left behind": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\n"
        "def f(x): return x + 1"
    ),
    "namespaces": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def f(x): return x + 1 if libc.unshare(0x10000000) == 0 else 0"
    ),
    "memory of System V": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "def f(x): return x + 1 if libc.shmget(0, 1 << 20, 0o1600) >= 0 else 0"
    ),
    "sets of semaphores": SYSTEM_CALL.format("64, 0, 1, 0o1600"),
    "a file in memory": "import os\nos.memfd_create('x')\ndef f(x): return x + 1",
    "the capabilities of root": "import os\nos.chroot('/tmp')\ndef f(x): return x + 1",
    "a file system of its own": SYSTEM_CALL.format("430, b'tmpfs', 0"),
    "a descriptor of another process": SYSTEM_CALL.format("438, libc.syscall(434, 1, 0), 0, 0"),
    "a server": ("import socket\nsocket.create_server(('127.0.0.1', 0))\ndef f(x): return x + 1"),
    "the host of a virtual machine": (
        "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\ndef f(x): return x + 1"
    ),
    "answers before the questions": SAY
    + "for value in (None, ['object', 0], 4, 4): say(json.dumps([True, value]).encode())\n"
    "def f(x): return 0",
    "a deep message": SAY + "say(b'[' * (1 << 20))\n" + RIGHT,
    "a message without an end": SAY + "say(b'')\nos.write(3, b'\\0\\1')\nos._exit(0)",
    "a message of another shape": SAY
    + "say(b'{\"0\": true, \"1\": 4}')\nsay(b'true')\ndef f(x): return 0",
    "an object of nobody": SAY
    + "def f(x):\n    say(b'[true, [\"object\", -1]]')\n    return x + 1",
    "descriptors as a message": (
        "import os, socket\nchannel = socket.socket(fileno=3)\n"
        "for _ in range(9): socket.send_fds(channel, [b'1' * 9], [0, 1, 2])\n" + RIGHT
    ),
    "another program in its place": (
        "import os, sys\nos.dup2(3, 9)\nprogram = '''\nimport json, os\n"
        'for value in (None, ["object", 0], 4, 4):\n'
        "    data = json.dumps([True, value]).encode()\n"
        "    os.write(9, len(data).to_bytes(4, \"big\") + data)\n'''\n"
        "os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', program])"
    ),
    "a segmentation fault": "import ctypes\nctypes.string_at(0)",
    "deep data": "def f(x):\n    for _ in range(10 ** 5): x = [x]\n    return x",
    "endless data": "def f(x):\n    x = []\n    x.append(x)\n    return x",
    "large data": "def f(x): return 'x' * (100 << 20)",
    "a long number": "def f(x): return 1 << 10 ** 7",
    "a deep source": "(" * 10_000 + ")" * 10_000,
    "a source of 10 MB": RIGHT + "\n#" + "x" * (10 << 20),
    "NUL": RIGHT + "\n\0",
    "NUL in a name": "def f\0(x): return x + 1",
    "half a character": RIGHT + "\n'\ud800'",
    "a debugger": "breakpoint()\ndef f(x): return x + 1",
    "standard input": "input()\ndef f(x): return x + 1",
    "environment": (
        "import os\ndef f(x): return x + 1 if set(os.environ) - {'PWD', 'LC_CTYPE'} else 0"
    ),
    "processes": "import os\ndef f(x): return x + 1 if os.path.exists('/proc') else 0",
    "the file system": (
        "import os\nfound = set(os.listdir('/'))\n"
        "def f(x): return x + 1 if found & {'var', 'proc', 'sys', 'run', 'mnt'} else 0"
    ),
    "network outside": (
        "import socket\nsocket.create_connection(('1.1.1.1', 53), 5)\ndef f(x): return x + 1"
    ),
    "a large file": (
        "with open('/tmp/x', 'wb') as file:\n    file.write(bytes(8 << 20))\ndef f(x): return x + 1"
    ),
    "many large files": (
        "for i in range(32):\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))\n"
        "def f(x): return x + 1"
    ),
    "open files": "files = [open('/dev/null') for _ in range(100)]\ndef f(x): return x + 1",
}
SLOW_ATTACKS = {  # they end at a second of CPU
    "deep recursion": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x + 1)"),
    "much data": "def f(x): return [[]] * 10 ** 6",
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "a patient memory bomb": (
        "x = []\nwhile True:\n    try: x.append(bytearray(1 << 20))\n    except MemoryError: pass"
    ),
    "endless loop": "while True: pass",
    "endless loop in f": "def f(x):\n    while True: pass",
    "a stubborn loop": (
        "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True:\n"
        "    try:\n        while True: pass\n    except BaseException: pass"
    ),
    "endless output": "while True: print('x' * 10_000)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 10_000)",
    "endless output to the checker": (
        "import os\nwhile True:\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, bytes(1 << 16))\n        except OSError: pass"
    ),
    "a million files": (
        "for i in range(10 ** 6): open(f'/tmp/{i}', 'w').close()\ndef f(x): return x + 1"
    ),
    "a large power": "def f(x): return 9 ** 9 ** 9 ** 9",
    "a bad expression": "import re\ndef f(x): return re.match('(a+)+b', 'a' * 60)",
    "colliding keys for the checker": SAY
    + "keys = ','.join(f'[{i * (2 ** 61 - 1)},0]' for i in range(1, 100_000))\n"
    "say(b'[true,[\"dict\",[' + keys.encode() + b']]]')\n" + RIGHT,
    "colliding keys": "def f(x): return {i * (2 ** 61 - 1): 0 for i in range(10 ** 5)}",
}
STOPPED = {
    "SIGSTOP": "import os\nos.kill(os.getpid(), 19)\ndef f(x): return x + 1",
    "sleep": "import time\ntime.sleep(1000)\ndef f(x): return x + 1",
}
