"""Drops the privileges that an untrusted program must not have, for this process and its children.

Linux only, by system calls: resource limits, capabilities, Landlock (https://docs.kernel.org/userspace-api/landlock.html)
and a seccomp filter. Dropped privileges cannot be regained.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

# Landlock: all rights to files up to ABI 7, the rights that apply to files that are not folders, and those for reading.
_ALL_RIGHTS: Final = (1 << 16) - 1
_FILE_RIGHTS: Final = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_READ_RIGHTS: Final = 1 << 0 | 1 << 2 | 1 << 3
_READ_WRITE: Final = 1 << 1 | 1 << 2
_TCP: Final = 0b11
_SCOPES: Final = 0b11  # abstract sockets and signals
LANDLOCK_ABI: Final = 6  # the first with scopes

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAPBSET_DROP: Final = 24
_PR_SET_SECCOMP: Final = 22

# Numbers of system calls: x86_64 and the generic table (aarch64, riscv64); None where the call does not exist.
_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chmod": (90, None),
    "chown": (92, None),
    "chroot": (161, 51),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "finit_module": (313, 273),
    "fremovexattr": (199, 16),
    "fsconfig": (431, 431),
    "fsetxattr": (190, 7),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "futimesat": (261, None),
    "init_module": (175, 105),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lchown": (94, None),
    "lremovexattr": (198, 15),
    "lsetxattr": (189, 6),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "removexattr": (197, 14),
    "request_key": (249, 218),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "semget": (64, 190),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "setsid": (112, 157),
    "settimeofday": (164, 170),
    "setxattr": (188, 5),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "utime": (132, None),
    "utimensat": (280, 88),
    "utimes": (235, None),
}  # fmt: skip
# The kernel's machinery, other processes, namespaces, and memory that no limit counts: honest programs need none of it.
_NEVER: Final = (
    "acct", "add_key", "bpf", "chroot", "clock_settime", "delete_module", "fanotify_init", "finit_module", "fsconfig",
    "fsmount", "fsopen", "fspick", "init_module", "io_uring_enter", "io_uring_register", "io_uring_setup", "kcmp",
    "kexec_file_load", "kexec_load", "keyctl", "memfd_create", "memfd_secret", "migrate_pages", "mount",
    "mount_setattr", "move_mount", "move_pages", "mq_open", "msgget", "name_to_handle_at", "open_by_handle_at",
    "open_tree", "perf_event_open", "pidfd_getfd", "pivot_root", "process_madvise", "process_vm_readv",
    "process_vm_writev", "ptrace", "quotactl", "reboot", "request_key", "semget", "setdomainname", "sethostname",
    "setns", "settimeofday", "shmget", "swapoff", "swapon", "syslog", "umount2", "unshare", "userfaultfd",
)  # fmt: skip
# Without namespaces: the network, objects shared by name, and leaving the process group that is killed in the end.
_NOT_WITHOUT_NAMESPACES: Final = (
    "inotify_init", "inotify_init1", "ioprio_set", "setpgid", "setpriority", "setsid", "socket",
)  # fmt: skip
# Landlock does not restrict changes of modes, owners, times and attributes of other files: these calls do nothing.
_WITHOUT_EFFECT: Final = (
    "chmod", "chown", "fchmod", "fchmodat", "fchmodat2", "fchown", "fchownat", "fremovexattr", "fsetxattr", "futimesat",
    "lchown", "lremovexattr", "lsetxattr", "removexattr", "setxattr", "utime", "utimensat", "utimes",
)  # fmt: skip
# Allowed for the process itself (0), not for another one.
_OF_ITSELF: Final = ("prlimit64", "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler")
# New namespaces: mount, cgroup, uts, ipc, user, pid, net.
_NAMESPACE_FLAGS: Final = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

_EPERM, _ENOSYS = 1, 38
_AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3}


class _Filter(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32),
    )  # fmt: skip


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filters", ctypes.POINTER(_Filter)))


def confine(spec: Mapping[str, Any]) -> None:
    """Applies a specification.

    Args:
        spec: ``isolation``; ``limits`` by name of the resource; ``user`` to become, if this is the superuser;
            ``readable`` and ``writable`` paths.

    Raises:
        OSError: a privilege could not be dropped.
    """
    if spec["user"] is not None:
        os.setgroups([])
        os.setresgid(spec["user"], spec["user"], spec["user"])
        os.setresuid(spec["user"], spec["user"], spec["user"])
    for name, value in spec["limits"].items():
        kind = getattr(resource, name, None)
        if kind is not None:
            _lower(kind, value)
    if spec["isolation"] == "none":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _drop_capabilities(libc)
    if spec["isolation"] == "landlock":
        _restrict_files(libc, spec["readable"], spec["writable"])
    _restrict_calls(libc, has_namespaces=spec["isolation"] == "bubblewrap")


def _lower(kind: int, value: int) -> None:
    _, ceiling = resource.getrlimit(kind)
    if ceiling != resource.RLIM_INFINITY:
        value = min(value, ceiling)
    resource.setrlimit(kind, (value, value))


def _check(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def landlock_abi() -> int:
    """The system's Landlock version; 0 without Landlock."""
    if os.uname().sysname != "Linux":
        return 0
    return max(int(ctypes.CDLL(None, use_errno=True).syscall(444, 0, 0, 1)), 0)


def _drop_capabilities(libc: Any) -> None:
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails without capabilities to drop
    header = struct.pack("=Ii", 0x20080522, 0)
    _check(libc.capset(header, struct.pack("=6I", 0, 0, 0, 0, 0, 0)))


def _restrict_files(libc: Any, readable: Sequence[str], writable: Sequence[str]) -> None:
    """Restricts files to these paths; no TCP, signal or abstract socket reaches a process outside."""
    attributes = struct.pack("=QQQ", _ALL_RIGHTS, _TCP, _SCOPES)
    ruleset = _check(libc.syscall(444, attributes, len(attributes), 0))
    devices = ["/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"]
    rights = [(path, _READ_RIGHTS) for path in [*readable, *devices]]
    for path, allowed in [*rights, ("/dev/null", _READ_WRITE), *((path, _ALL_RIGHTS) for path in writable)]:
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            allowed &= _FILE_RIGHTS
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            _check(libc.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, descriptor), 0))
        finally:
            os.close(descriptor)
    _check(libc.syscall(446, ruleset, 0))
    os.close(ruleset)


def _restrict_calls(libc: Any, *, has_namespaces: bool) -> None:
    machine = os.uname().machine
    if machine not in _AUDIT_ARCH:
        raise OSError(f"no filter of system calls is known for the architecture {machine!r}")
    instructions = _filter(machine, has_namespaces)
    array = (_Filter * len(instructions))(*(_Filter(*instruction) for instruction in instructions))
    program = _Program(len(instructions), ctypes.cast(array, ctypes.POINTER(_Filter)))
    _check(libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0))


def _filter(machine: str, has_namespaces: bool) -> list[tuple[int, int, int, int]]:
    """Builds the filter's instructions: the number of the call, then its action."""
    allow, deny, missing, nothing = 0x7FFF0000, 0x00050000 | _EPERM, 0x00050000 | _ENOSYS, 0x00050000
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    column = 0 if machine == "x86_64" else 1

    def number(name: str) -> int | None:
        return _CALLS[name][column]

    code = [
        (load, 0, 0, 4),  # the architecture; calls of any other are refused
        (equal, 1, 0, _AUDIT_ARCH[machine]),
        (give, 0, 0, deny),
        (load, 0, 0, 0),  # the number of the call
    ]
    if machine == "x86_64":
        code += [(any_bit, 0, 1, 0x40000000), (give, 0, 0, deny)]  # the x32 table

    # Jumps are relative: each pair compares the number loaded above and, if equal, returns the action.
    verdicts = dict.fromkeys(_NEVER, deny) | {
        "clone3": missing
    }  # its flags lie in memory, out of the filter's reach: the C library falls back to clone
    if not has_namespaces:
        verdicts |= dict.fromkeys(_NOT_WITHOUT_NAMESPACES, deny) | dict.fromkeys(_WITHOUT_EFFECT, nothing)
    for name, verdict in verdicts.items():
        if (call := number(name)) is not None:
            code += [(equal, 0, 1, call), (give, 0, 0, verdict)]

    # These depend on the first argument, which is loaded over the number: so each block has to end in an action.
    first_argument = 16  # low half, little-endian
    for name in _OF_ITSELF:
        if (call := number(name)) is not None:
            code += [
                (equal, 0, 4, call), (load, 0, 0, first_argument), (equal, 0, 1, 0), (give, 0, 0, allow),
                (give, 0, 0, deny),
            ]  # fmt: skip
    call = number("clone")
    assert call is not None
    code += [
        (equal, 0, 4, call), (load, 0, 0, first_argument), (any_bit, 0, 1, _NAMESPACE_FLAGS), (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]  # fmt: skip
    return [*code, (give, 0, 0, allow)]
