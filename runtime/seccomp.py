"""The default seccomp profile: what containerd and docker let containers do.

A system call that is not allowed fails with EPERM. Allowed is what programs need and
what the kernel checks by itself; left out is what acts on the whole machine (mount,
modules, clocks, reboot, bpf, perf), what has been a way out of containers
(io_uring, userfaultfd, keyrings, user namespaces), and what is obsolete. A capability
that a container was given brings the calls that are of no use without it. The lists
are in seccomp.json, by topic; names that a libseccomp does not know are ignored.
"""

import errno
import json
import os
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

from runtime.linux import kernel_version

# Binaries that a machine runs besides its own. x32 is left out: nobody ships programs
# for it, and its calls were a way around filters.
_ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
    "armv7l": ("SCMP_ARCH_ARM",),
    "ppc64le": ("SCMP_ARCH_PPC64LE",),
    "riscv64": ("SCMP_ARCH_RISCV64",),
    "s390x": ("SCMP_ARCH_S390X", "SCMP_ARCH_S390"),
}
_OF_MACHINE = {
    "x86_64": ("arch_prctl", "modify_ldt"),
    "aarch64": ("arm_fadvise64_64", "arm_sync_file_range", "breakpoint", "cacheflush", "set_tls"),
    "armv7l": ("arm_fadvise64_64", "arm_sync_file_range", "breakpoint", "cacheflush", "set_tls"),
    "ppc64le": ("sync_file_range2", "swapcontext"),
    "riscv64": ("riscv_flush_icache", "riscv_hwprobe"),
    "s390x": ("s390_pci_mmio_read", "s390_pci_mmio_write", "s390_runtime_instr"),
}
_OF_CAPABILITY = {
    "CAP_BPF": ("bpf",),
    "CAP_DAC_READ_SEARCH": ("open_by_handle_at",),
    "CAP_PERFMON": ("perf_event_open",),
    "CAP_SYS_ADMIN": [
        "bpf",
        "clone",
        "clone3",
        "fanotify_init",
        "fsconfig",
        "fsmount",
        "fsopen",
        "fspick",
        "listmount",
        "lookup_dcookie",
        "mount",
        "mount_setattr",
        "move_mount",
        "open_tree",
        "perf_event_open",
        "quotactl",
        "quotactl_fd",
        "setdomainname",
        "sethostname",
        "setns",
        "statmount",
        "syslog",
        "umount",
        "umount2",
        "unshare",
    ],
    "CAP_SYS_BOOT": ("reboot",),
    "CAP_SYS_CHROOT": ("chroot",),
    "CAP_SYS_MODULE": ("delete_module", "finit_module", "init_module"),
    "CAP_SYS_NICE": (
        "get_mempolicy",
        "mbind",
        "set_mempolicy",
        "set_mempolicy_home_node",
    ),
    "CAP_SYS_PACCT": ("acct",),
    "CAP_SYS_RAWIO": ("ioperm", "iopl"),
    "CAP_SYS_TIME": [
        "adjtimex",
        "clock_adjtime",
        "clock_adjtime64",
        "clock_settime",
        "clock_settime64",
        "settimeofday",
        "stime",
    ],
    "CAP_SYS_TTY_CONFIG": ("vhangup",),
    "CAP_SYSLOG": ("syslog",),
}
# Linux, Linux for 32-bit programs, the same without address randomisation, "tell me".
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET: a new user namespace
# opens most of the kernel's privileged code to everybody.
_NAMESPACES = 0x7E020000
_AF_VSOCK = 40
# Before 4.8 a traced process could change its system call after the filter had seen it.
_SAFE_PTRACE = (4, 8)


def default_profile(capabilities: Iterable[str]) -> dict[str, Any]:
    """The ``linux.seccomp`` object for a container on this machine.

    Args:
        capabilities: the container's bounding set.
    """
    machine = os.uname().machine
    held = frozenset(capabilities)
    lists = _lists()
    names = {name for topic, calls in lists.items() if topic != "debugging" for name in calls}
    if kernel_version() >= _SAFE_PTRACE or "CAP_SYS_PTRACE" in held:
        names.update(lists["debugging"])
    names.update(_OF_MACHINE.get(machine, ()))
    for capability in held:
        names.update(_OF_CAPABILITY.get(capability, ()))
    rules: list[dict[str, Any]] = [_allow(sorted(names))]
    rules += [_allow(["personality"], _argument(0, value)) for value in _PERSONALITIES]
    # A hypervisor's socket knows no network namespaces.
    rules.append(_allow(["socket"], _argument(0, _AF_VSOCK, "SCMP_CMP_NE")))
    if "CAP_SYS_ADMIN" not in held:
        flags = 1 if machine == "s390x" else 0
        rules.append(
            _allow(["clone"], _argument(flags, _NAMESPACES, "SCMP_CMP_MASKED_EQ", value_two=0))
        )
        # A filter cannot look at clone3's structure; libraries go back to clone on ENOSYS.
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.EPERM,
        "architectures": list(_ARCHITECTURES.get(machine, ())),
        "syscalls": rules,
    }


def _allow(names: list[str], *arguments: dict[str, Any]) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ALLOW"}
    return {**rule, "args": list(arguments)} if arguments else rule


def _argument(
    index: int, value: int, operator: str = "SCMP_CMP_EQ", *, value_two: int | None = None
) -> dict[str, Any]:
    argument: dict[str, Any] = {"index": index, "value": value, "op": operator}
    return argument if value_two is None else {**argument, "valueTwo": value_two}


@cache
def _lists() -> dict[str, list[str]]:
    text = resources.files("runtime").joinpath("seccomp.json").read_text()
    lists: dict[str, list[str]] = json.loads(text)
    return lists
