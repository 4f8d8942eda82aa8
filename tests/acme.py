"""A package with verifiers, as somebody else would install it: metadata with entry points beside a module."""

from __future__ import annotations

import os
from pathlib import Path

MODULE = '''
import os, signal, subprocess, sys, time

def judge(text, answer, row):
    """Does what the text says."""
    return BEHAVIOURS[text.split()[0]](text, answer, row)

def hang(text, answer, row):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        pass

def child(text, answer, row):
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(answer, "w") as file:
        file.write(str(started.pid))
    hang(text, answer, row)

def once(text, answer, row):
    """Says its pid in the file `answer` and waits for the file `answer.go`."""
    with open(answer + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(answer + ".new", answer)
    while not os.path.exists(answer + ".go"):
        pass
    return 1.0

def noisy(text, answer, row):
    for _ in range(200):
        print("noise " * 1000)
    os.write(1, b"\\xff\\xfe\\x00" * 10000)
    os.write(2, b"\\xff\\xfe\\x00" * 10000)
    return 1.0, f"input: {sys.stdin.read()!r}"

def hog(text, answer, row):
    return len(bytearray(64 << 30))

def say(text, answer, row):
    return 1.0, text.split(" ", 1)[1]

BEHAVIOURS = {
    "hang": hang,
    "child": child,
    "once": once,
    "noisy": noisy,
    "hog": hog,
    "say": say,
    "pid": lambda text, answer, row: (1.0, str(os.getpid())),
    "length": lambda text, answer, row: (1.0, str(len(text))),
    "answer": lambda text, answer, row: (1.0, f"{answer!r} {row!r}"),
    "names": lambda text, answer, row: (1.0, ",".join(sorted(os.environ))),
    "segv": lambda text, answer, row: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda text, answer, row: (sys.stderr.write("out of luck\\n"), sys.stderr.flush(), os._exit(3)),
    "raise": lambda text, answer, row: 1 / 0,
    "sysexit": lambda text, answer, row: sys.exit(5),
    "nan": lambda text, answer, row: float("nan"),
    "nap": lambda text, answer, row: time.sleep(0.2) or 0.5,
    "half": lambda text, answer, row: 0.5,
    "true": lambda text, answer, row: True,
    "above": lambda text, answer, row: (7.5, "well done"),
    "below": lambda text, answer, row: -1,
    "word": lambda text, answer, row: "good",
    "surrogate": lambda text, answer, row: (1.0, "\\udcff" + text[-1]),
    "long": lambda text, answer, row: (1.0, "word " * 10000),
}
'''
ENTRY_POINTS = """[stillhouse.verifiers]
acme = acme_verifiers:judge
acme-broken = acme_verifiers:missing
acme-number = acme_verifiers:__doc__
acme-dies = acme_deadly:judge
exact = acme_verifiers:judge
"""


def install(folder: Path, *, name: str = "acme-verifiers", points: str = ENTRY_POINTS) -> Path:
    """Make the package in `folder`, which can then stand on a path."""
    (folder / "acme_verifiers.py").write_text(MODULE)
    (folder / "acme_deadly.py").write_text("import os\nos._exit(7)\n")
    metadata = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(points)
    return folder


def path_with(folder: Path) -> str:
    """PYTHONPATH with the folder in front of what stands there."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
