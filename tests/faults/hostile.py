"""Programs that attack the machine they run on, each with the same program without its attack.

An attack prints ``worked`` if it has got what it wanted; a control prints it, too, by what a program may do.
``{...}`` stands for what the tests have put up: see ``Target`` in the tests.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Attack(NamedTuple):
    name: str
    code: str
    control: str = "pass"


# Reading what is not the program's.
READ: Final = [
    Attack("a file", "assert 'hidden' in open({secret!r}).read()", "open('f', 'w').write('hidden')\nopen('f').read()"),
    Attack(
        "os.open with dir_fd",
        "import os\nfd = os.open({folder!r}, os.O_RDONLY)\nassert os.read(os.open('secret', os.O_RDONLY, dir_fd=fd), "
        "9)",
        "import os\nfd = os.open('.', os.O_RDONLY)\nos.close(os.open('mine', os.O_CREAT | os.O_RDWR, dir_fd=fd))",
    ),
    Attack(
        "O_PATH and /proc/self/fd",
        "import os\nfd = os.open({secret!r}, os.O_PATH)\nassert open(f'/proc/self/fd/{{fd}}').read()",
    ),
    Attack(
        "a symbolic link",
        "import os\nos.symlink({secret!r}, 'link')\nassert open('link').read()",
        "import os\nopen('f', 'w').write('x')\nos.symlink('f', 'link')\nassert open('link').read()",
    ),
    Attack(
        "a hard link",
        "import os\nos.link({secret!r}, 'link')\nassert open('link').read()",
        "import os\nopen('f', 'w').write('x')\nos.link('f', 'link')\nassert open('link').read()",
    ),
    Attack(
        "sqlite3",
        "import sqlite3\nassert sqlite3.connect({database!r}).execute('select * from t').fetchall()",
        "import sqlite3\nc = sqlite3.connect('mine.db')\nc.execute('create table t (x)')\nc.commit()",
    ),
    Attack(
        "the C library",
        "import ctypes\nlibc = ctypes.CDLL(None)\nfd = libc.open({secret!r}.encode(), 0)\nassert fd >= 0\n"
        "buffer = ctypes.create_string_buffer(9)\nassert libc.read(fd, buffer, 9) > 0",
        "import ctypes\nassert ctypes.CDLL(None).getpid() > 0",
    ),
    Attack(
        "another program",
        "import subprocess\nassert subprocess.run(['cat', {secret!r}], capture_output=True, check=True).stdout",
        "import subprocess\nassert subprocess.run(['echo', 'x'], capture_output=True, check=True).stdout",
    ),
    Attack(
        "another interpreter",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'open({secret!r})'], check=True)",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import json'], check=True)",
    ),
    Attack(
        "multiprocessing, spawned",
        "import multiprocessing as m\ndef f(end): end.send(open({secret!r}).read())\n"
        "if __name__ == '__main__':\n    a, b = m.Pipe()\n    p = m.get_context('spawn').Process(target=f, args=(b,))\n"
        "    p.start()\n    b.close()\n    assert a.recv()",
        "import multiprocessing as m\ndef f(end): end.send('x')\n"
        "if __name__ == '__main__':\n    a, b = m.Pipe()\n    p = m.get_context('fork').Process(target=f, args=(b,))\n"
        "    p.start()\n    assert a.recv()",
    ),
    Attack("the environment", "import os\nassert 'VERY_SECRET' in os.environ", "import os\nassert os.environ['PATH']"),
    Attack("a process's environment", "assert b'VERY_SECRET' in open('/proc/{victim}/environ', 'rb').read()"),
    Attack(
        "the parent's environment",
        "import os\nassert b'VERY_SECRET' in open(f'/proc/{{os.getppid()}}/environ', 'rb').read()",
        "import os\nassert os.getppid() >= 0",
    ),
    Attack("a process's root", "assert open('/proc/{victim}/root{secret}').read()"),
    Attack("a process's memory", "open('/proc/{victim}/mem', 'rb')"),
    Attack("a process's command line", "assert open('/proc/{victim}/cmdline').read()"),
    Attack("the repository", "assert open({repository!r}).read()", "import json\nassert open(json.__file__).read()"),
    Attack("the home folder", "import os\nassert {entry!r} in os.listdir({home!r})", "import os\nos.listdir('.')"),
    Attack("the system's accounts", "open('/etc/passwd')"),
    Attack("a sibling's folder", "assert open({sibling!r}).read()"),
    Attack(
        "shared memory of a name",
        "from multiprocessing import shared_memory\nshared_memory.SharedMemory({shared!r}, create=False)",
    ),
    Attack(
        "memory by process_vm_readv",
        "import ctypes\nassert ctypes.CDLL(None).syscall(310, {victim}, 0, 0, 0, 0, 0) == 0",
    ),
    Attack("ptrace", "import ctypes\nassert ctypes.CDLL(None).ptrace(16, {victim}, 0, 0) == 0"),
]

# Changing what is not the program's; the tests read the files afterwards.
WRITE: Final = [
    Attack("a new file", "open({folder!r} + '/new', 'w')", "open('new', 'w')"),
    Attack("an old file", "open({secret!r}, 'a').write('x')", "open('old', 'a').write('x')"),
    Attack("a folder", "import os\nos.mkdir({folder!r} + '/new')", "import os\nos.mkdir('new')"),
    Attack("a database", "import sqlite3\nsqlite3.connect({folder!r} + '/new').execute('create table t (x)')"),
    Attack(
        "moving a file",
        "import os\nos.rename({secret!r}, {folder!r} + '/new')",
        "import os\nopen('a', 'w')\nos.rename('a', 'b')",
    ),
    Attack("removing a file", "import os\nos.remove({secret!r})", "import os\nopen('a', 'w')\nos.remove('a')"),
    Attack(
        "a tree", "import shutil\nshutil.rmtree({folder!r})", "import shutil, os\nos.mkdir('a')\nshutil.rmtree('a')"
    ),
    Attack("cutting a file", "import os\nos.truncate({secret!r}, 0)", "import os\nopen('a', 'w')\nos.truncate('a', 0)"),
    Attack("a link elsewhere", "import os\nos.symlink('x', {folder!r} + '/new')", "import os\nos.symlink('x', 'new')"),
    Attack("the interpreter", "import os\nopen(os.__file__, 'a')", "import os\nopen(os.__file__)"),
    Attack("a fifo", "import os\nos.mkfifo({folder!r} + '/new')", "import os\nos.mkfifo('new')"),
    Attack(
        "dir_fd",
        "import os\nfd = os.open('/', os.O_RDONLY | os.O_DIRECTORY)\nos.unlink({secret!r}[1:], dir_fd=fd)",
        "import os\nopen('a', 'w')\nos.unlink('a', dir_fd=os.open('.', os.O_RDONLY))",
    ),
    Attack("the root folder", "open('/new', 'w')", "open('new', 'w')"),
    Attack("devices", "open('/dev/new', 'w')", "open('/dev/null', 'w').write('x')"),
]
# Attacks that do not fail in every mode, but must have no effect.
NO_EFFECT: Final = [
    Attack("modes", "import os\nos.chmod({secret!r}, 0)"),
    Attack("times", "import os\nos.utime({secret!r}, (1, 1))"),
    Attack("attributes", "import os\nos.setxattr({secret!r}, 'user.x', b'x')"),
    Attack("a signal to all", "import os, signal\nos.kill(-1, signal.SIGKILL)"),
    Attack("a signal to the parent", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"),
    Attack(
        "a signal to the group", "import os, signal\nsignal.signal(15, signal.SIG_IGN)\nos.killpg(0, signal.SIGTERM)"
    ),
    Attack("a signal", "import os, signal\nos.kill({victim}, signal.SIGKILL)"),
    Attack("a signal to who is ready", "import signal, os\nsignal.pidfd_send_signal(os.pidfd_open({victim}), 9)"),
    Attack("limits", "import resource\nresource.prlimit({victim}, resource.RLIMIT_NOFILE, (0, 0))"),
    Attack("priorities", "import os\nos.setpriority(os.PRIO_PROCESS, {victim}, 19)"),
    Attack("processors", "import os\nos.sched_setaffinity({victim}, {{0}})"),
]

NETWORK: Final = [
    Attack(
        "loopback",
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)",
        "import socket\na, b = socket.socketpair()\na.send(b'x')\nassert b.recv(1)",
    ),
    Attack(
        "IPv6",
        "import socket\nsocket.create_connection(('::ffff:127.0.0.1', {port}), timeout=1)",
        "import asyncio\nasync def g(): return 1\nassert asyncio.run(g())",
    ),
    Attack("urllib", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)"),
    Attack("a socket with a path", "import socket\nsocket.socket(socket.AF_UNIX).connect({unix!r})"),
    Attack("an abstract socket", "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + {abstract!r})"),
    Attack("raw packets", "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    Attack("the link", "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    Attack("another address", "import socket\nsocket.create_connection(('10.0.0.1', 80), timeout=1)"),
    Attack(
        "ctypes", "import ctypes\nl = ctypes.CDLL(None)\nassert l.io_uring_setup if 0 else l.syscall(425, 1, 0) != -1"
    ),
]

KERNEL: Final = [
    Attack("a user namespace", "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0"),
    Attack(
        "a namespace by clone",
        "import ctypes\npid = ctypes.CDLL(None).syscall(56, 0x10000000 | 17, 0, 0, 0, 0)\n"
        "import os\nos._exit(0) if pid == 0 else None\nassert pid > 0",
        "import os\npid = os.fork()\nos._exit(0) if pid == 0 else os.waitpid(pid, 0)",
    ),
    Attack("mount", "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0"),
    Attack("chroot", "import os\nos.chroot('.')"),
    Attack(
        "bpf",
        "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nassert l.syscall(321, 0, 0, 0) == 0 or "
        "ctypes.get_errno() != 1",
    ),
    Attack("keys", "import ctypes\nassert ctypes.CDLL(None).syscall(250, 0, -3, 1) != -1"),
    Attack("userfaultfd", "import ctypes\nassert ctypes.CDLL(None).syscall(323, 1) >= 0"),
    Attack(
        "perf",
        "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nassert l.syscall(298, 0, 0, -1, -1, 0) >= 0 or "
        "ctypes.get_errno() != 1",
    ),
    Attack("memory without a name", "import os\nos.memfd_create('x')"),
    Attack("System V memory", "import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0"),
    Attack("becoming root", "import os\nos.setuid(0)\nassert open('/etc/shadow').read()"),
    Attack("the clock", "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)"),
    Attack("the terminal", "open('/dev/tty')"),
    Attack("the kernel's settings", "open('/proc/sys/kernel/core_pattern', 'w')"),
]

# Taking more than there is: nothing of these passes.
GREED: Final = [
    Attack("memory", "x = bytearray(2 * 10**9)", "x = bytearray(10**7)"),
    Attack(
        "memory of many",
        "import os, time\nfor _ in range(12):\n    if os.fork() == 0:\n        x = bytearray(b'x') * (150 * 2**20)\n"
        "        time.sleep(60)\ntime.sleep(3)",
        "import os\nfor _ in range(4):\n    if os.fork() == 0:\n        os._exit(0)",
    ),
    Attack("forks", "import os\nwhile True:\n    os.fork()", "import os\nif os.fork() == 0: os._exit(0)\nos.wait()"),
    Attack(
        "threads",
        "import threading, time\nfor _ in range(2000): threading.Thread(target=time.sleep, args=(60,), "
        "daemon=True).start()\ntime.sleep(2)",
        "import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()",
    ),
    Attack("one large file", "open('a', 'wb').write(b'x' * 100 * 2**20)", "open('a', 'wb').write(b'x' * 2**20)"),
    Attack(
        "many large files",
        "import time\nfor n in range(40):\n    open(str(n), 'wb').write(b'x' * 10 * 2**20)\ntime.sleep(2)",
        "for n in range(4):\n    open(str(n), 'wb').write(b'x' * 2**20)",
    ),
    Attack(
        "many small files",
        "import os\nfor n in range(10**9):\n    os.close(os.open(str(n), os.O_CREAT))",
        "import os\nfor n in range(100):\n    os.close(os.open(str(n), os.O_CREAT))",
    ),
    Attack(
        "shared memory",
        "import time\nfor n in range(40):\n    open(f'/dev/shm/{{n}}', 'wb').write(b'x' * 10 * 2**20)\ntime.sleep(2)",
    ),
    Attack("output", "import sys\nwhile True: sys.stdout.write('x' * 2**20)", "print(end='x' * 0)"),
    Attack("descriptors", "import os\nx = [os.dup(0) for _ in range(10**5)]", "import os\nx = [os.dup(0) for _ in range(9)]"),
    Attack("time", "while True: pass", "x = sum(range(10**5))"),
    Attack("sleep", "import time\ntime.sleep(600)", "import time\ntime.sleep(0.01)"),
    Attack(
        "signals unheard",
        "import signal\nfor n in (1, 2, 15, 24, 14):\n    signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import signal\nfor n in (1, 2, 15, 24, 14):\n    signal.signal(n, signal.SIG_IGN)",
    ),
]  # fmt: skip

# Living longer than the verdict; the tests look for processes with the mark.
SURVIVE: Final = [
    Attack("a child", "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {sleeper!r}])"),
    Attack(
        "a session",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {sleeper!r}], start_new_session=True)",
    ),
    Attack(
        "two forks",
        "import os, sys\nif os.fork() == 0:\n    try: os.setsid()\n    except OSError: pass\n    if os.fork() == 0:\n"
        "        os.execv(sys.executable, ['python', '-c', {sleeper!r}])\n    os._exit(0)\nos.wait()",
    ),
    Attack(
        "a group",
        "import os, sys\nif os.fork() == 0:\n    try: os.setpgid(0, 0)\n    except OSError: pass\n"
        "    os.execv(sys.executable, ['python', '-c', {sleeper!r}])",
    ),
]

# Programs that do not compute the function that the tests ask for (f(2) == 1.5, f(3) == [1, 2], f(4) == 'abc').
_EQUAL = "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
FORGE: Final = [
    Attack("leaving at once", "import os\nos._exit(0)"),
    Attack("leaving in the end", "raise SystemExit(0)"),
    Attack("printing", "print('passed\\nran passed')\nprint('{{\"test\": 0, \"passed\": true}}')"),
    Attack("at exit", "import atexit\natexit.register(print, 'passed')\ndef f(x): raise SystemExit(0)"),
    Attack("builtins", "import builtins\nbuiltins.exec = builtins.compile = lambda *_: None\nf = lambda x: 0"),
    Attack(
        "frames on every descriptor",
        "import os, struct\nm = b'{{\"test\": 0, \"passed\": true}}'\nm = struct.pack('>I', len(m)) + m\n"
        "for n in range(128):\n    for _ in range(1000):\n        try: os.write(n, m)\n        except OSError: break",
    ),
    Attack(
        "replies on every descriptor",
        "import os, struct\nm = b'{{\"value\": true}}'\nm = struct.pack('>I', len(m)) + m\n"
        "for n in range(3, 128):\n    try: os.write(n, m * 1000)\n    except OSError: pass",
    ),
    Attack("an error of its own", "class AssertionError(Exception): pass\ndef f(x): raise AssertionError"),
    Attack("equal to all", _EQUAL + "def f(x): return Yes()"),
    Attack("equal to all in a list", _EQUAL + "def f(x): return [Yes(), Yes()]"),
    Attack("a number equal to all", "class Yes(float):\n    def __eq__(self, other): return True\ndef f(x): return Yes(0)"),
    Attack("a list equal to all", "class Yes(list):\n    def __eq__(self, other): return True\ndef f(x): return Yes()"),
    Attack("a dictionary equal to all", "class Yes(dict):\n    def __eq__(self, other): return True\ndef f(x): return Yes()"),
    Attack(
        "arithmetic to zero",
        "class Zero:\n    def __sub__(self, other): return self\n    __rsub__ = __sub__\n    def __abs__(self): return "
        "0.0\n    def __lt__(self, other): return True\n    __gt__ = __le__ = __ge__ = __lt__\ndef f(x): return Zero()",
    ),
    Attack(
        "all questions are answered by yes",
        "class Yes:\n    def __getattr__(self, name): return lambda *a, **k: True\n    def __contains__(self, x): "
        "return True\ndef f(x): return Yes()",
    ),
    Attack(
        "addresses of memory",
        "class A:\n    __array_interface__ = {{'data': (4096, True), 'shape': (2,), 'typestr': '<f8', 'version': 3}}\n"
        "    def __array__(self, *a, **k): raise ValueError\ndef f(x): return A()",
    ),
    Attack("a library's function", "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0"),
    Attack("a library's function by another name", "from unittest.mock import MagicMock as isclose\nimport math\ndef f(x): return 0"),
    Attack("a library patched", "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 0"),
    Attack("a built-in function", "def abs(x): return 0\ndef len(x): return 2\ndef round(*x): return 1.5\ndef f(x): return 0"),
    Attack(
        "what is expected, in frames",
        "import sys, gc\ndef f(x):\n    frame, found = sys._getframe(), []\n    while frame:\n"
        "        found += [v for v in frame.f_locals.values()]\n        frame = frame.f_back\n"
        "    text = repr(found) + repr([o for o in gc.get_objects() if isinstance(o, (str, list, dict))][:5000])\n"
        "    return 1.5 if 'exp' + 'ected-1.5' in text else 0",
    ),
    Attack(
        "what is expected, in memory",
        "import re\ndef f(x):\n    text = b''\n    for line in open('/proc/self/maps'):\n"
        "        found = re.match(r'(\\w+)-(\\w+) rw', line)\n        if found:\n"
        "            start, end = (int(n, 16) for n in found.groups())\n"
        "            memory = open('/proc/self/mem', 'rb')\n            memory.seek(start)\n"
        "            try: text += memory.read(min(end - start, 2**24))\n            except (OSError, ValueError): "
        "pass\n    return 1.5 if re.search(rb'e[x]pected-1[.]5', text) else 0",
    ),
    Attack("the harness", "import sys\nfor m in list(sys.modules.values()):\n    if getattr(m, 'encode', None): m.encode = lambda *a: 1.5\ndef f(x): return 0"),
    Attack("tracing", "import sys\ndef t(*a): return t\nsys.settrace(t)\nsys.setprofile(t)\ndef f(x): return 0"),
    Attack("two of it", "import os\nos.fork()\ndef f(x): return 0"),
    Attack("an endless answer", "def f(x):\n    while True: yield 1.5"),
    Attack("a deep answer", "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y"),
    Attack("a huge answer", "def f(x): return 'x' * 10**8"),
    Attack("an answer in a circle", "def f(x):\n    y = []\n    y.append(y)\n    return y"),
    Attack("a huge number", "def f(x): return 10 ** (10 ** 6)"),
    Attack("hanging", "def f(x):\n    while True: pass"),
    Attack("not a number", "def f(x): return float('nan')"),
]  # fmt: skip
